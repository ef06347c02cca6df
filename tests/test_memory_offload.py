"""Layers or experts in CPU memory: what stays, what comes, by hand."""

from typing import Any

import pytest

import hfvram
from hfvram.errors import HfvramError
from hfvram.memory.formula import timeline
from hfvram.memory.timeline import Timeline
from hfvram.model.infer import infer
from hfvram.request import Request

MOE: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
EXPERT = 3 * 64 * 96 * 2
"""Gate, up and down of one expert in bf16."""


def offloaded(ctx: int = 64, **options: Any) -> Timeline:
    request = {"ctx": ctx, "new_tokens": 4, "phase": "generate", "dtype": "bf16", "quant": "none"} | options
    return timeline(infer(MOE), Request.from_dict(request))


def standing(t: Timeline) -> int:
    return sum(n for n, tag in t.standing.tensors if tag.category == "weights")


def brought(t: Timeline) -> list[int]:
    return [n for n, tag in zip(t.sizes, t.tags, strict=True) if "brought" in tag.name]


@pytest.mark.parametrize(("resident", "away"), [(0, 8), (3, 5), (7, 1)])
def test_experts_stand_in_cpu_memory_but_for_the_resident_ones(resident: int, away: int) -> None:
    whole, t = offloaded(), offloaded(offload=["experts"], resident_experts=resident)
    ((place, _, nbytes),) = t.elsewhere
    assert (place, nbytes) == ("cpu", 3 * away * EXPERT)
    assert standing(t) + nbytes == standing(whole)
    # 60 tokens of prompt choose 120 experts: all of a layer's; one token while decoding chooses two
    steps = brought(t)
    assert steps[:3] == [away * EXPERT] * 3
    assert set(steps[3:]) == {min(away, 2) * EXPERT}


def test_a_short_prompt_needs_few_experts() -> None:
    assert brought(offloaded(ctx=6, offload=["experts"]))[0] == 2 * 2 * EXPERT


def test_layers_come_one_module_at_a_time() -> None:
    whole, t = offloaded(), offloaded(offload=["layers"])
    # Embedding, head and the last norm stay.
    assert standing(t) == (2 * 256 * 64 + 64) * 2
    assert standing(t) + t.elsewhere[0][2] == standing(whole)
    assert set(brought(t)) == {8 * EXPERT}  # the experts of a layer are one module


def test_what_is_brought_is_gone_after_its_layer() -> None:
    t = offloaded(offload=["experts"])
    live = most = 0
    for event in t.events:
        handle = event if event >= 0 else ~event
        if "brought" in t.tags[handle].name:
            live += 1 if event >= 0 else -1
            most = max(most, live)
    assert (live, most) == (0, 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"offload": ["experts", "layers"]}, "valid is one of them|not supported"),
        ({"offload": ["experts"], "resident_experts": 8}, "valid are 0 to 7"),
        ({"resident_experts": 2}, "goes with --offload experts"),
        ({"offload": ["experts"], "mode": "train"}, "offload experts"),
        ({"offload": ["optimizer"]}, "offload optimizer"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_usage(options: dict[str, Any], said: str) -> None:
    with pytest.raises(HfvramError, match=said) as caught:
        hfvram.estimate("mistralai/Mixtral-8x7B-v0.1", offline=True, method="formula", **options)
    assert caught.value.kind == "usage"


def test_a_dense_model_has_no_experts_to_offload() -> None:
    with pytest.raises(HfvramError, match="has none, valid is layers"):
        hfvram.estimate("gpt2", offload=["experts"], offline=True)


def test_experts_that_are_offloaded_are_a_way_to_fit() -> None:
    answer = hfvram.estimate("mistralai/Mixtral-8x7B-v0.1", gpu="24GB", offline=True)
    assert answer.fit
    ways = {way.change: way.device_bytes for way in answer.fit.ways}
    assert ways["--offload experts"] <= answer.fit.capacity_bytes
    assert answer.cpu_bytes == 0
    again = hfvram.estimate("mistralai/Mixtral-8x7B-v0.1", offload=["experts"], offline=True)
    assert again.device_bytes == ways["--offload experts"]
    assert again.cpu_bytes == 32 * 8 * 3 * 4096 * 14336 * 2
