"""Linear attention: states by hand and against transformers' own, and what a mixer leaves behind."""

from dataclasses import replace
from typing import Any

import pytest
from states import state_bytes

from hfvram.memory.allocator import replay
from hfvram.memory.forward import Forward
from hfvram.memory.mixers import mix
from hfvram.memory.timeline import Standing, Timeline
from hfvram.model.config import Config
from hfvram.model.families import reader
from hfvram.model.layers import RGLRU, GatedDeltaNet, LightningAttention, ShortConv

QWEN3_NEXT = GatedDeltaNet(
    hidden_size=2048, key_heads=16, value_heads=32, key_dim=128, value_dim=128, d_conv=4, params=()
)
MINIMAX = LightningAttention(hidden_size=6144, heads=64, head_dim=128, params=())
LFM2 = ShortConv(hidden_size=2048, d_conv=3, params=())
GRIFFIN = RGLRU(hidden_size=2560, width=2560, heads=10, d_conv=4, params=())


def test_states_of_a_gated_delta_net() -> None:
    # (2·16·128 + 32·128) channels · 4 columns · 2 B + 32 · 128 · 128 · 4 B. Measured with three such layers and one of
    # attention (2 · 2 heads · 256 · 2,047 tokens · 2 B): 10,680,320 B of cache
    assert state_bytes(QWEN3_NEXT, 1, "bf16") == 65_536 + 2_097_152
    assert 3 * state_bytes(QWEN3_NEXT, 1, "bf16") + 2 * 2 * 256 * 2047 * 2 == 10_680_320


def test_states_of_the_others() -> None:
    assert state_bytes(MINIMAX, 2, "bf16") == 2 * 64 * 128 * 128 * 2
    assert state_bytes(LFM2, 2, "bf16") == 2 * 2048 * 3 * 2
    assert state_bytes(GRIFFIN, 2, "bf16") == 2 * (2560 * 3 * 2 + 2560 * 4)


@pytest.mark.parametrize("kernels", ["fused", "fallback"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("part", "computing", "fp32"),  # elements of the states in the computing dtype, and in fp32
    [
        (QWEN3_NEXT, (2 * 16 * 128 + 32 * 128) * 4, 32 * 128 * 128),
        (replace(QWEN3_NEXT, fused_projection=False), (2 * 16 * 128 + 32 * 128) * 4, 32 * 128 * 128),
        (MINIMAX, 64 * 128 * 128, 0),
        (LFM2, 2048 * 3, 0),
        (GRIFFIN, 2560 * 3, 2560),
    ],
)
def test_only_output_and_states_outlive_a_mixer(part: Any, computing: int, fp32: int, dtype: str, kernels: str) -> None:
    t, states = Timeline(Standing(())), list[int]()
    f = Forward(batch=2, tokens=300, dtype=dtype, kernels=kernels)
    for step in (f, replace(f, tokens=1, past=300), replace(f, tokens=1, past=301)):
        out, kept = mix(t, step, part, states)
        t.free(out, *kept)
        live = sum(t.sizes[h] for h in t.live(len(t.events)))
        assert live == sum(t.sizes[h] for h in states) == 2 * (computing * f.element_bytes + fp32 * 4)


def test_the_delta_rule_needs_more_without_its_kernels() -> None:
    peaks = {}
    for kernels in ("fused", "fallback"):
        t = Timeline(Standing(()))
        mix(t, Forward(batch=1, tokens=16_384, kernels=kernels), QWEN3_NEXT, [])
        peaks[kernels] = replay(t).allocated_bytes
    assert peaks["fallback"] > 1.5 * peaks["fused"]


TINY: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "head_dim": 16,
    },
    "lfm2": {"num_hidden_layers": 2, "full_attn_idxs": [1], "block_ff_dim": 48},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32},
    "minimax": {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 2,
        "head_dim": 16,
        "block_size": 8,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TINY)
def test_states_are_those_of_transformers(model_type: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(model_type, vocab_size=64, pad_token_id=0, **{**sizes, **TINY[model_type]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.ones((2, 11), dtype=torch.long)
    with torch.no_grad():
        cache = getattr(model(ids, use_cache=True, **positions(model_type, ids)), "past_key_values", None)
    states = [x for x in getattr(cache, "linear_cache", []) if len(x)]
    for layer in cache.layers if cache is not None else ():
        for name in ("conv_states", "recurrent_states"):
            states += [x for x in getattr(layer, name, {}).values() if x is not None]
    for module in model.modules():
        kept = (getattr(module, name, None) for name in ("conv1d_state", "recurrent_states"))
        states += [x for x in kept if isinstance(x, torch.Tensor)]
    architecture = reader(model_type)(Config({**config.to_dict(), "model_type": model_type}), None)
    kinds = GatedDeltaNet | LightningAttention | ShortConv | RGLRU
    parts = [m for layer in architecture.text.layers for m in layer.mixers if isinstance(m, kinds)]
    assert parts
    assert sum(state_bytes(part, 2, "bf16") for part in parts) == sum(s.numel() * s.element_size() for s in states)


def positions(model_type: str, ids: Any) -> dict[str, Any]:
    """RecurrentGemma counts on its caller for positions."""
    import torch

    return {"position_ids": torch.arange(ids.shape[1])[None]} if model_type == "recurrent_gemma" else {}
