"""Which of transformers' caches a model can have, in which numbers, and by which engine that is answered."""

from typing import Final

from hfvram.errors import HfvramError
from hfvram.model.architecture import Architecture
from hfvram.model.layers import Attention
from hfvram.request import Request

MOVED: Final = ("offloaded", "quantized")
"""Caches that are moved or packed while `generate` runs."""
BITS: Final = ("int4", "int8")
"""What a quantized cache may be in: by optimum-quanto, its default, or by HQQ."""


def has_formula(architecture: Architecture) -> bool:
    """Whether the formula knows how such a cache of this model is moved: one of full attention alone."""
    mixers = [m for layer in architecture.text.layers for m in layer.mixers]
    plain = all(isinstance(m, Attention) and m.kind == "full_attention" and m.cached and not m.window for m in mixers)
    return architecture.task == "causal" and bool(mixers) and plain and architecture.generates_cache


def check(architecture: Architecture, request: Request, phase: str, dtype: str) -> str:
    """The numbers that the cache is kept in. Raises `usage` for caches and numbers that there are not."""
    cache, asked = request.cache, request.kv_dtype
    if request.mode != "inference":
        return dtype
    if cache in MOVED and phase != "generate":
        raise HfvramError("usage", f"--cache {cache} goes with --phase generate")
    if phase == "encode" and cache == "static":
        raise HfvramError("usage", "--cache static goes with --phase generate")
    if cache in MOVED and request.method != "simulate" and not has_formula(architecture):
        raise HfvramError(
            "usage",
            f"--cache {cache} by formula is for full attention alone: --method simulate runs the model's code",
        )
    if cache == "quantized":
        return _quantized(architecture, request)
    if asked in BITS:
        raise HfvramError("usage", f"--kv-dtype {asked} goes with --cache quantized")
    if asked not in ("auto", dtype):
        why = f"transformers keeps the cache in the computing dtype, here {dtype}"
        raise HfvramError("usage", f"--kv-dtype {asked} is not supported: {why}")
    return dtype


def _quantized(architecture: Architecture, request: Request) -> str:
    bits = "int4" if request.kv_dtype == "auto" else request.kv_dtype
    if bits not in BITS:
        raise HfvramError("usage", f"--kv-dtype {bits} with --cache quantized: valid are {' and '.join(BITS)}")
    if bits == "int8" and request.method == "simulate":
        raise HfvramError("usage", "--kv-dtype int8 with --method simulate: valid is int4, or --method formula")
    part = architecture.attention
    if part and part.kv_heads * part.head_dim % 64:
        size = part.kv_heads * part.head_dim
        raise HfvramError("usage", f"--cache quantized: {size} numbers of a token are not divisible by groups of 64")
    return bits
