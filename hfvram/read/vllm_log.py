"""vLLM's start-up log, from V0's lines (0.4 to 0.8) to V1's.

Source: vLLM 0.19.0, v1/worker/gpu_worker.py, v1/core/kv_cache_utils.py, utils/mem_utils.py, v1/engine/core.py; 0.6.4,
worker/worker.py; lines that others published (fixtures/published).
"""

import re
from typing import Final

from hfvram.read.engine_line import CACHE_DTYPES, DTYPES
from hfvram.read.engine_log import Dialect, Setting, pattern


def _dtype(word: str) -> str | None:
    return DTYPES.get(word.removeprefix("torch."))


def _gib(text: str) -> str:
    return f"{text}GiB"


def _truth(word: str) -> bool | None:
    return True if word == "True" else None


def _quant(word: str) -> str | None:
    return "fp8" if word == "fp8" else None


def _parts(text: str) -> int | None:
    return int(text) if int(text) > 1 else None


DIALECT: Final = Dialect(
    "vllm",
    (
        pattern("weights", r"Model loading took ~"),
        pattern("weights", r"Loading model weights took ~"),
        pattern("weights", r"(?:weights memory:|model weights take) ~"),
        pattern("activations", r"(?:torch peak memory increase:|activation peak memory takes) ~"),
        pattern("not PyTorch's", r"(?:non-torch forward increase memory:|non_torch_memory takes) ~"),
        pattern("pool", r"(?:Available KV cache memory:|reserved for KV Cache is|kv_cache_size=) ?~", "bytes", "min"),
        pattern("tokens", r"GPU KV cache size: ([\d,]{1,20}) tokens", "tokens", "min"),
        pattern("blocks", r"# (?:GPU|CUDA) blocks: ?([\d,]{1,20})", "blocks", "min"),
        pattern("blocks in 4 GiB of CPU memory", r"# CPU blocks: ?([\d,]{1,20})", "blocks", "min"),
        pattern("CUDA graphs", r"Graph capturing finished in \S+ secs?, took ~"),
        pattern("concurrency", r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x", "requests", "min"),
    ),
    (
        Setting("model", re.compile(r"(?:with config:|LLM engine \S+ with config:)[^=]{0,60}\bmodel='([^']+)'")),
        Setting("model", re.compile(r"non-default args: \{.*?'model(?:_tag)?': '([^']+)'")),
        Setting("ctx", re.compile(r"\bmax_seq_len=(\d+)"), int),
        Setting("ctx", re.compile(r"Maximum concurrency for ([\d,]{1,20}) tokens"), lambda t: int(t.replace(",", ""))),
        Setting("dtype", re.compile(r"with config:.*?\bdtype=(torch\.\w+)"), _dtype),
        Setting("tp", re.compile(r"\btensor_parallel_size=(\d+)"), _parts),
        Setting("pp", re.compile(r"\bpipeline_parallel_size=(\d+)"), _parts),
        Setting("quant", re.compile(r"with config:.*?\bquantization=(\w+)"), _quant),
        Setting("kv_dtype", re.compile(r"\bkv_cache_dtype=(\w+)"), CACHE_DTYPES.get),
        Setting("enforce_eager", re.compile(r"\benforce_eager=(\w+)"), _truth),
        Setting("max_num_batched_tokens", re.compile(r"\bmax_num_batched_tokens['\"]?[=:] ?(\d+)"), int),
        Setting("max_num_seqs", re.compile(r"\bmax_num_seqs['\"]?[=:] ?(\d+)"), int),
        Setting("gpu_memory_utilization", re.compile(r"gpu_memory_utilization['\"]?(?:=|: | \()([01]\.\d+)"), float),
        Setting("gpu", re.compile(r"total_gpu_memory(?:=| \()([\d.]+)GiB"), _gib),
    ),
)
