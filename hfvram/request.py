"""`Request`: what somebody wants to do with a model; command-line options, keywords and JSON keys have one name."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, get_args, get_type_hints

from hfvram.errors import HfvramError, printable
from hfvram.units import parse_bytes, parse_tokens

GGUF_QUANTS = (
    *("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0"),
    *("IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "Q2_K", "Q2_K_S"),
    *("IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "TQ2_0", "TQ1_0", "MXFP4_MOE"),
)
"""Mixtures of `llama-quantize`."""
GGUF_CACHES = ("f32", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
"""Types of llama.cpp's `--cache-type-k`, beside bf16."""
CHOICES: dict[str, tuple[str, ...]] = {
    "mode": ("inference", "train", "lora", "qlora"),
    "phase": ("generate", "prefill", "encode"),
    "dtype": ("auto", "fp32", "bf16", "fp16"),
    "quant": ("auto", "none", "nf4", "fp4", "int8", "fp8", "mxfp4", "gptq-4", "awq-4", *GGUF_QUANTS),
    "kv_dtype": ("auto", "fp16", "bf16", "fp8", "int8", "int4", *GGUF_CACHES),
    "cache": ("dynamic", "static", "offloaded", "quantized", "paged"),
    "attention": ("sdpa", "flash_attention_2", "eager"),
    "kernels": ("fused", "fallback"),
    "mixed_precision": ("no", "bf16", "fp16"),
    "adapter_dtype": ("fp32", "bf16", "fp16"),
    "compute_capability": ("6.0", "6.1", "7.0", "7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1"),
    "pp_schedule": ("1f1b", "gpipe"),
    "fsdp": ("full_shard", "shard_grad_op", "hybrid_shard"),
    "engine": ("transformers", "vllm", "sglang", "llama.cpp"),
    "method": ("auto", "formula", "simulate", "guide"),
}
"""Values of each option that takes one of a few words; the first is the default, unless None is."""

PATTERNS = ("lora_targets", "freeze")
"""Options that are names, or one regular expression: text without a comma is left as it is."""
COUNTS = (
    *(
        "ctx",
        "batch",
        "new_tokens",
        "grad_accum",
        "checkpoint_every",
        "lora_r",
        "gpus",
        "tp",
        "pp",
        "pp_chunks",
        "ep",
        "cp",
    ),
    *("max_num_seqs", "max_num_batched_tokens"),
)
"""Options that are whole numbers from 1 on."""
OFFLOADS = ("optimizer", "params", "activations", "experts", "layers", "optimizer=nvme", "params=nvme")
"""What may live in CPU memory; with `=nvme` beyond it, on a drive, as DeepSpeed offloads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One question about one model. None stands for "work it out from the model" (`ctx`, `phase`) or "none"."""

    mode: str = "inference"
    ctx: int | None = None
    batch: int = 1
    new_tokens: int | None = None
    phase: str | None = None
    padding: bool = False
    dtype: str = "auto"
    quant: str = "auto"
    double_quant: bool = True
    kv_dtype: str = "auto"
    cache: str = "dynamic"
    attention: str = "sdpa"
    kernels: str = "fused"
    compute_capability: str | None = None
    expandable_segments: bool = False
    optimizer: str = "adamw_torch_fused"
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    checkpoint_every: int = 1
    grad_accum: int = 1
    lora_r: int = 16
    lora_targets: str | tuple[str, ...] = "all-linear"
    lora_dropout: float = 0.0
    adapter_dtype: str = "fp32"
    rslora: bool = False
    dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    freeze: str | tuple[str, ...] = ()
    gpus: int | None = None
    tp: int = 1
    pp: int = 1
    pp_schedule: str = "1f1b"
    pp_chunks: int = 1
    ep: int = 1
    cp: int = 1
    sp: bool = False
    zero: int | None = None
    zero_bucket: str | None = None
    fsdp: str | None = None
    offload: tuple[str, ...] = ()
    resident_experts: int = 0
    cpu_memory: str | None = None
    engine: str = "transformers"
    gpu_memory_utilization: float | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    enforce_eager: bool = False
    mem_fraction_static: float | None = None
    n_gpu_layers: int | None = None
    n_cpu_moe: int | None = None
    override_tensor: str | None = None
    swa_full: bool = False
    mmproj: bool = False
    engine_args: str | None = None
    requests: str | None = None
    draft: str | None = None
    gpu: str | None = None
    max_ctx: bool = False
    max_batch: bool = False
    recommend: bool = False
    method: str = "auto"
    allow_unknown: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (value is None and _DEFAULTS.get(name) is None):
                shown = printable(str(value), 40)
                raise HfvramError("usage", f"{_flag(name)} {shown} is not one of {', '.join(choices)}")
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 10**9:
                raise HfvramError("usage", f"{_flag(name)} {value} is out of range: a whole number from 1 to 10^9")
        if self.ctx is not None and self.new_tokens is not None and self.new_tokens > self.ctx:
            raise HfvramError("usage", f"--new-tokens {self.new_tokens} does not fit in --ctx {self.ctx}")
        for name in ("max_ctx", "max_batch"):
            if getattr(self, name) and self.gpu is None:
                raise HfvramError("usage", f"{_flag(name)} needs --gpu: a name, a size such as 24GB, or local")
        if self.checkpoint_every > 1 and not self.gradient_checkpointing:
            raise HfvramError(
                "usage",
                f"--checkpoint-every {self.checkpoint_every} says which layers are recomputed: "
                "add --gradient-checkpointing",
            )
        for what in self.offload:
            if what not in OFFLOADS:
                raise HfvramError("usage", f"--offload {printable(what, 40)} is not one of {', '.join(OFFLOADS)}")
        if not 0 <= self.resident_experts <= 10**6:
            raise HfvramError(
                "usage", f"--resident-experts {self.resident_experts} is out of range: a whole number from 0"
            )
        for name in ("n_gpu_layers", "n_cpu_moe"):
            if (count := getattr(self, name)) is not None and not 0 <= count <= 10**6:
                raise HfvramError("usage", f"{_flag(name)} {count} is out of range: a whole number from 0")
        if self.cpu_memory is not None and not parse_bytes(self.cpu_memory):
            raise HfvramError("usage", f"--cpu-memory {printable(self.cpu_memory, 40)} is not a size such as 64GB")
        if not 0 <= self.lora_dropout < 1:
            raise HfvramError("usage", f"--lora-dropout {self.lora_dropout} is not in 0 ≤ p < 1")
        for name in ("gpu_memory_utilization", "mem_fraction_static"):
            if (share := getattr(self, name)) is not None and not 0 < share <= 1:
                raise HfvramError("usage", f"{_flag(name)} {share} is not in 0 < F ≤ 1")
        if self.requests is not None:
            lengths(self.requests)
        if self.zero_bucket not in (None, "auto") and not 1 <= (_float(str(self.zero_bucket)) or 0) <= 10**12:
            raise HfvramError(
                "usage", f"--zero-bucket {printable(str(self.zero_bucket), 40)} is neither auto nor elements, as in 2e8"
            )
        if self.zero is not None and self.zero not in (0, 1, 2, 3):
            raise HfvramError("usage", f"--zero {self.zero} is not one of 0, 1, 2, 3")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Request":
        """A request from JSON or keywords; numbers may be text (`"8k"`). Unknown names and wrong types are `usage`."""
        known = {}
        for name, value in values.items():
            if name not in _TYPES:
                valid = ", ".join(sorted(_TYPES))
                raise HfvramError("usage", f"unknown option {printable(name, 40)!r}: valid are {valid}")
            known[name] = _converted(name, value)
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """Every option, as JSON has it: `from_dict` of it is the same request."""
        values = ((name, getattr(self, name)) for name in _DEFAULTS)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values}

    def with_(self, **changes: Any) -> "Request":
        return replace(self, **changes)


