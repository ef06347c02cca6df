"""Encoder-decoders: both caches, the encoder's own length, and the bias of T5, by hand arithmetic."""

from typing import Any

import pytest
import small

from hfvram.answer.resolve import resolve
from hfvram.memory.allocator import replay
from hfvram.memory.formula import timeline
from hfvram.memory.timeline import Timeline
from hfvram.model.config import Config
from hfvram.model.families import reader
from hfvram.request import Request

T5 = small.T5 | {"model_type": "t5"}
BART = small.BART | {"model_type": "bart", "max_position_embeddings": 2000}
WHISPER = BART | {"model_type": "whisper", "max_source_positions": 30, "max_target_positions": 20, "num_mel_bins": 8}


def written(config: dict[str, Any], **request: Any) -> Timeline:
    read = reader(config["model_type"])
    assert read is not None
    architecture = read(Config(config), None)
    return timeline(architecture, resolve(architecture, Request(dtype="bf16", **request))[0])


def live_bytes(t: Timeline, name: str) -> int:
    """Bytes of this name at the fullest moment of them."""
    now = most = 0
    for event in t.events:
        handle = event if event >= 0 else ~event
        if t.tags[handle].name == name:
            now += t.sizes[handle] if event >= 0 else -t.sizes[handle]
            most = max(most, now)
    return most


@pytest.mark.parametrize("config", [T5, BART])
def test_cache_of_both_attentions(config: dict[str, Any]) -> None:
    # Keys and values, 3 layers, 32 wide, bf16: 40 tokens of the encoder, and the 8 that the decoder was fed.
    t = written(config, ctx=48, batch=5, new_tokens=8)
    assert t.cache_bytes == 2 * 3 * 32 * 2 * 5 * (40 + 8)


def test_prefill_holds_the_first_token() -> None:
    assert written(BART, ctx=48, phase="prefill").cache_bytes == 2 * 3 * 32 * 2 * (48 + 1)


def test_static_cache_is_there_from_the_first_step() -> None:
    # As the dynamic one at its end, and two counters of 8 bytes a layer.
    t = written(BART, ctx=48, new_tokens=8, cache="static")
    assert t.cache_bytes == 2 * 3 * 32 * 2 * (40 + 8) + 2 * 3 * 8


def test_whisper_encodes_its_30_seconds_whatever_the_context() -> None:
    short, long = (written(WHISPER, ctx=n, new_tokens=4) for n in (8, 20))
    assert live_bytes(short, "features of the sound") == live_bytes(long, "features of the sound") == 8 * 60 * 2
    # 30 frames for the cross attention, and every token of the context but the last, which is not fed back.
    assert long.cache_bytes == 2 * 3 * 32 * 2 * (30 + 19)


def test_t5_bias_is_kept_and_copied_for_the_kernel() -> None:
    # 4 heads, 512 by 512, bf16, once; the kernel's copy has 520 columns. Batch does not multiply them.
    t = written(T5, ctx=520, batch=3)
    assert live_bytes(t, "relative position bias") == 4 * 512 * 512 * 2
    assert live_bytes(t, "attention mask as a bias") == 4 * 512 * 520 * 2


def test_padding_gives_each_sequence_its_bias() -> None:
    t = written(T5, ctx=520, batch=3, padding=True)
    assert live_bytes(t, "attention mask as a bias") == 3 * 4 * 512 * (512 + 520) * 2
    assert live_bytes(written(BART, ctx=520, batch=3, padding=True), "attention mask") == 3 * 512 * 512


def test_umt5_computes_a_bias_in_each_layer() -> None:
    # All that is freed is computed again: three times what T5 allocates, never two at once.
    t, once = written(T5 | {"model_type": "umt5"}, ctx=520), written(T5, ctx=520)
    name = "relative position bias"
    assert live_bytes(t, name) == live_bytes(once, name)
    assert sum(tag.name == name for tag in t.tags) == 3 * sum(tag.name == name for tag in once.tags) == 3


def test_encode_is_the_encoder_alone() -> None:
    t = written(BART, ctx=40, phase="encode")
    assert t.cache_bytes == 0
    assert not any(tag.name == "logits" for tag in t.tags)
    assert replay(t).allocated_bytes < replay(written(BART, ctx=48, new_tokens=8)).allocated_bytes


@pytest.mark.parametrize("config", [T5, BART, WHISPER])
def test_what_is_allocated_is_freed_but_inputs_caches_and_output(config: dict[str, Any]) -> None:
    t = written(config, ctx=16, new_tokens=8)
    left = {t.tags[handle].name for handle in t.live(len(t.events))}
    assert left <= {
        "token ids, mask and positions",
        "features of the sound",
        "cuBLAS workspace",
        "cuBLASLt workspace",
        "keys and values",
        "hidden states",
    }
