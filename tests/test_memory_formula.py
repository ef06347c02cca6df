"""What a padding mask adds at most, against the exact engine with and without one."""

from typing import Any

import pytest

from hfvram.memory.allocator import replay
from hfvram.memory.formula import mask_bytes, timeline
from hfvram.model.infer import infer
from hfvram.request import Request

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
SQUARE = 4 * 1024 * 1024
"""Pairs of 4 sequences of 1,024 tokens."""
TOKENS = 4 * 1024
REPEATED = 2 * 64 * TOKENS * 2
"""Keys and values of one head of 64 in bf16."""


def request(**options: Any) -> Request:
    options = {"ctx": 1024, "batch": 4, "dtype": "bf16", "quant": "none", **options}
    return Request(**options)


def test_a_prefill_holds_one_layers() -> None:
    asked = request(ctx=1032, new_tokens=8, phase="generate")
    assert mask_bytes(infer(LLAMA), asked) == SQUARE + SQUARE * 2 + 8 * REPEATED
    ungrouped = infer({**LLAMA, "num_key_value_heads": 8})
    assert mask_bytes(ungrouped, asked) == SQUARE + SQUARE * 2


def test_training_keeps_every_layers_and_what_is_repeated_beyond_the_heads_that_there_were() -> None:
    layer = SQUARE * 2 + 6 * REPEATED
    assert mask_bytes(infer(LLAMA), request(mode="train")) == SQUARE + 4 * layer
    assert mask_bytes(infer(LLAMA), request(mode="lora", gradient_checkpointing=True)) == SQUARE + layer


def test_no_mask_where_none_is_made() -> None:
    assert mask_bytes(infer(LLAMA), request(phase="prefill")) == 0
    assert mask_bytes(infer(LLAMA), request(mode="train", attention="eager")) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_against_the_models_own_code_in_training(kv_heads: int) -> None:
    pytest.importorskip("transformers")
    from hfvram.memory.exact.simulate import simulate

    config = {**LLAMA, "num_key_value_heads": kv_heads}
    without, padded = (
        replay(simulate(config, None, request(mode="train", padding=padding))).allocated_bytes
        for padding in (False, True)
    )
    most = mask_bytes(infer(config), request(mode="train"))
    assert 0.8 * most < padded - without <= most


@pytest.mark.slow
def test_without_a_cache_every_step_copies_the_experts_of_all_tokens() -> None:
    """generate() switches to a batched matmul after its prefill, cache or not (Mixtral-8x22B's `use_cache: false`)."""
    pytest.importorskip("transformers")
    from hfvram.memory.exact.simulate import simulate

    mixtral = LLAMA | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "use_cache": False}
    asked = request(ctx=64, new_tokens=8, phase="generate", kv_dtype="bf16")
    exact = replay(simulate(mixtral, None, asked.with_(method="simulate")))
    formed = replay(timeline(infer(mixtral), asked))
    assert formed.allocated_bytes == pytest.approx(exact.allocated_bytes, rel=0.01)
