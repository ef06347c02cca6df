"""llama.cpp's start-up log: buffers of weights, cache, recurrent states and computation, by device.

Source: llama.cpp, src/llama-model.cpp (load_tensors), llama-kv-cache.cpp, llama-memory-recurrent.cpp,
llama-context.cpp; the lines changed their heads over time, not their tails.
"""

import re
from typing import Final

from hfvram.read.engine_log import Dialect, Setting, pattern

DEVICE: Final = r"(?P<where>[A-Za-z][\w\[\]]{0,30})\s+"


def _cache(word: str) -> str | None:
    return None if word == "f16" else word


DIALECT: Final = Dialect(
    "llama.cpp",
    (
        pattern("weights on {}", r"load_tensors:\s+" + DEVICE + r"(?:model )?buffer size\s*=\s*~", "bytes", "sum"),
        pattern("cache on {}", DEVICE + r"KV buffer size\s*=\s*~", "bytes", "sum"),
        pattern("states on {}", DEVICE + r"RS buffer size\s*=\s*~", "bytes", "sum"),
        pattern("compute buffer on {}", DEVICE + r"compute buffer size\s*(?:of|is|=)\s*~", "bytes", "last"),
        pattern("output buffer on {}", DEVICE + r"output buffer size\s*=\s*~", "bytes", "last"),
        pattern("cache", r"(?:llama_kv_cache\w*: (?:CUDA )?size|(?i:kv self size))\s*=\s*~", "bytes", "sum"),
        pattern("cells", r"llama_kv_cache\w*: size\s*=.*?\(\s*(\d+) cells", "cells", "max"),
        pattern("states", r"llama_memory_recurrent: size\s*=\s*~", "bytes", "sum"),
    ),
    (
        Setting("model", re.compile(r"loaded meta data with \d+ key-value pairs and \d+ tensors from (\S+\.gguf)")),
        Setting("ctx", re.compile(r"\bn_ctx(?:_seq|_per_seq)\s*=\s*(\d+)"), int),
        Setting("ctx", re.compile(r"llama_context: n_ctx\s*=\s*(\d+)"), int),
        Setting("n_seq_max", re.compile(r"llama_context: n_seq_max\s*=\s*(\d+)"), int),
        Setting("kv_unified", re.compile(r"llama_context: kv_unified\s*=\s*(true)"), bool),
        Setting("max_num_batched_tokens", re.compile(r"llama_context: n_ubatch\s*=\s*(\d+)"), int),
        Setting("kv_dtype", re.compile(r"llama_kv_cache\w*: size\s*=.*?K \((\w+)\)"), _cache),
        Setting("n_gpu_layers", re.compile(r"offloaded (\d+)/\d+ layers to GPU"), int),
    ),
)
