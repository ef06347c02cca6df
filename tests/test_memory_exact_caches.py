"""Transformers' offloaded and quantized caches, run by its own code on meta."""

from typing import Any

import pytest

from hfvram.errors import HfvramError
from hfvram.memory.allocator import GRAPHS, PREFETCH, replay
from hfvram.memory.timeline import Timeline
from hfvram.request import Request

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hfvram.memory.exact.caches import QuantoLayer  # noqa: E402
from hfvram.memory.exact.simulate import simulate  # noqa: E402
from hfvram.memory.exact.tracker import Tracker  # noqa: E402
from hfvram.memory.timeline import Standing  # noqa: E402

pytestmark = pytest.mark.slow

LAYERS = 6
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
ROW = 2 * 4 * 64 * 2
"""Bytes of a token's keys, or values, in one layer: 2 sequences, 4 heads of 64, bf16."""


def run(cache: str, ctx: int = 4096, new_tokens: int = 8, **config: Any) -> Timeline:
    options: dict[str, Any] = {"phase": "generate", "dtype": "bf16", "quant": "none"}
    asked = Request(ctx=ctx, new_tokens=new_tokens, batch=2, cache=cache, **options)
    return simulate({**LLAMA, **config}, None, asked)


def cached_at(t: Timeline, event: int) -> int:
    return sum(t.sizes[h] for h in t.live(event) if t.sizes[h] in range(4088 * ROW, 4096 * ROW))


def test_an_offloaded_cache_never_holds_more_than_two_layers_and_what_grows() -> None:
    """Keys and values of the layer at work, old and new for a moment, and of the next one that is fetched."""
    t, dynamic = run("offloaded"), run("dynamic")
    assert max(cached_at(dynamic, i) for i in range(0, len(dynamic.events), 7)) >= 2 * LAYERS * 4088 * ROW
    assert max(cached_at(t, i) for i in range(0, len(t.events), 7)) <= 6 * 4095 * ROW
    assert t.cache_bytes == LAYERS * 2 * 4095 * ROW  # all of it, wherever it is
    assert [(place, n) for place, _, n in t.elsewhere] == [("cpu", (LAYERS - 1) * 2 * 4095 * ROW)]


def test_what_is_fetched_comes_from_the_pool_of_its_own_stream() -> None:
    t = run("offloaded")
    assert set(t.streams.values()) == {PREFETCH}
    fetched = [t.sizes[h] for h in t.streams]
    assert len(fetched) >= 2 * LAYERS * 6  # keys and values of each layer in most of the seven steps
    assert set(fetched) <= {n * ROW for n in range(4088, 4096)}


def test_sliding_layers_run_offloaded_too() -> None:
    config = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}
    assert replay(run("offloaded", 512, **config)).allocated_bytes > 0


def test_a_long_generation_skips_the_middle() -> None:
    short, long = run("offloaded", new_tokens=8), run("offloaded", new_tokens=64)
    assert len(long.events) < 5 * len(short.events)
    assert set(long.streams.values()) == {PREFETCH}


def test_a_quantized_cache_keeps_four_bits_a_value_and_two_numbers_a_group() -> None:
    """4,088 prompt tokens packed: 4 of 16 bits, and of each 64 values a scale and a shift; seven tokens as they are."""
    prompt = LAYERS * 2 * 4088 * ROW
    packed = prompt * 4 // 16 + prompt // 64 * 2
    assert run("quantized").cache_bytes == packed + LAYERS * 2 * 7 * ROW


def test_after_128_tokens_the_quantized_cache_packs_them_too() -> None:
    """3,896 prompt tokens, 199 more: packed are those up to the last time that 128 were full."""
    tokens = LAYERS * 2 * ROW
    t = run("quantized", new_tokens=200)
    for full in range(3896, 4096):
        if t.cache_bytes == tokens * full // 4 + tokens * full // 32 + tokens * (4095 - full):
            assert 4095 - full < 128
            return
    raise AssertionError(t.cache_bytes)


def test_quanto_is_written_as_it_stores() -> None:
    """optimum-quanto 0.2.7 itself on CPU tensors of these shapes: 36,864 bytes after the prompt of 64 tokens, 38,912
    after one more, 54,272 after 20 with a residual length of 16.
    """
    for steps, stored in ((0, 36_864), (1, 38_912), (20, 54_272)):
        t = Timeline(Standing(()))
        layer = QuantoLayer(4, 0, 0, 64, 16)
        with torch.no_grad(), Tracker(t):
            for tokens in (64, *[1] * steps):
                k = torch.empty((2, 4, tokens, 64), dtype=torch.bfloat16, device="meta")
                layer.update(k, k)
                del k
        assert sum(t.sizes[h] for h in t.live(len(t.events))) == stored


def test_a_model_with_windows_has_no_quantized_cache() -> None:
    config = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}
    with pytest.raises(HfvramError, match="--cache quantized") as caught:
        run("quantized", 512, **config)
    assert caught.value.kind == "usage"


def test_groups_that_do_not_divide_are_refused() -> None:
    layer = QuantoLayer()
    with pytest.raises(ValueError, match="not divisible"):
        layer._quantize(torch.empty((1, 1, 1, 80), device="meta"), 0)


def test_a_static_cache_decodes_in_the_pool_of_cuda_graphs() -> None:
    """The repeated keys and values of one step do not come from what the prefill freed."""
    t = run("static")
    assert set(t.streams.values()) == {GRAPHS}
    decode = next(at for at, phase in t.marks if phase == "decode")
    first = len([e for e in t.events[:decode] if e >= 0])
    assert all(t.sizes[h] < 1 << 20 for h in t.streams if h < first)  # the first token is chosen within the loop
    assert all(h in t.streams for h in range(first, len(t.sizes)) if t.sizes[h] >= 1 << 20)
    apart = replay(t).reserved_bytes
    t.streams.clear()
    assert apart - replay(t).reserved_bytes >= 2 * 2 * 4095 * ROW - (20 << 20)


def test_bitsandbytes_does_not_compile() -> None:
    options: dict[str, Any] = {"phase": "generate", "dtype": "bf16", "quant": "nf4", "cache": "static"}
    assert not simulate(LLAMA, None, Request(ctx=64, new_tokens=4, **options)).streams
