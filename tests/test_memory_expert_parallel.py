"""Experts shared out over ranks by formula: what is held, sent and reduced, by hand."""

from typing import Any

import pytest
from test_memory_training_moe import LATENT, MIXTRAL, THIN
from test_memory_training_train import LLAMA, live

import hfvram
from hfvram.answer.supported import check
from hfvram.errors import HfvramError
from hfvram.memory import formula
from hfvram.memory.timeline import Timeline
from hfvram.model.infer import infer
from hfvram.request import Request

MODELS: dict[str, dict[str, Any]] = {
    "mixtral": MIXTRAL,
    "qwen3_moe": THIN | {"model_type": "qwen3_moe"},
    "deepseek_v3": LATENT | {"model_type": "deepseek_v3"},
}
EXPERT = 3 * 64 * 96
"""Parameters of one of Mixtral's 4 experts: h 64, f 96."""


def asked(**options: Any) -> Request:
    base = {"mode": "train", "ctx": 32, "dtype": "bf16", "quant": "none", "method": "formula", "optimizer": "sgd"}
    return Request.from_dict(base | options)


def formed(config: dict[str, Any], **options: Any) -> Timeline:
    (share,) = formula.shares(infer(config), asked(**options))
    return share.timeline


def weights(t: Timeline) -> int:
    return sum(n for n, tag in t.standing.tensors if tag.category == "weights")


@pytest.mark.parametrize("ep", [2, 4])
def test_a_rank_holds_its_experts_and_all_else(ep: int) -> None:
    whole, part = formed(MIXTRAL), formed(MIXTRAL, ep=ep)
    gone = 2 * (4 - 4 // ep) * EXPERT  # of two layers
    assert weights(whole) - weights(part) == 2 * gone
    assert whole.gradients_bytes - part.gradients_bytes == 2 * gone
    assert part.trainable_parameters == whole.trainable_parameters


@pytest.mark.parametrize("name", MODELS)
def test_ranks_add_up_to_the_model(name: str) -> None:
    experts = 2 * sum(p.numel for p in infer(MODELS[name]).all_params if p.kind == "experts")
    whole = weights(formed(MODELS[name]))
    dense = whole - experts
    for ep in (2, 4):
        assert ep * (weights(formed(MODELS[name], ep=ep)) - dense) == experts


@pytest.mark.parametrize("ep", [2, 4])
def test_tokens_that_are_exchanged(ep: int) -> None:
    """32 tokens, each sent to 2 of 4 experts: 64 rows of h 64 there and back, in each of 2 layers. What comes back is
    kept to give the choice's weights a gradient, as the experts' own output is without --ep. What arrives is kept where
    it needs no sorting (one expert a rank); else the sorted rows are."""
    t, rows = formed(MIXTRAL, ep=ep), 64 * 64 * 2
    made = [t.sizes[h] for h in t.events if h >= 0 and t.tags[h].name.startswith("tokens exchanged")]
    assert made == [rows] * (2 * 2 * 2)  # two steps
    kept, alone = (
        {k.removesuffix(" (saved activations)"): n for k, n in live(x, "backward").items()}
        for x in (t, formed(MIXTRAL))
    )
    assert kept["tokens exchanged with other ranks"] == (4 if ep == 4 else 2) * rows
    assert alone["experts, tokens by expert"] == 4 * rows
    assert kept.get("experts, tokens by expert", 0) == (0 if ep == 4 else 2 * rows)


def test_gradients_of_experts_are_reduced_over_those_that_hold_the_same() -> None:
    dense = formed(MIXTRAL).gradients_bytes - 2 * 2 * 4 * EXPERT
    for gpus, ep, experts in ((4, 4, 0), (2, 2, 0), (8, 4, 1), (4, 2, 2)):
        found = live(formed(MIXTRAL, ep=ep, gpus=gpus), "backward")
        assert found["gradients in DDP's buckets"] == dense + 2 * 2 * experts * EXPERT


def test_more_ranks_never_hold_more() -> None:
    peaks = [formed(MODELS["qwen3_moe"], ep=ep, gpus=8).fullest_bytes() for ep in (2, 4, 8)]
    assert peaks == sorted(peaks, reverse=True)


def test_layers_that_repeat_are_counted_as_often_as_they_stand() -> None:
    two, eight, fourteen = (formed(MIXTRAL | {"num_hidden_layers": n}, ep=2) for n in (2, 8, 14))
    assert fourteen.gradients_bytes - eight.gradients_bytes == eight.gradients_bytes - two.gradients_bytes
    assert fourteen.fullest_bytes() - eight.fullest_bytes() > 0


def test_the_answer_says_what_is_assumed() -> None:
    found = hfvram.estimate("mistralai/Mixtral-8x7B-v0.1", offline=True, mode="train", ctx=64, ep=8)
    assert found.method == "formula"
    assert found.request.gpus == 8
    assert any("routing is taken to be balanced" in said for said in found.warnings)
    assert "±10 %" in found.interval.basis


@pytest.mark.parametrize(
    ("config", "ep", "said"),
    [
        (LLAMA, 2, "--ep 2 splits experts, LlamaForCausalLM has none: valid is --ep 1"),
        (MIXTRAL, 3, "--ep 3 does not divide 4 experts: valid are 1, 2, 4"),
        (MIXTRAL, 8, "--ep 8 does not divide 4 experts: valid are 1, 2, 4"),
    ],
)
def test_splits_that_are_not_possible(config: dict[str, Any], ep: int, said: str) -> None:
    with pytest.raises(HfvramError, match=said) as caught:
        formed(config, ep=ep)
    assert caught.value.kind == "usage"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fsdp": "full_shard", "gpus": 8}, "--fsdp full_shard is not supported yet"),
        ({"zero": 1}, "--zero 1 is not supported yet"),
        ({"pp": 2}, "--pp 2 with --ep 2 is not supported yet"),
        ({"method": "simulate"}, "valid is --method formula"),
        ({"mode": "lora"}, "valid is --mode train"),
    ],
    ids=str,
)
def test_what_it_does_not_go_with(options: dict[str, Any], said: str) -> None:
    with pytest.raises(HfvramError, match=said):
        check(asked(ep=2, **options))
