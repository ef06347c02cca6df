"""State spaces: states by hand and against transformers' own cache, scans by their widest moment."""

from dataclasses import replace
from typing import Any

import pytest
from states import state_bytes

from hfvram.memory.allocator import replay
from hfvram.memory.blocks import HIDDEN
from hfvram.memory.forward import Forward
from hfvram.memory.hybrid import hybrid
from hfvram.memory.inference import run_layer
from hfvram.memory.ssm import TUNING_BYTES, mamba1, mamba2
from hfvram.memory.timeline import Standing, Timeline
from hfvram.model.config import Config
from hfvram.model.families import reader
from hfvram.model.layers import Attention, FeedForward, Layer, Mamba1, Mamba2

MAMBA_130M = Mamba1(hidden_size=768, d_inner=1536, d_state=16, d_conv=4, dt_rank=48, mask_of_ones=True, params=())
MAMBA2_1B3 = Mamba2(hidden_size=2048, heads=64, head_dim=64, d_state=128, groups=1, d_conv=4, chunk_size=256, params=())
SOFTMAX = Attention(hidden_size=64, heads=4, kv_heads=2, head_dim=16, value_dim=16, params=())
DENSE = FeedForward(hidden_size=64, intermediate_size=96, gated=True, activation="silu", params=())


def timeline() -> Timeline:
    return Timeline(Standing(()))


def live_bytes(t: Timeline) -> int:
    return sum(t.sizes[h] for h in t.live(len(t.events)))


def test_states_of_mamba_130m() -> None:
    # 1536 channels · 4 columns · 2 B + 1536 · 16 · 4 B a layer; 24 layers measured on a H100: 2,654,208 B
    assert state_bytes(MAMBA_130M, 1, "bf16") == 12_288 + 98_304
    assert 24 * state_bytes(MAMBA_130M, 1, "bf16") == 2_654_208


def test_states_of_mamba2_1b3() -> None:
    # (4096 + 2·128) channels · 4 · 2 B + 64 · 64 · 128 · 4 B a layer; 48 layers measured on a H100: 102,334,464 B
    assert state_bytes(MAMBA2_1B3, 1, "bf16") == 34_816 + 2_097_152
    assert 48 * state_bytes(MAMBA2_1B3, 1, "bf16") == 102_334_464


def test_states_in_fp32_double_the_convolution_alone() -> None:
    assert state_bytes(MAMBA2_1B3, 3, "fp32") == 3 * (69_632 + 2_097_152)