def lengths(text: str) -> list[tuple[int, int]]:
    """Concurrent requests as (count, tokens) pairs. Raises `usage`.

    >>> lengths("512x2048,16x32k")
    [(512, 2048), (16, 32768)]
    """
    found = []
    for part in text.split(","):
        count, x, tokens = part.strip().partition("x")
        each = parse_tokens(tokens)
        if not (x and count.isascii() and count.isdigit() and each and 1 <= int(count) <= 10**6 and 0 < each <= 10**9):
            shown = printable(part.strip(), 40)
            raise HfvramError("usage", f"--requests {shown!r} is not count × tokens, as in 512x2048,16x32768")
        found.append((int(count), each))
    return found


_DEFAULTS = {f.name: None if f.default is MISSING else f.default for f in fields(Request)}
_TYPES: dict[str, tuple[type, ...]] = {k: get_args(t) or (t,) for k, t in get_type_hints(Request).items()}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _converted(name: str, value: Any) -> Any:
    types = _TYPES[name]
    if value is None and (type(None) in types or _DEFAULTS[name] is None):
        return None
    if isinstance(_DEFAULTS[name], tuple) or name in PATTERNS:
        if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
            return tuple(value)
        if isinstance(value, str):
            return value if name in PATTERNS and value and "," not in value else tuple(v for v in value.split(",") if v)
    elif bool in types:
        if isinstance(value, bool):
            return value
    elif int in types:
        number = parse_tokens(value) if isinstance(value, str) else value
        if isinstance(number, int) and not isinstance(number, bool):
            return number
    elif float in types:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str) and (number := _float(value)) is not None:
            return number
    elif isinstance(value, str):
        return value.upper() if name == "quant" and value.upper() in GGUF_QUANTS else value
    wants = {bool: "true or false", int: "a whole number", float: "a number"}
    want = next((words for kind, words in wants.items() if kind in types), "text")
    raise HfvramError("usage", f"{_flag(name)} {printable(repr(value), 60)} is not {want}")


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
