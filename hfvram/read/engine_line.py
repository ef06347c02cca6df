"""A line that starts a serving engine, understood: `vllm serve MODEL …`, `python -m sglang.launch_server …`.

Source: vLLM 0.19.0, engine/arg_utils.py; SGLang 0.5.23, server_args.py.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hfvram.errors import HfvramError, printable

DTYPES = {"auto": "auto", "half": "fp16", "float16": "fp16", "bfloat16": "bf16", "float": "fp32", "float32": "fp32"}
CACHE_DTYPES = {
    "auto": "auto",
    "bfloat16": "bf16",
    "bf16": "bf16",
    "float16": "fp16",
    "fp8": "fp8",
    "fp8_e4m3": "fp8",
    "fp8_e5m2": "fp8",
}
QUANTS = {"fp8": "fp8"}
VLLM = {
    "model": ("model", None), "max-model-len": ("ctx", None), "tensor-parallel-size": ("tp", None), "tp": ("tp", None),
    "pipeline-parallel-size": ("pp", None), "pp": ("pp", None),
    "gpu-memory-utilization": ("gpu_memory_utilization", None),
    "max-num-seqs": ("max_num_seqs", None), "max-num-batched-tokens": ("max_num_batched_tokens", None),
    "enforce-eager": ("enforce_eager", True), "dtype": ("dtype", DTYPES), "kv-cache-dtype": ("kv_dtype", CACHE_DTYPES),
    "quantization": ("quant", QUANTS), "q": ("quant", QUANTS),
}  # fmt: skip
SGLANG = {
    "model-path": ("model", None), "model": ("model", None), "context-length": ("ctx", None), "tp-size": ("tp", None),
    "tensor-parallel-size": ("tp", None), "tp": ("tp", None), "pp-size": ("pp", None), "pp": ("pp", None),
    "pipeline-parallel-size": ("pp", None), "mem-fraction-static": ("mem_fraction_static", None),
    "max-running-requests": ("max_num_seqs", None), "chunked-prefill-size": ("max_num_batched_tokens", None),
    "disable-cuda-graph": ("enforce_eager", True), "dtype": ("dtype", DTYPES),
    "kv-cache-dtype": ("kv_dtype", CACHE_DTYPES), "quantization": ("quant", QUANTS),
}  # fmt: skip
NO_MATTER = frozenset({
    "host", "port", "api-key", "served-model-name", "tokenizer", "tokenizer-path", "chat-template", "seed",
    "random-seed", "uvicorn-log-level", "log-level", "download-dir", "trust-remote-code", "disable-log-requests",
    "disable-log-stats", "enable-auto-tool-choice", "tool-call-parser", "reasoning-parser", "enable-metrics",
})  # fmt: skip
"""Flags that take no memory."""


@dataclass(frozen=True, slots=True)
class EngineLine:
    """What a line asks for, in hfvram's option names, and what of it wasn't understood."""

    model: str | None
    options: Mapping[str, Any]
    unknown: tuple[str, ...]


def parse(line: str) -> EngineLine:
    """Read a line. Raises `usage` where it starts no engine that is known.

    >>> parse("vllm serve org/m --max-model-len 8k -tp 2 --port 80 --swap-space 4").unknown
    ('--swap-space 4',)
    """
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise HfvramError("usage", f"--engine-args is no command line: {error}") from None
    engine, rest = _program(words)
    flags = VLLM if engine == "vllm" else SGLANG
    model: str | None = None
    options: dict[str, Any] = {"engine": engine}
    unknown: list[str] = []
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            if model is None:
                model = word
            else:
                unknown.append(word)
            continue
        name, joined, value = word.lstrip("-").partition("=")
        name = name.replace("_", "-")
        known, words_of = flags.get(name, ("", None))
        if words_of is True:
            options[known] = True
            continue
        if not joined:
            value = rest.pop(0) if rest and not rest[0].startswith("-") else ""
        if not known:
            if name not in NO_MATTER:
                unknown.append(f"{word} {value}".strip() if not joined else word)
        elif words_of and value not in words_of:
            unknown.append(f"{word} {value}".strip())
        elif known == "model":
            model = value
        else:
            options[known] = words_of[value] if words_of else value
    return EngineLine(model, options, tuple(printable(u, 80) for u in unknown))


def _program(words: list[str]) -> tuple[str, list[str]]:
    """The engine, and the words after what starts it; settings of the environment may stand before."""
    for i, word in enumerate(words):
        if word == "vllm" or word.endswith("/vllm"):
            return "vllm", words[i + 1 + (words[i + 1 : i + 2] == ["serve"]) :]
        if word.startswith("vllm.entrypoints"):
            return "vllm", words[i + 1 :]
        if word.startswith("sglang.launch_server"):
            return "sglang", words[i + 1 :]
        if word == "sglang":
            return "sglang", words[i + 1 + (words[i + 1 : i + 2] == ["serve"]) :]
    raise HfvramError("usage", "--engine-args: a line such as 'vllm serve ORG/NAME --max-model-len 8192' is understood")
