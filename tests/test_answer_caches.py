"""Caches and their numbers: what goes together, and what a model can't have."""

from typing import Any

import pytest
from small import BART, LLAMA

from hfvram.answer.caches import check, has_formula
from hfvram.errors import HfvramError
from hfvram.model.architecture import Architecture
from hfvram.model.infer import infer
from hfvram.request import Request

PLAIN = infer(LLAMA)
WINDOWED = infer(LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64})


def kept(a: Architecture = PLAIN, phase: str = "generate", **options: Any) -> str:
    return check(a, Request(**options), phase, "bf16")


def refusal(a: Architecture = PLAIN, phase: str = "generate", **options: Any) -> str:
    with pytest.raises(HfvramError) as caught:
        kept(a, phase, **options)
    assert caught.value.kind == "usage"
    return caught.value.message


def test_numbers_of_a_cache() -> None:
    assert kept() == kept(cache="offloaded") == kept(kv_dtype="bf16") == "bf16"
    assert kept(cache="quantized") == "int4"
    assert kept(cache="quantized", kv_dtype="int8") == "int8"
    assert "goes with --cache quantized" in refusal(kv_dtype="int8")
    assert "goes with --cache quantized" in refusal(kv_dtype="int4", cache="static")
    assert "computing dtype, here bf16" in refusal(kv_dtype="fp8")
    assert "valid are int4 and int8" in refusal(cache="quantized", kv_dtype="fp8")
    assert "valid is int4" in refusal(cache="quantized", kv_dtype="int8", method="simulate")


def test_models_that_have_no_such_cache_by_formula() -> None:
    assert has_formula(PLAIN)
    for a in (WINDOWED, infer(BART | {"model_type": "bart"})):
        assert not has_formula(a)
        assert "--method simulate" in refusal(a, cache="offloaded")
        assert kept(a, cache="offloaded", method="simulate") == "bf16"
    odd = infer(LLAMA | {"head_dim": 20})  # 2 heads of 20
    assert "40 numbers of a token" in refusal(odd, cache="quantized")


def test_phases() -> None:
    assert "goes with --phase generate" in refusal(phase="prefill", cache="quantized")
    assert "goes with --phase generate" in refusal(phase="encode", cache="static")
    assert kept(phase="prefill", cache="static") == "bf16"
