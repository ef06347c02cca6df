"""Inference by transformers' own generate: caches, masks, and an end that no token tells."""

from typing import Any

import pytest

from hfvram.memory.allocator import replay
from hfvram.memory.timeline import Timeline
from hfvram.request import Request

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hfvram.memory.exact.inference import reachable  # noqa: E402
from hfvram.memory.exact.simulate import simulate  # noqa: E402

pytestmark = pytest.mark.slow

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 2,
}


def run(config: dict[str, Any] = TINY, **options: Any) -> Timeline:
    asked = {"ctx": 64, "batch": 2, "dtype": "bf16", "phase": "generate", "new_tokens": 5, "quant": "none"} | options
    return simulate(config, None, Request.from_dict(asked))


def test_a_dynamic_cache_holds_all_but_the_last_token() -> None:
    # layers · keys and values · batch · heads · head size · tokens · bytes
    assert run().cache_bytes == 2 * 2 * 2 * 2 * 16 * 63 * 2


def test_a_static_cache_holds_them_from_the_start() -> None:
    counters = 2 * 8  # how many tokens it holds, for each layer
    assert run(cache="static").cache_bytes == 2 * 2 * 2 * 2 * 16 * 63 * 2 + counters


def test_a_window_keeps_no_more_than_itself() -> None:
    config = TINY | {"model_type": "mistral", "sliding_window": 16}
    counters = 2 * 8  # how many tokens it has seen, for each layer
    assert run(config).cache_bytes == 2 * 2 * 2 * 2 * 16 * 16 * 2 + counters


def test_prefill_and_encode_are_one_pass() -> None:
    prefill = run(phase="prefill")
    assert [name for _, name in prefill.marks] == ["prefill"]
    assert prefill.cache_bytes == 2 * 2 * 2 * 2 * 16 * 64 * 2
    bert = {"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    encode = run(bert | {"intermediate_size": 128, "vocab_size": 512}, phase="encode")
    assert [name for _, name in encode.marks] == ["encode"]
    assert encode.cache_bytes == 0


def test_padding_adds_a_mask_of_every_pair() -> None:
    wide = {"ctx": 1024, "batch": 4}
    padded, plain = run(padding=True, **wide), run(**wide)
    prompt = 1024 - 5
    masks = [n for n in padded.sizes if n == 4 * prompt * prompt]
    assert masks
    assert 4 * prompt * prompt not in plain.sizes
    assert replay(padded).allocated_bytes > replay(plain).allocated_bytes


def test_every_new_token_is_a_pass() -> None:
    def logits(new: int) -> int:
        return sum(n == 2 * 512 * 4 for n in run(new_tokens=new).sizes)

    assert logits(6) - logits(5) == logits(5) - logits(4) > 0


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_long_generations_are_shortened_but_end_alike(kind: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TINY | {"model_type": kind, "sliding_window": 128}
    short = run(config, ctx=256, new_tokens=100, cache=cache)
    monkeypatch.setattr("hfvram.memory.exact.inference.FEW", 1000)
    whole = run(config, ctx=256, new_tokens=100, cache=cache)
    assert len(short.events) < len(whole.events) / 3
    assert short.cache_bytes == whole.cache_bytes
    assert replay(short).allocated_bytes == pytest.approx(replay(whole).allocated_bytes, rel=1e-3)


def test_states_do_not_grow_over_a_long_generation() -> None:
    config = {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
    assert run(config, ctx=256, new_tokens=200).cache_bytes == run(config).cache_bytes


def test_a_single_token_is_a_prefill() -> None:
    assert run(ctx=1, new_tokens=None).cache_bytes == run(ctx=1, new_tokens=None, phase="prefill").cache_bytes > 0


def test_a_cache_that_is_switched_off_is_none() -> None:
    config = {"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 512, "use_cache": False}
    assert run(config).cache_bytes == 0


def test_an_encoder_decoder_keeps_two_caches() -> None:
    config = {"model_type": "t5", "d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2}
    config |= {"vocab_size": 512, "decoder_start_token_id": 0}
    # five tokens of the decoder, the last of which is not fed back; the cross cache holds the encoder's 59
    both = (5 + 59) * 2 * 2 * 2 * 4 * 16 * 2
    assert run(config).cache_bytes == both


def test_storages_are_found_once() -> None:
    a = torch.empty(4, device="meta")
    assert [t.numel() for t in reachable({"x": [a, a[1:]], "y": (a, {"z": None})})] in ([4], [3])


T5 = {"model_type": "t5", "d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2, "vocab_size": 512}


def test_encoding_is_the_encoders_pass_and_a_prefill_adds_a_token_of_the_decoder() -> None:
    assert run(T5, phase="encode", new_tokens=None).cache_bytes == 0
    both = (1 + 64) * 2 * 2 * 2 * 4 * 16 * 2
    assert run(T5, phase="prefill", new_tokens=None).cache_bytes == both
