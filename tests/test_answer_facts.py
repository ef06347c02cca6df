"""Headline facts of models, as published."""

from typing import Any

import pytest

from hfvram.answer.facts import facts, guide_items
from hfvram.answer.question import Session
from hfvram.model.identify import identify
from hfvram.read.checkpoint import Adapter, Checkpoint
from hfvram.read.open import read_checkpoint
from hfvram.request import Request

PUBLISHED: dict[str, dict[str, Any]] = {
    "mistralai/Mixtral-8x7B-v0.1": {
        "layers": 32,
        "hidden_size": 4096,
        "attention_heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "experts": 8,
        "experts_per_token": 2,
        "state_size": None,
        "dtype": "bf16",
        "model_type": "mixtral",
        "architecture": "MixtralForCausalLM",
        "layer_kinds": {"full_attention": 32, "moe": 32},
    },
    "deepseek-ai/DeepSeek-V3": {
        "layers": 61,
        "attention_heads": 128,
        "kv_heads": 128,
        "head_dim": 192,
        "experts": 256,
        "experts_per_token": 8,
    },
    "state-spaces/mamba-130m-hf": {
        "layers": 24,
        "attention_heads": None,
        "kv_heads": None,
        "head_dim": None,
        "experts": None,
        "state_size": 16,
        "layer_kinds": {"mamba": 24},
    },
    "ai21labs/Jamba-v0.1": {"layers": 32, "attention_heads": 32, "kv_heads": 8, "experts": 16, "state_size": 16},
    "Qwen/Qwen3-Next-80B-A3B-Instruct": {"experts": 512, "experts_per_token": 10, "state_size": 128, "head_dim": 256},
    "google/gemma-3-27b-it": {"layers": 62, "kv_heads": 16, "head_dim": 128, "dtype": "bf16"},
    "gpt2": {"layers": 12, "attention_heads": 12, "kv_heads": 12, "head_dim": 64, "hidden_size": 768, "dtype": "fp32"},
    "google-bert/bert-base-uncased": {"layers": 12, "attention_heads": 12, "hidden_size": 768},
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_facts(model: str) -> None:
    told = facts(identify(read_checkpoint(model, offline=True)))
    assert {name: getattr(told, name) for name in PUBLISHED[model]} == PUBLISHED[model]
    assert (told.id, told.source, told.commit, told.trainable_parameters) == (model, "catalogue", None, 0)


def test_an_adapters_parameters_are_active() -> None:
    config = read_checkpoint("mistralai/Mixtral-8x7B-v0.1", offline=True).config
    adapter = Adapter("me/lora", {"peft_type": "LORA", "r": 8}, None)
    told = facts(identify(Checkpoint(id="a/b", source="local", config=config, adapter=adapter)))
    more = 32 * 8 * ((4096 + 4096) + (4096 + 1024))  # queries and values
    assert (told.parameters, told.active_parameters) == (46_702_792_704 + more, 12_879_925_248 + more)


def test_the_guides_rule_takes_its_own_view() -> None:
    """Two bytes a parameter, every head cached, the whole context; a constant state for Mamba."""
    mixtral = identify(read_checkpoint("mistralai/Mixtral-8x7B-v0.1", offline=True))
    weights, cache = guide_items(mixtral, Request(ctx=8192, batch=2))
    assert weights.bytes == 2 * 46_702_792_704
    assert cache.bytes == 2 * 2 * 8192 * 32 * 128 * 32 * 2
    assert len(guide_items(mixtral, Request(ctx=8192, phase="encode"))) == 1
    mamba = identify(read_checkpoint("state-spaces/mamba-130m-hf", offline=True))
    assert [i.bytes for i in guide_items(mamba, Request(ctx=8192))] == [2 * 129_135_360, 24 * 16 * 1536 * 2]


def test_the_guide_as_a_method() -> None:
    e = Session().estimate("mistralai/Mixtral-8x7B-v0.1", Request(ctx=8192, method="guide"), offline=True)
    assert e.method == "guide"
    assert e.peak_allocated_bytes == e.device_bytes == e.guide.bytes == sum(i.bytes for i in e.items)
