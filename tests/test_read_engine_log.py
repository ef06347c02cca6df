"""Start-up logs and out-of-memory messages: which figures stand in them (fixtures/logs: in shapes as published)."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hfvram.errors import HfvramError
from hfvram.read.engine_log import read
from hfvram.units import GiB, MiB

FIXTURES = Path(__file__).parents[1] / "fixtures"
LOGS = FIXTURES / "logs"


def figures(path: Path) -> dict[str, int | float]:
    return {p.name: p.value for p in read(str(path)).printed}


def said(folder: Path, text: str) -> dict[str, int | float]:
    file = folder / "log"
    file.write_text(text)
    return figures(file)


def test_vllm() -> None:
    log = read(str(LOGS / "vllm-0.19.log"))
    assert (log.engine, log.model) == ("vllm", "Qwen/Qwen3-8B")
    assert dict(log.options) == {"ctx": 40960, "dtype": "bf16", "kv_dtype": "auto", "max_num_batched_tokens": 8192}
    assert figures(LOGS / "vllm-0.19.log") == {
        "weights": round(15.27 * GiB), "activations": round(2.21 * GiB), "not PyTorch's": GiB // 4,
        "pool": round(57.5 * GiB), "tokens": 418_688, "concurrency": 10.22, "CUDA graphs": round(0.83 * GiB),
    }  # fmt: skip


def test_vllm_of_2024() -> None:
    log = read(str(LOGS / "vllm-0.6.log"))
    assert log.options["gpu"] == "23.58GiB"
    assert (log.options["gpu_memory_utilization"], log.options["ctx"]) == (0.9, 29000)
    found = figures(LOGS / "vllm-0.6.log")
    assert found["weights"] == round(14.9888 * GiB)
    assert (found["blocks"], found["blocks in 4 GiB of CPU memory"], found["pool"]) == (1478, 2048, round(2.89 * GiB))


def test_sglang() -> None:
    log = read(str(LOGS / "sglang.log"))
    assert (log.engine, log.model) == ("sglang", "Qwen/QwQ-32B")
    assert log.options["tp"] == 4
    assert figures(LOGS / "sglang.log") == {
        "weights": round(15.54 * GiB), "tokens": 46_611, "keys": round(1.42 * GiB), "values": round(1.42 * GiB),
        "CUDA graphs": round(0.93 * GiB), "NCCL": round(0.13 * GiB),
    }  # fmt: skip


def test_sglang_with_states_and_windows(tmp_path: Path) -> None:
    found = said(
        tmp_path,
        "Mamba Cache is allocated. max_mamba_cache_size: 20, conv_state size: 0.00GB, ssm_state size: 0.98GB\n"
        "SWAKVPool mem usage: 79.94 GB, swa size: 798276, full size: 997846\n"
        "[TP0] KV Cache is allocated. dtype: torch.bfloat16, #tokens: 524288, KV size: 17.16 GB\n",
    )
    assert (found["states in the pool"], found["recurrent states"]) == (20, round(0.98 * GiB))
    assert (found["sliding tokens"], found["pool"]) == (798_276, round(79.94 * GiB))


def test_llama_cpp() -> None:
    log = read(str(LOGS / "llama-cpp.log"))
    assert (log.engine, log.model) == ("llama.cpp", "models/qwen3.5-9b-q4_k_m.gguf")
    assert log.options["n_gpu_layers"] == 31
    found = figures(LOGS / "llama-cpp.log")
    assert (found["weights on CUDA0"], found["weights on CPU_Mapped"]) == (round(4854.94 * MiB), round(824.31 * MiB))
    assert (found["cache"], found["cells"], found["states"]) == (4224 * MiB, 135_168, 201 * MiB)
    assert found["states on CPU"] + found["states on CUDA0"] == 201 * MiB
    assert found["compute buffer on CUDA0"] == round(447.38 * MiB)


def test_llama_cpp_with_windows_has_two_caches_and_the_old_line_one(tmp_path: Path) -> None:
    both = (
        "llama_kv_cache: size = 2304.00 MiB ( 65536 cells,  18 layers,  4/1 seqs), K (f16): 1152.00 MiB\n"
        "llama_kv_cache: size =   36.00 MiB (  1024 cells,  18 layers,  4/1 seqs), K (f16):   18.00 MiB\n"
    )
    assert said(tmp_path, both)["cache"] == 2340 * MiB
    assert said(tmp_path, "llama_init_from_file: kv self size  =  400.00 MB\n") == {"cache": 400 * MiB}
    assert said(tmp_path, "llama_new_context_with_model: KV self size  =  400.00 MiB, K (f16):  200.00 MiB\n")


def test_out_of_memory_new_and_old(tmp_path: Path) -> None:
    log = read(str(LOGS / "out-of-memory.txt"))
    assert (log.engine, log.model, log.options["gpu"]) == ("PyTorch", None, "23.64GiB")
    assert figures(LOGS / "out-of-memory.txt") == {
        "asked for last": round(2.32 * GiB), "capacity": round(23.64 * GiB), "free": round(1.15 * GiB),
        "on the device": round(22.49 * GiB), "allocated": 21 * GiB, "reserved, unallocated": round(1.02 * GiB),
    }  # fmt: skip
    old = (
        "RuntimeError: CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 23.69 GiB total capacity; 21.43 GiB "
        "already allocated; 11.69 MiB free; 22.37 GiB reserved in total by PyTorch)\n"
    )
    found = said(tmp_path, old)
    assert (found["allocated"], found["reserved"]) == (round(21.43 * GiB), round(22.37 * GiB))
    assert (found["asked for last"], found["free"]) == (20 * MiB, round(11.69 * MiB))


LINES = {
    "weights": "Model loading took {} and 5.1 seconds",
    "activations": "PyTorch activation peak memory takes {}; the rest",
    "non_torch": "non_torch_memory takes {}; PyTorch",
    "pool": "Available KV cache memory: {}",
    "graphs": "Graph capturing finished in 9 secs, took {}",
}
NAMES = {"non_torch": "not PyTorch's", "graphs": "CUDA graphs"}


def test_every_published_figure_of_vllm_is_recognized_to_its_digit(tmp_path: Path) -> None:
    """The figures that others published, in the lines that the engine prints them in."""
    count = 0
    for row in map(json.loads, (FIXTURES / "published" / "runs.jsonl").open()):
        for name, text in row["printed"].items():
            if row["engine"].startswith("vllm") and name in LINES and " " in text:
                number, unit = text.split()
                size = {"GiB": GiB, "MiB": MiB}.get(unit)
                if size:
                    found = said(tmp_path, f"INFO [x.py:1] {LINES[name].format(text)}\n")
                    assert found == {NAMES.get(name, name): round(float(number) * size)}
                    count += 1
    assert count > 100


def test_several_ranks_print_the_same(tmp_path: Path) -> None:
    text = "".join(f"(Worker_TP{i}) Available KV cache memory: {v} GiB\n" for i, v in enumerate((8.2, 8.11, 8.3)))
    assert said(tmp_path, text) == {"pool": round(8.11 * GiB)}


@pytest.mark.parametrize("text", ["", "nothing here\n", "weights: 3 GiB\n"])
def test_a_log_without_figures_is_a_usage_error(text: str, tmp_path: Path) -> None:
    with pytest.raises(HfvramError, match="no figure of vLLM, SGLang or llama") as raised:
        said(tmp_path, text)
    assert raised.value.kind == "usage"
    with pytest.raises(HfvramError) as raised:
        read(str(tmp_path / "none"))
    assert raised.value.kind == "io"


def test_long_lines_take_no_time(tmp_path: Path) -> None:
    start = time.monotonic()
    text = "\n".join(("9" * 200_000, "1 GiB " * 20_000, "x " * 100_000, "Load weight end." * 10_000, "CUDA0 " * 30_000))
    with pytest.raises(HfvramError):
        said(tmp_path, text)
    assert time.monotonic() - start < 5


@given(st.text(max_size=200), st.sampled_from([p.read_text() for p in sorted(LOGS.iterdir())]), st.integers(0, 500))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_any_text_is_figures_or_an_error(tmp_path: Path, text: str, log: str, at: int) -> None:
    file = tmp_path / "log"
    file.write_bytes((log[:at] + text + log[at + 3 :]).encode("utf-8", "replace"))
    try:
        found = read(str(file))
    except HfvramError:
        return
    assert found.printed
    assert all(p.value >= 0 for p in found.printed)
