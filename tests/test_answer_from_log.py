"""A log against the estimate: line by line, the model and options of the log, the command line over them."""

import json
from pathlib import Path

import pytest

from hfvram.answer.from_log import against
from hfvram.show.cli import main

LOGS = Path(__file__).parents[1] / "fixtures" / "logs"


@pytest.fixture(autouse=True)
def offline(hf_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def told(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, dict[str, object]]:
    assert main(["measure", *args, "--json"]) == 0
    return {f["name"]: f for f in json.loads(capsys.readouterr().out)["figures"]}


def test_vllm_to_the_printed_digit(capsys: pytest.CaptureFixture[str]) -> None:
    """Qwen3-8B on an H100 with vLLM 0.19 (fixtures/published); the log alone doesn't say how large the GPU is."""
    path = str(LOGS / "vllm-0.19.log")
    found = told(capsys, "--read-log", path, "--gpu", "79.19GiB", "--gpu-memory-utilization", "0.95")
    exact = {name for name, f in found.items() if f["exact"]}
    assert exact >= {"weights", "activations", "not PyTorch's", "pool", "tokens", "concurrency", "cache a token"}
    assert (found["cache a token"]["estimated"], found["weights"]["line"]) == (147_456, 3)
    alone = told(capsys, "--read-log", path)
    assert (alone["pool"]["estimated"], alone["cache a token"]["estimated"]) == (None, 147_456)


def test_vllm_of_2024_by_what_the_log_itself_says(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "--read-log", str(LOGS / "vllm-0.6.log"))
    assert found["weights"]["exact"]
    # 16 tokens of 131,072 B: 2 MiB a block, 2048 of them in 4 GiB
    assert (found["blocks in 4 GiB of CPU memory"]["estimated"], found["blocks"]["estimated"] is not None) == (
        2048,
        True,
    )


def test_sglang(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "--read-log", str(LOGS / "sglang.log"), "Qwen/Qwen3-32B", "--gpu", "24GiB")
    # 2 × 64 layers × 2 heads of 4 ranks × 128 × 2 B
    assert (found["cache a token"]["estimated"], found["cache a token"]["exact"]) == (65_536, True)
    assert found["weights"]["estimated"]


@pytest.mark.slow
def test_out_of_memory(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["Qwen/Qwen3-8B", "--mode", "lora", "--ctx", "8k", "--batch", "4", "--method", "formula"]
    found = told(capsys, "--read-log", str(LOGS / "out-of-memory.txt"), *args)
    # 21.00 + 2.32 and 21.00 + 1.02 GiB
    assert found["allocated with the one that failed"]["printed"] == "23.32 GiB"
    assert found["reserved"]["printed"] == "22.02 GiB"
    assert found["on the device"]["estimated"] > found["capacity"]["logged"]  # type: ignore[operator]
    said = against(str(LOGS / "out-of-memory.txt"), "gpt2", {"mode": "train", "method": "formula", "ctx": 128}).warnings
    assert any("less than the GPU's 23.64 GiB: the run that failed was larger" in w for w in said)


def test_a_log_that_names_no_model_and_one_that_is_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", "--read-log", str(LOGS / "out-of-memory.txt")]) == 0
    out, err = capsys.readouterr()
    assert "asked for last" in out
    assert "the log names no model" in err
    assert main(["measure", "--read-log", str(LOGS / "llama-cpp.log")]) == 0
    out, err = capsys.readouterr()
    assert "compute buffer on CUDA0  15  447.38 MiB" in " ".join(out.split()).replace("CUDA0 15 447", "CUDA0  15  447")
    assert "llama.cpp's figures stand alone" in err


def test_llama_cpp_to_the_printed_digit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gemma 2 2B with four slots of one cache: 2·13·(4·256)·2·8192 B in the layers that see all, as many in the others.
    Qwen3.5-35B-A3B: 4·30·[(2·16·128+32·128)·3 + 32·128·128]·4 B of recurrent states (both: fixtures/published)."""
    found = told(capsys, "--read-log", str(LOGS / "llama-cpp-gemma2.log"), "google/gemma-2-2b-it")
    assert {name: (f["estimated"], f["exact"]) for name, f in found.items()} == {
        "cache on CUDA0": (832 << 20, True),
        "cache": (832 << 20, True),
        "cells": (8192, True),
    }
    file = tmp_path / "log"
    file.write_text(
        "llama_context: n_seq_max     = 4\nllama_context: n_ctx_seq     = 4096\n"
        "llama_memory_recurrent:      CUDA0 RS buffer size =   251.25 MiB\n"
        "llama_memory_recurrent: size =  251.25 MiB (     4 cells,  40 layers,  4 seqs), R (f32):   11.25 MiB\n"
    )
    found = told(capsys, "--read-log", str(file), "Qwen/Qwen3.5-35B-A3B")
    assert [(f["estimated"], f["exact"]) for f in found.values()] == [(263_454_720, True)] * 2
    assert main(["measure", "--read-log", str(file), "no/such"]) == 1


def test_the_table_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    main(["measure", "--read-log", str(LOGS / "vllm-0.19.log"), "-q"])
    out = capsys.readouterr().out
    assert out.startswith("vllm: 7 figures, against Qwen/Qwen3-8B (inference, ctx 40,960)\n")
    assert "weights 3 15.27 GiB 15.27 GiB as printed" in " ".join(out.split())
    assert main(["measure", "--read-log", "/none"]) == 1
    assert main(["measure", "--read-log", str(LOGS / "vllm-0.19.log"), "--csv"]) == 2
    assert main(["measure", "--read-log", str(LOGS / "vllm-0.19.log"), "a/b", "c/d"]) == 2
