"""Questions to llama.cpp: GGUF files in a folder and on a Hub, models of the catalogue, the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ggufs import LLAMA, gguf, llama
from hub import FakeHub, Repo, Sparse
from test_show_cli import run

from hfvram.answer.estimate import Estimate
from hfvram.answer.question import Session
from hfvram.errors import HfvramError
from hfvram.request import Request
from hfvram.units import GiB

SESSION = Session()
MOE = "Qwen/Qwen3-30B-A3B"


def ask(model: str, **options: Any) -> Estimate:
    file = options.pop("file", None)
    return SESSION.estimate(
        model, Request.from_dict(options), offline="/" in model and not os.path.exists(model), file=file
    )


def refusal(model: str, **options: Any) -> str:
    with pytest.raises(HfvramError) as caught:
        ask(model, **options)
    assert caught.value.kind == "usage"
    return caught.value.message


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "small-Q4_K_M.gguf"
    made = gguf("llama", {**LLAMA, "general.file_type": 15}, llama(), tokens=100)
    path.write_bytes(made.head)
    os.truncate(path, made.size)
    return str(path)


def test_a_file_is_answered_for_llama_cpp_and_said_so(file: str) -> None:
    e = ask(file, ctx=8192, gpu="24GB")
    assert e.request.engine == "llama.cpp"
    assert any("--engine llama.cpp" in w for w in e.warnings)
    assert sum(i.bytes for i in e.items) == e.peak_allocated_bytes
    # 8,192 cells × 2 layers × 2 heads of 64, keys and values in fp16
    assert e.cache_bytes == 8192 * 2 * 2 * 2 * 64 * 2
    assert e.model.parameters_from == "headers"
    # Q4_K: 144 bytes for 256; Q6_K: 210; norms fp32
    linear = 512 * 256 + 2 * (256 * 256 * 2 + 2 * 128 * 256 + 3 * 512 * 256)
    assert e.weights_bytes == linear // 256 * 144 + 512 * 256 // 256 * 210 + 5 * 256 * 4
    assert e.cpu_bytes == 512 * 256 // 256 * 144
    assert {i.name: i.certainty for i in e.items}["weights: Q4_K"] == "exact"
    assert e.fit is not None
    assert e.fit.fits
    assert e.interval.low_bytes < e.device_bytes < e.interval.high_bytes
    told = json.loads(json.dumps(e.to_dict()))
    assert ask(file, **{k: v for k, v in told["request"].items() if v is not None}).to_dict()["items"] == told["items"]


def test_repositories_pick_by_quantization(hf_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo: dict[str, bytes | Sparse] = {
        f"m-{q}.gguf": gguf("llama", LLAMA, llama(dtype=t)) for q, t in (("Q4_K_M", "Q4_K"), ("Q8_0", "Q8_0"))
    }
    repo["mmproj-m-F16.gguf"] = gguf("clip", {}, {"v.blk.0.attn_q.weight": ("F16", (1024, 1024))})
    with FakeHub({"a/m-GGUF": Repo(repo)}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        session = Session()
        request = Request(ctx=1024)
        small = session.estimate("a/m-GGUF", request, file="q4_k_m")
        large = session.estimate("a/m-GGUF", request, file="Q8_0")
        both = session.estimate("a/m-GGUF", request.with_(mmproj=True, engine="llama.cpp"), file="Q8_0")
        with pytest.raises(HfvramError, match="--file picks one of Q4_K_M, Q8_0"):
            session.estimate("a/m-GGUF", request)
    assert small.model.commit
    assert small.weights_bytes < large.weights_bytes
    assert both.weights_bytes - large.weights_bytes == 2 * 1024 * 1024
    assert {i.name: i.bytes for i in both.items}["projector"] == 2 * 1024 * 1024
    assert any("mmproj-m-F16.gguf" in w and "--mmproj" in w for w in large.warnings)


def test_what_a_model_of_transformers_becomes() -> None:
    e = ask("meta-llama/Llama-3.1-8B-Instruct", quant="q4_k_m", ctx=8192)
    assert (e.request.engine, e.request.quant) == ("llama.cpp", "Q4_K_M")
    assert e.weights_bytes / 1e9 == pytest.approx(4.912, abs=0.005)
    assert {i.certainty for i in e.items if i.category == "weights"} == {"derived"}
    plain = ask("meta-llama/Llama-3.1-8B-Instruct", engine="llama.cpp", ctx=8192)
    assert plain.request.quant == "BF16"
    # norms are stored in fp32
    assert plain.weights_bytes == 2 * 8_030_261_248 + 2 * 65 * 4096
    oss = ask("openai/gpt-oss-20b", engine="llama.cpp", ctx=8192)
    assert oss.request.quant == "MXFP4_MOE"
    assert oss.weights_bytes / 1e9 == pytest.approx(12.1, abs=0.1)  # ggml-org's own file has 12.1 GB


def test_more_on_the_cpu_is_less_on_the_gpu() -> None:
    whole = ask(MOE, quant="Q4_K_M", ctx=8192)
    taken = [whole.device_bytes]
    for options in ({"n_cpu_moe": 10}, {"n_cpu_moe": 48}, {"n_gpu_layers": 20}, {"override_tensor": "exps=CPU"}):
        e = ask(MOE, quant="Q4_K_M", ctx=8192, **options)
        taken.append(e.device_bytes)
        assert e.weights_bytes == whole.weights_bytes
        assert e.cpu_bytes > whole.cpu_bytes
        assert sum(x.bytes for x in e.offloaded) == e.cpu_bytes
    assert max(taken[1:]) < taken[0]
    assert taken[2] == taken[4]


def test_advice_is_in_its_own_flags_and_holds() -> None:
    e = ask(MOE, quant="Q4_K_M", ctx=32768, gpu="16GB")
    assert e.fit is not None
    assert not e.fit.fits
    assert e.fit.ways
    for way in e.fit.ways:
        assert way.device_bytes <= e.fit.capacity_bytes
        words = way.change.split()
        names = {
            "-ngl": "n_gpu_layers",
            "--n-cpu-moe": "n_cpu_moe",
            "-ctk": "kv_dtype",
            "-c": "ctx",
            "--quant": "quant",
        }
        pairs = zip(words[::2], words[1::2], strict=True)
        changed = {names[flag]: value for flag, value in pairs if flag != "-ctv"}
        again = ask(MOE, **{"quant": "Q4_K_M", "ctx": 32768, "gpu": "16GB", **changed})
        assert again.device_bytes == way.device_bytes
    roomy = ask(MOE, quant="Q4_K_M", ctx=8192, gpu="24GB")
    assert roomy.fit is not None
    assert roomy.fit.fits
    assert roomy.fit.max_ctx
    at = ask(MOE, quant="Q4_K_M", ctx=roomy.fit.max_ctx, gpu="24GB")
    assert at.fit is not None
    assert at.fit.fits


def test_slots_share_the_context_and_sequences_do_not() -> None:
    one, four = (ask(MOE, quant="Q4_K_M", ctx=8192, **o) for o in ({}, {"max_num_seqs": 4}))
    assert one.cache_bytes == four.cache_bytes
    assert ask(MOE, quant="Q4_K_M", ctx=8192, batch=4).cache_bytes == 4 * one.cache_bytes
    half = ask(MOE, quant="Q4_K_M", ctx=8192, kv_dtype="q8_0")
    assert half.cache_bytes * 32 == one.cache_bytes * 17


def test_windows_count_where_llama_cpp_has_them() -> None:
    """Mistral 7B v0.1 has a window of 4,096 tokens that llama.cpp does not read: 32 layers of 8 heads of 128."""
    mistral = ask("mistralai/Mistral-7B-v0.1", engine="llama.cpp", ctx=32768)
    assert mistral.cache_bytes == 32768 * 32 * 2 * 8 * 128 * 2
    gemma = ask("google/gemma-3-27b-it", engine="llama.cpp", ctx=32768)
    assert {i.name for i in gemma.items if i.category == "cache"} == {"cache: full attention", "cache: sliding window"}
    # 10 full layers, 52 with a window of 1,024 and an ubatch of 512; 16 heads of 128
    assert gemma.cache_bytes == (10 * 32768 + 52 * 1536) * 2 * 16 * 128 * 2


def test_more_never_needs_less() -> None:
    for name, values in {
        "ctx": (256, 4096, 40960),
        "batch": (1, 2, 8),
        "max_num_batched_tokens": (128, 512, 2048),
    }.items():
        taken = [ask("google/gemma-3-27b-it", **{"quant": "Q4_K_M", "ctx": 8192, name: v}).device_bytes for v in values]
        assert taken == sorted(taken)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_dtype": "fp8"}, "valid are auto, f32, f16, bf16, q8_0"),
        ({"tp": 2}, "one GPU"),
        ({"quant": "nf4"}, "--quant nf4 with --engine llama.cpp"),
        ({"override_tensor": "exps"}, "=CPU"),
        ({"override_tensor": "(=CPU"}, "is no pattern"),
        ({"override_tensor": r"(\w|\w\w)+!=CPU"}, "repeats a repetition"),
        ({"mode": "train"}, "--mode train"),
        ({"enforce_eager": True}, "goes with --engine vllm or sglang"),
        ({"mmproj": True}, "--mmproj"),
        ({"n_gpu_layers": -3}, "out of range"),
        ({"cache": "static"}, "--cache is not supported"),
    ],
    ids=str,
)
def test_what_it_can_t_do_is_a_usage_error(options: dict[str, Any], words: str) -> None:
    assert words in refusal(MOE, engine="llama.cpp", **options)


def test_other_engines_can_t(file: str) -> None:
    assert "valid is --engine llama.cpp" in refusal(file, engine="vllm")
    assert "file is Q4_K_M already" in refusal(file, quant="Q8_0")
    assert "goes with --engine llama.cpp" in refusal(MOE, engine="vllm", n_gpu_layers=3)
    assert "--kv-dtype q8_0" in refusal(MOE, engine="vllm", kv_dtype="q8_0")
    assert "heads of 80 are not whole blocks" in refusal("microsoft/phi-2", engine="llama.cpp", kv_dtype="q8_0")


def test_the_command_line(file: str, tmp_path: Path) -> None:
    done = run(file, "--ctx", "8192", "--gpu", "24GB", HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "in llama.cpp's buffers" in done.stdout
    assert "8,192 cells" in done.stdout
    assert "fits 24GB" in done.stdout
    line = f"llama-server -m {file} -c 8192 -ngl 99 -np 1"
    same = run("--engine-args", line, "--gpu", "24GB", "--json", HF_HOME=str(tmp_path))
    assert json.loads(same.stdout)["cache_bytes"] == 8192 * 2 * 2 * 2 * 64 * 2
    none = run(file, "--ctx", "8192", "--gpu", "0.2GB", HF_HOME=str(tmp_path))
    assert none.returncode == 3


def test_a_large_moe_beside_a_small_gpu_has_its_experts_in_cpu_memory() -> None:
    e = ask(MOE, quant="Q4_K_M", ctx=8192, n_cpu_moe=48)
    assert e.device_bytes < 4 * GiB
    assert {x.name for x in e.offloaded} == {"experts", "input embedding"}


def test_it_is_light(file: str) -> None:
    """The gguf package imports numpy and more: its module of constants is taken alone."""
    code = """
import sys
from hfvram import Request
from hfvram.answer.question import Session
for model, options in ((sys.argv[1], {}), ("Qwen/Qwen3-8B", {"quant": "Q4_K_M"})):
    Session().estimate(model, Request(**options), offline=True)
print(sorted({"numpy", "torch", "transformers", "gguf"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")