@pytest.mark.parametrize("kernels", ["fused", "fallback"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("part", "columns", "state"),  # of the convolution, in the computing dtype; of the recurrence, in fp32
    [
        (MAMBA_130M, 1536 * 4, 1536 * 16),
        (replace(MAMBA_130M, heads=2, inner_norms=True), 1536 * 4, 1536 * 16),
        (MAMBA2_1B3, (4096 + 2 * 128) * 4, 64 * 64 * 128),
    ],
)
def test_only_output_and_states_outlive_a_mixer(
    part: Mamba1 | Mamba2, columns: int, state: int, masked: bool, dtype: str, kernels: str
) -> None:
    t, states = timeline(), list[int]()
    f = Forward(batch=3, tokens=300, dtype=dtype, kernels=kernels, masked=masked)
    write: Any = mamba1 if isinstance(part, Mamba1) else mamba2
    out = write(t, f, part, states)
    kept = 3 * (columns * f.element_bytes + state * 4)
    assert sum(t.sizes[h] for h in states) == kept
    t.free(out)
    assert live_bytes(t) == kept
    out = write(t, replace(f, tokens=1, past=300), part, states)
    t.free(out)
    assert live_bytes(t) == kept  # a state does not grow


def test_encoding_keeps_no_state() -> None:
    t = timeline()
    t.free(mamba1(t, Forward(batch=1, tokens=8, use_cache=False), MAMBA_130M, states := []))
    assert states == []
    assert live_bytes(t) == 0


def test_fallback_of_mamba_holds_three_states_for_every_token() -> None:
    t = timeline()
    mamba1(t, Forward(batch=1, tokens=2048, kernels="fallback"), MAMBA_130M, [])
    states = 2048 * 1536 * 16 * 4
    assert 3 * states < replay(t).allocated_bytes < 3.5 * states


def test_fallback_of_mamba2_multiplies_every_pair_of_a_chunk() -> None:
    t = timeline()
    mamba2(t, Forward(batch=1, tokens=2048, kernels="fallback"), MAMBA2_1B3, [])
    assert max(t.sizes) == 2048 * 256 * 64 * 128 * 4  # 16 GiB


def test_kernels_are_tuned_once_for_layers_of_one_shape() -> None:
    t = timeline()
    for part in (MAMBA2_1B3, MAMBA2_1B3, replace(MAMBA2_1B3, chunk_size=128)):
        mamba2(t, Forward(batch=1, tokens=64), part, [])
    # Five kernels; the autotuner of the one that passes states from chunk to chunk doesn't look at the chunk's size.
    assert t.sizes.count(TUNING_BYTES) == 5 + 4
    assert replay(t).allocated_bytes > TUNING_BYTES


def test_a_residual_stream_in_fp32() -> None:
    layer = Layer(mixers=(MAMBA_130M,), residual_fp32=True)
    t, f = timeline(), Forward(batch=1, tokens=100)
    embedded = t.alloc(f.bytes(768), HIDDEN)
    first = run_layer(t, f, layer, embedded, [])
    second = run_layer(t, f, layer, first, [])
    assert t.sizes[first] == t.sizes[second] == 100 * 768 * 4


@pytest.mark.parametrize("order", [1, -1])
def test_hybrid_layers_keep_keys_values_and_states(order: int) -> None:
    part = Mamba2(
        hidden_size=64, heads=8, head_dim=16, d_state=16, groups=1, d_conv=4, chunk_size=32, multipliers=True, params=()
    )
    layer = Layer(mixers=(part, SOFTMAX)[::order], feed_forward=DENSE)
    t, f, cache = timeline(), Forward(batch=2, tokens=50), list[int]()
    for step in (f, replace(f, tokens=1, past=50), replace(f, tokens=1, past=51)):
        t.free(hybrid(t, step, layer, cache))
    keys_and_values = 2 * 52 * 2 * 16 * 2 * 2
    states = 2 * ((128 + 2 * 16) * 4 * 2 + 128 * 16 * 4)
    assert live_bytes(t) == sum(t.sizes[h] for h in cache) == keys_and_values + states


TINY: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "falcon_mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "mamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 16,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "jamba": {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "num_experts": 2,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "bamba": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 16,
    },
    "falcon_h1": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "mamba_d_ssm": 48,
        "mamba_n_heads": 6,
        "mamba_d_head": 8,
        "mamba_d_state": 16,
    },
    "nemotron_h": {
        "hidden_size": 32,
        "hybrid_override_pattern": "M*-M",
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "granitemoehybrid": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "intermediate_size": 16,
        "shared_intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 16,
    },
    "zamba": {
        "hidden_size": 32,
        "num_hidden_layers": 12,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "attention_head_dim": 16,
        "mamba_d_state": 8,
        "n_mamba_heads": 2,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba"],
        "num_mem_blocks": 1,
        "mamba_d_state": 16,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TINY)
def test_states_are_those_of_transformers(model_type: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, vocab_size=64, pad_token_id=0, **TINY[model_type])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        out = model(torch.ones((2, 11), dtype=torch.long), use_cache=True)
    cache = getattr(out, "past_key_values", None) or out.cache_params
    states = [
        state
        for layer in cache.layers
        for name in ("conv_states", "recurrent_states")
        for state in getattr(layer, name, {}).values()
        if state is not None
    ]
    architecture = reader(model_type)(Config({**config.to_dict(), "model_type": model_type}), None)
    parts = [m for layer in architecture.text.layers for m in layer.mixers if isinstance(m, Mamba1 | Mamba2)]
    assert len(states) == 2 * len(parts) > 0
    assert sum(state_bytes(part, 2, "bf16") for part in parts) == sum(s.numel() * s.element_size() for s in states)
