"""What a configuration asks of its cache: dtypes of keys and values, and of recurrent states."""

from collections.abc import Mapping
from typing import Any

from hfvram.model.config import Config
from hfvram.model.rope import text_section

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def cache_dtype(values: Mapping[str, Any]) -> str | None:
    """`fp8` where the checkpoint brings scales for a cache in fp8 (compressed-tensors, ModelOpt), else None.

    >>> cache_dtype({"quantization_config": {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}})
    'fp8'
    """
    for holder in (Config(values), text_section(values)):
        section = holder.section("quantization_config") or Config({})
        inner = section.section("quantization") or section
        scheme = section.get("kv_cache_scheme")
        if isinstance(scheme, Mapping) and scheme.get("num_bits") == 8 and scheme.get("type") == "float":
            return "fp8"
        if any("FP8" in str(s.get("kv_cache_quant_algo") or "").upper() for s in (section, inner)):
            return "fp8"
    return None


def state_dtype(values: Mapping[str, Any], *names: str) -> str | None:
    """The dtype of recurrent states by the first of these keys (`mamba_ssm_dtype` of Qwen3.5, say), or None."""
    value = text_section(values).get(*names)
    return DTYPES.get(value) if isinstance(value, str) else None
