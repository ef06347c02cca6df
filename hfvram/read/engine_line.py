"""A line that starts a serving engine, understood: `vllm serve MODEL …`, `python -m sglang.launch_server …`,
`llama-server -m FILE …`.

Source: vLLM 0.19.0, engine/arg_utils.py; SGLang 0.5.23, server_args.py; llama.cpp b10635, common/arg.cpp.
"""

import json
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
STORED = ("awq", "awq_marlin", "gptq", "gptq_marlin", "compressed-tensors", "modelopt", "modelopt_fp4", "mxfp4")
"""Formats that a checkpoint has, and no engine makes."""
QUANTS = {"fp8": "fp8", "bitsandbytes": "nf4"} | dict.fromkeys(STORED, "auto")
SPECULATES = {"NEXTN": "mtp"}
"""SGLang's algorithms that need no other model."""
VLLM = {
    "model": ("model", None), "max-model-len": ("ctx", None), "tensor-parallel-size": ("tp", None), "tp": ("tp", None),
    "pipeline-parallel-size": ("pp", None), "pp": ("pp", None),
    "gpu-memory-utilization": ("gpu_memory_utilization", None),
    "max-num-seqs": ("max_num_seqs", None), "max-num-batched-tokens": ("max_num_batched_tokens", None),
    "enforce-eager": ("enforce_eager", True), "dtype": ("dtype", DTYPES), "kv-cache-dtype": ("kv_dtype", CACHE_DTYPES),
    "quantization": ("quant", QUANTS), "q": ("quant", QUANTS),
    "speculative-config": ("draft", None),
}  # fmt: skip
SGLANG = {
    "model-path": ("model", None), "model": ("model", None), "context-length": ("ctx", None), "tp-size": ("tp", None),
    "tensor-parallel-size": ("tp", None), "tp": ("tp", None), "pp-size": ("pp", None), "pp": ("pp", None),
    "pipeline-parallel-size": ("pp", None), "mem-fraction-static": ("mem_fraction_static", None),
    "max-running-requests": ("max_num_seqs", None), "chunked-prefill-size": ("max_num_batched_tokens", None),
    "disable-cuda-graph": ("enforce_eager", True), "dtype": ("dtype", DTYPES),
    "kv-cache-dtype": ("kv_dtype", CACHE_DTYPES), "quantization": ("quant", QUANTS),
    "speculative-algorithm": ("draft", SPECULATES), "speculative-draft-model-path": ("draft", None),
}  # fmt: skip
GGUF_CACHE = {t: t for t in ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")}
ALL_LAYERS = {"all": None, "auto": None, "-1": None}
"""Words of `--n-gpu-layers` for all of them; else a number."""
LLAMA = {
    "model": ("model", None), "m": ("model", None), "hf-repo": ("model", None), "hf": ("model", None),
    "hfr": ("model", None), "hf-file": ("file", None), "hff": ("file", None), "ctx-size": ("ctx", None),
    "c": ("ctx", None), "n-gpu-layers": ("n_gpu_layers", None), "gpu-layers": ("n_gpu_layers", None),
    "ngl": ("n_gpu_layers", None), "n-cpu-moe": ("n_cpu_moe", None), "ncmoe": ("n_cpu_moe", None),
    "cpu-moe": ("cpu_moe", True), "cmoe": ("cpu_moe", True), "override-tensor": ("override_tensor", None),
    "ot": ("override_tensor", None), "cache-type-k": ("kv_dtype", GGUF_CACHE), "ctk": ("kv_dtype", GGUF_CACHE),
    "cache-type-v": ("values", GGUF_CACHE), "ctv": ("values", GGUF_CACHE), "parallel": ("slots", None),
    "np": ("slots", None), "ubatch-size": ("max_num_batched_tokens", None), "ub": ("max_num_batched_tokens", None),
    "swa-full": ("swa_full", True), "kv-unified": ("unified", True), "kvu": ("unified", True),
    "flash-attn": ("flash", None), "fa": ("flash", None),
}  # fmt: skip
PROGRAMS = ("llama-server", "llama-cli", "llama-run", "llama-bench", "llama-completion")
FLAGS: Mapping[str, Mapping[str, tuple[str, Any]]] = {"vllm": VLLM, "sglang": SGLANG, "llama.cpp": LLAMA}
NO_MATTER = frozenset({
    "host", "port", "api-key", "served-model-name", "tokenizer", "tokenizer-path", "chat-template", "seed",
    "random-seed", "uvicorn-log-level", "log-level", "download-dir", "trust-remote-code", "disable-log-requests",
    "disable-log-stats", "enable-auto-tool-choice", "tool-call-parser", "reasoning-parser", "enable-metrics",
    "threads", "t", "tb", "threads-batch", "batch-size", "b", "temp", "top-k", "top-p", "min-p", "jinja", "no-mmap",
    "mlock", "alias", "a", "p", "prompt", "n", "n-predict", "no-webui", "metrics", "cont-batching", "cb", "no-warmup",
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
    flags: Mapping[str, tuple[str, Any]] = FLAGS[engine]
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
            value = rest.pop(0) if rest and (not rest[0].startswith("-") or rest[0] == "-1") else ""
        if name == "speculative-config" and known:
            value = _speculates(value)
            known = known if value else ""
        if not known:
            if name not in NO_MATTER:
                unknown.append(f"{word} {value}".strip() if not joined else word)
        elif words_of and value not in words_of:
            unknown.append(f"{word} {value}".strip())
        elif known == "model":
            model = value
        else:
            options[known] = words_of[value] if words_of else value
    if engine == "llama.cpp":
        model = _llama(model, options, unknown, server=any("llama-server" in w for w in words))
    return EngineLine(model, options, tuple(printable(u, 80) for u in unknown))


def _llama(model: str | None, options: dict[str, Any], unknown: list[str], server: bool) -> str | None:
    """What of llama.cpp's line has no word of hfvram's own; the model, where `-hf` names a quantization with it.

    `-c` is shared by `-np` sequences; without `-np`, llama-server makes four that share one cache.
    """
    if options.get("n_gpu_layers") in ALL_LAYERS:
        options.pop("n_gpu_layers")
    if options.pop("cpu_moe", False):
        options["n_cpu_moe"] = 10**6
    if (values := options.pop("values", None)) and values != options.get("kv_dtype", "f16"):
        unknown.append(
            f"-ctv {values} beside -ctk {options.get('kv_dtype', 'f16')}: keys and values are answered alike"
        )
    if options.pop("flash", None) in ("off", "0"):
        options["attention"] = "eager"
    slots, unified = str(options.pop("slots", "")), options.pop("unified", False)
    if not slots.isdigit():
        if server:
            options["max_num_seqs"] = 4
    elif unified:
        options["max_num_seqs"] = int(slots)
    elif int(slots) > 1:
        options["batch"] = int(slots)
        if str(ctx := options.get("ctx", "")).isdigit():
            options["ctx"] = int(ctx) // int(slots)
    if model and not model.endswith(".gguf") and ":" in model.rpartition("/")[2]:
        model, _, options["file"] = model.rpartition(":")
    return model


def _speculates(text: str) -> str:
    """The draft of vLLM's `--speculative-config`: a model, or `mtp`; nothing where it says neither.

    >>> _speculates('{"method": "deepseek_mtp", "num_speculative_tokens": 1}')
    'mtp'
    """
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(said, dict):
        return ""
    method, model = said.get("method"), said.get("model")
    if isinstance(method, str) and method.endswith("mtp"):
        return "mtp"
    return model if isinstance(model, str) and method in (None, "draft_model") else ""


def _program(words: list[str]) -> tuple[str, list[str]]:
    """The engine, and the words after what starts it; settings of the environment may stand before."""
    for i, word in enumerate(words):
        if word == "vllm" or word.endswith("/vllm"):
            return "vllm", words[i + 1 + (words[i + 1 : i + 2] == ["serve"]) :]
        if word.startswith("vllm.entrypoints"):
            return "vllm", words[i + 1 :]
        if word.startswith("sglang.launch_server"):
            return "sglang", words[i + 1 :]
        if word.rpartition("/")[2] in PROGRAMS:
            return "llama.cpp", words[i + 1 :]
        if word == "sglang":
            return "sglang", words[i + 1 + (words[i + 1 : i + 2] == ["serve"]) :]
    raise HfvramError("usage", "--engine-args: a line such as 'vllm serve ORG/NAME --max-model-len 8192' is understood")
