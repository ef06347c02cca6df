"""Quantized and offloaded caches by hand, and against transformers' own code on meta."""

import importlib.util
from typing import Any

import pytest
from small import LLAMA

from hfvram.memory.allocator import PREFETCH
from hfvram.memory.formula import timeline
from hfvram.memory.packed_cache import AWAY, packed_tokens
from hfvram.memory.timeline import Timeline
from hfvram.model.infer import infer
from hfvram.request import Request

CONFIG = LLAMA | {"torch_dtype": "bfloat16", "num_hidden_layers": 3, "max_position_embeddings": 4096}
ROW = 2 * 64 * 2
"""Bytes of a token's keys, or values, in one layer: 2 heads of 64, bf16."""


def asked(**options: Any) -> Request:
    given = {"phase": "generate", "dtype": "bf16", "quant": "none", "ctx": 1024, "new_tokens": 8, **options}
    return Request(**given)


def run(**options: Any) -> Timeline:
    return timeline(infer(CONFIG), asked(**options))


def test_packed_are_the_prompt_and_every_128_tokens_after_it() -> None:
    assert [packed_tokens(1000 + n, n) for n in (0, 127, 128, 300)] == [(1000, 0), (1000, 127), (1128, 0), (1256, 44)]


@pytest.mark.parametrize(("bits", "new"), [("int4", 8), ("int8", 8), ("int4", 200), ("int4", 129), ("int4", 1)])
def test_a_quantized_cache(bits: str, new: int) -> None:
    """4 or 8 of 16 bits, and of each 64 values a scale and a shift in bf16; the recent tokens as they are."""
    packed = 1024 - new + (new - 1) // 128 * 128
    recent = (new - 1) % 128
    each = ROW * (4 if bits == "int4" else 8) // 16 + ROW // 64 * 2
    t = run(cache="quantized", kv_dtype=bits, new_tokens=new)
    assert t.cache_bytes == 3 * 2 * (packed * each + recent * ROW)
    assert not t.elsewhere


def test_an_offloaded_cache_is_in_cpu_memory_but_for_the_layer_that_is_next() -> None:
    t = run(cache="offloaded")
    whole = 3 * 2 * 1023 * ROW
    assert t.cache_bytes == whole
    assert t.elsewhere == [("cpu", AWAY, whole * 2 // 3)]
    assert set(t.streams.values()) == {PREFETCH}
    # keys and values of the first layer after the prefill, and of all three in the first step and in the last
    assert len(t.streams) == 2 * (1 + 2 * 3)


def test_both_take_less_than_a_dynamic_cache() -> None:
    dynamic = run(batch=16).fullest_bytes()
    assert run(batch=16, cache="quantized").fullest_bytes() < dynamic
    assert run(batch=16, cache="offloaded").fullest_bytes() < dynamic


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers")
@pytest.mark.parametrize("cache", ["quantized", "offloaded"])
@pytest.mark.parametrize("options", [{}, {"batch": 3, "new_tokens": 200}, {"new_tokens": 129, "attention": "eager"}])
def test_both_engines_agree(cache: str, options: dict[str, Any]) -> None:
    from hfvram.memory.exact.simulate import simulate

    request = asked(cache=cache, **options)
    ours, theirs = timeline(infer(CONFIG), request), simulate(CONFIG, None, request)
    assert ours.cache_bytes == theirs.cache_bytes
    assert [(place, n) for place, _, n in ours.elsewhere] == [(place, n) for place, _, n in theirs.elsewhere]
    assert ours.fullest_bytes() == pytest.approx(theirs.fullest_bytes(), rel=0.005)
