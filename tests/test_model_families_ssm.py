"""State spaces and hybrids: counts that are published, the kinds of layers, and the meta device's word for the rest."""

from collections import Counter
from typing import Any

import pytest

from hfvram.errors import HfvramError
from hfvram.model.architecture import Architecture
from hfvram.model.config import Config
from hfvram.model.families import reader
from hfvram.model.layers import RGLRU, Attention, GatedDeltaNet, LightningAttention, Mamba1, Mamba2, MixtureOfExperts


def read(class_name: str | None = None, **values: Any) -> Architecture:
    found = reader(values["model_type"])
    assert found is not None
    return found(Config(values), class_name)


MAMBA = {"model_type": "mamba", "hidden_size": 768, "num_hidden_layers": 24}
FALCON_MAMBA = {
    # tiiuae/falcon-mamba-7b says expand 16, yet its inner width is intermediate_size.
    "model_type": "falcon_mamba",
    "hidden_size": 4096,
    "intermediate_size": 8192,
    "expand": 16,
    "num_hidden_layers": 64,
    "vocab_size": 65024,
    "time_step_rank": 256,
    "tie_word_embeddings": False,
}
CODESTRAL = {"model_type": "mamba2"}  # Mamba-Codestral-7B has the family's defaults
FALCON_H1 = {
    "model_type": "falcon_h1",
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "mamba_d_ssm": 1536,
    "mamba_n_heads": 24,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "vocab_size": 32784,
}
JAMBA = {"model_type": "jamba"}  # Jamba-1.5-Mini has the family's defaults
RECURRENT_GEMMA = {"model_type": "recurrent_gemma", "intermediate_size": 15360, "num_key_value_heads": 1}
LFM2 = {
    "model_type": "lfm2",
    "hidden_size": 2048,
    "block_ff_dim": 12288,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
}
MINIMAX = {
    "model_type": "minimax",
    "hidden_size": 6144,
    "intermediate_size": 9216,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_local_experts": 32,
    "vocab_size": 200064,
    "layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 10,
}
NANO = {
    # nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16
    "model_type": "nemotron_h",
    "hidden_size": 2688,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
}
QWEN3_NEXT = {"model_type": "qwen3_next"}  # Qwen3-Next-80B-A3B has the family's defaults
ZAMBA2 = {
    # Zyphra/Zamba2-7B: 81 layers, 13 of which run one of two shared transformer blocks first
    "model_type": "zamba2",
    "hidden_size": 3584,
    "num_hidden_layers": 81,
    "mamba_ngroups": 2,
    "num_mem_blocks": 2,
    "intermediate_size": 14336,
    "use_mem_rope": True,
    "layers_block_type": ["hybrid" if i in (6, *range(11, 78, 6)) else "mamba" for i in range(81)],
}

COUNTS = [
    (MAMBA, 129_135_360),  # state-spaces/mamba-130m-hf, safetensors header
    (FALCON_MAMBA, 7_272_665_088),  # tiiuae/falcon-mamba-7b
    (CODESTRAL, 7_285_403_648),  # mistralai/Mamba-Codestral-7B-v0.1
    (FALCON_H1, 521_411_104),  # tiiuae/Falcon-H1-0.5B-Base
    (JAMBA, 51_570_323_328),  # ai21labs/AI21-Jamba-1.5-Mini
    (RECURRENT_GEMMA, 2_682_862_080),  # google/recurrentgemma-2b
    (LFM2, 1_170_340_608),  # LiquidAI/LFM2-1.2B
    (ZAMBA2, 7_326_532_760),  # Zyphra/Zamba2-7B, as transformers 5.17 reads its configuration
    (NANO, 31_577_937_344),  # nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16
    (QWEN3_NEXT, 79_674_391_296),  # Qwen/Qwen3-Next-80B-A3B-Instruct without its predictor of further tokens
    (MINIMAX, 456_089_655_296),  # MiniMaxAI/MiniMax-Text-01-hf
]


@pytest.mark.parametrize(("values", "count"), COUNTS, ids=[v["model_type"] for v, _ in COUNTS])
def test_published_counts(values: dict[str, Any], count: int) -> None:
    assert read(**values).parameters == count


def test_active_parameters_leave_out_idle_experts() -> None:
    # Nano: 23 MoE layers with 122 of 128 experts idle, each 2 · 1856 · 2688.
    assert read(**NANO).active_parameters == 31_577_937_344 - 23 * 122 * 2 * 1856 * 2688
    # Jamba-1.5-Mini: 16 of 32 layers, 14 of 16 experts idle, each 3 · 14336 · 4096: the 12B of its model card.
    assert read(**JAMBA).active_parameters == 51_570_323_328 - 16 * 14 * 3 * 14336 * 4096 == 12_110_311_296


def mixers(architecture: Architecture) -> list[Any]:
    return [mixer for layer in architecture.text.layers for mixer in layer.mixers]


def test_a_state_is_no_cache_of_keys_and_values() -> None:
    """Mamba-130M: d_inner 1536, N 16; Codestral: 128 heads of 64, convolution over 8192 + 2 · 8 · 128 channels."""
    first = mixers(read(**MAMBA))[0]
    assert isinstance(first, Mamba1)
    assert (first.d_inner, first.d_state, first.d_conv, first.dt_rank) == (1536, 16, 4, 48)
    second = mixers(read(**CODESTRAL))[0]
    assert isinstance(second, Mamba2)
    assert (second.heads, second.head_dim, second.d_state, second.conv_dim) == (128, 64, 128, 10240)
    assert read(**MAMBA).attention is None


def test_falcon_mamba_takes_its_inner_width_from_intermediate_size() -> None:
    assert {m.d_inner for m in mixers(read(**FALCON_MAMBA))} == {8192}


PATTERNS: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    ("full_attention_interval", QWEN3_NEXT, {"gated_delta_net": 36, "full_attention": 12, "moe": 48}),
    (
        "layer_types",
        {
            "model_type": "qwen3_next",
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
        },
        {"gated_delta_net": 2, "full_attention": 1, "moe": 3},
    ),
    ("attn_layer_period", JAMBA, {"mamba": 28, "full_attention": 4, "moe": 16, "dense": 16}),
    (
        "attn_layer_offset",
        {**JAMBA, "attn_layer_period": 3, "attn_layer_offset": 0, "num_hidden_layers": 7},
        {"mamba": 4, "full_attention": 3, "moe": 3, "dense": 4},
    ),
    ("hybrid_override_pattern", NANO, {"mamba2": 23, "moe": 23, "full_attention": 6}),
    (
        "layers_block_type of nemotron_h",
        {**NANO, "hybrid_override_pattern": None, "layers_block_type": ["mamba", "attention", "moe", "mlp"]},
        {"mamba2": 1, "full_attention": 1, "moe": 1, "dense": 1},
    ),
    ("layers_block_type of zamba2", ZAMBA2, {"mamba2": 81, "full_attention": 13, "dense": 13}),
    (
        "layer_types of granitemoehybrid",
        {
            "model_type": "granitemoehybrid",
            "num_hidden_layers": 4,
            "num_local_experts": 0,
            "layer_types": ["mamba", "attention", "mamba", "mamba"],
        },
        {"mamba2": 3, "full_attention": 1, "dense": 4},
    ),
    (
        "attn_layer_indices",
        {"model_type": "bamba", "attn_layer_indices": [9, 18, 27]},
        {"mamba2": 29, "full_attention": 3, "dense": 32},
    ),
    ("both in each layer", FALCON_H1, {"mamba2": 36, "full_attention": 36, "dense": 36}),
    ("full_attn_idxs", LFM2, {"short_conv": 10, "full_attention": 6, "dense": 16}),
    ("block_types", RECURRENT_GEMMA, {"rg_lru": 18, "sliding_attention": 8, "dense": 26}),
    ("layer_types of minimax", MINIMAX, {"linear_attention": 70, "full_attention": 10, "moe": 80}),
    (
        "layer_types of olmo_hybrid",
        {"model_type": "olmo_hybrid"},
        {"gated_delta_net": 24, "full_attention": 8, "dense": 32},
    ),
]


@pytest.mark.parametrize(("values", "kinds"), [p[1:] for p in PATTERNS], ids=[p[0] for p in PATTERNS])
def test_kinds_of_layers_by_each_pattern_key(values: dict[str, Any], kinds: dict[str, int]) -> None:
    assert read(**values).layer_kinds == kinds


def test_layers_stand_where_the_pattern_has_them() -> None:
    attends = [i for i, layer in enumerate(read(**QWEN3_NEXT).text.layers) if isinstance(layer.mixers[0], Attention)]
    assert attends == list(range(3, 48, 4))
    attends = [i for i, layer in enumerate(read(**JAMBA).text.layers) if isinstance(layer.mixers[0], Attention)]
    assert attends == [4, 12, 20, 28]


def test_sizes_of_the_states() -> None:
    delta = mixers(read(**QWEN3_NEXT))[0]
    assert isinstance(delta, GatedDeltaNet)
    assert (delta.key_heads, delta.value_heads, delta.key_dim, delta.value_dim) == (16, 32, 128, 128)
    assert delta.conv_dim == 2 * 16 * 128 + 32 * 128
    recurrent = mixers(read(**RECURRENT_GEMMA))[0]
    assert isinstance(recurrent, RGLRU)
    assert (recurrent.width, recurrent.d_conv) == (2560, 4)
    lightning = mixers(read(**MINIMAX))[0]
    assert isinstance(lightning, LightningAttention)
    assert (lightning.heads, lightning.head_dim) == (64, 128)


def test_recurrent_gemma_attends_to_a_window() -> None:
    attention = read(**RECURRENT_GEMMA).attention
    assert attention is not None
    assert (attention.window, attention.kv_heads, attention.head_dim) == (2048, 1, 256)
    assert attention.rotary is not None
    assert attention.rotary.dim == 128  # half of each head


def test_qwen3_next_gates_its_attention_and_rotates_a_quarter() -> None:
    attention = read(**QWEN3_NEXT).attention
    assert attention is not None
    assert attention.output_gate
    assert attention.rotary is not None
    assert (attention.head_dim, attention.rotary.dim) == (256, 64)


def test_zamba2_owns_a_shared_block_once_and_caches_in_every_layer_that_runs_it() -> None:
    zamba = read(**ZAMBA2)
    hybrids = [layer for layer in zamba.text.layers if len(layer.mixers) == 2]
    owners = [layer for layer in hybrids if layer.mixers[0].params]
    assert (len(hybrids), len(owners)) == (13, 2)
    attention = zamba.attention
    assert attention is not None
    assert (attention.hidden_size, attention.head_dim, attention.cached) == (7168, 224, True)  # 2 · 3584, ÷ 32 heads
    # Adapters of 13 users: 7 in the first block, 6 in the second, one for gate and up each.
    adapters = Counter(p.name.split(".")[2] for p in zamba.all_params if "adapter_list" in p.name)
    assert sorted(adapters.values()) == [12, 14]


def test_nemotron_experts_work_in_the_latent_width() -> None:
    moe = read(**{**NANO, "moe_latent_size": 1024}).moe
    assert isinstance(moe, MixtureOfExperts)
    assert (moe.latent_size, moe.gated, moe.shared_intermediate_size) == (1024, False, 3712)
    assert {p.shape for p in moe.params if p.kind == "experts"} == {(128, 1856, 1024), (128, 1024, 1856)}


def test_qwen3_5_has_its_tower_with_the_class_that_sees() -> None:
    text = {"model_type": "qwen3_5", "text_config": {"num_hidden_layers": 4}, "vision_config": {"depth": 2}}
    whole, alone = read(**text), read("Qwen3_5ForCausalLM", **text)
    assert [s.name for s in whole.stacks] == ["vision", "text"]
    assert [s.name for s in alone.stacks] == ["text"]
    assert whole.parameters > alone.parameters


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({**NANO, "hybrid_override_pattern": "M*X"}, "unknown_architecture", "'X'"),
    ({**NANO, "layers_block_type": ["mamba", "ring"]}, "unknown_architecture", "'ring'"),
    ({**ZAMBA2, "layers_block_type": ["mamba"] * 80 + ["moe"]}, "unknown_architecture", "'moe'"),
    ({**QWEN3_NEXT, "layer_types": ["sparse"] * 48}, "unknown_architecture", "'sparse'"),
    ({**RECURRENT_GEMMA, "block_types": ["recurrent", "ring"]}, "unknown_architecture", "'ring'"),
    ({**QWEN3_NEXT, "layer_types": ["full_attention"]}, "bad_config", "48 layers"),
    ({**MAMBA, "state_size": "many"}, "bad_config", "state_size"),
    ({**MAMBA, "num_hidden_layers": 10**9}, "bad_config", "num_hidden_layers"),
    ({**CODESTRAL, "num_heads": 100}, "bad_config", "100 heads"),
    ({**CODESTRAL, "n_groups": 7}, "bad_config", "7 groups"),
    ({**FALCON_H1, "mamba_d_head": 65}, "bad_config", "mamba_d_head"),
    ({**LFM2, "block_ffn_dim_multiplier": -4}, "bad_config", "block_ffn_dim_multiplier"),
    ({"model_type": "bamba", "attn_layer_indices": [[1]], "mamba_d_conv": 0}, "bad_config", "mamba_d_conv"),
    ({**JAMBA, "attn_layer_offset": 8}, "bad_config", "attn_layer_offset"),
    ({**NANO, "hybrid_override_pattern": "M" * 5000}, "bad_config", "hybrid_override_pattern"),
    ({"model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForConditionalGeneration"]}, "unknown_architecture", ""),
]


@pytest.mark.parametrize(("values", "kind", "words"), BAD)
def test_what_cannot_be_built_is_said(values: dict[str, Any], kind: str, words: str) -> None:
    asked = "Qwen3_5ForConditionalGeneration" if values["model_type"] == "qwen3_5_text" else None
    with pytest.raises(HfvramError) as error:
        read(asked, **values)
    assert error.value.kind == kind
    assert words in error.value.message


def test_rwkv_has_no_closed_form() -> None:
    assert reader("rwkv") is None


T = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
T |= {"intermediate_size": 48, "pad_token_id": 0}
S = {**T, "mamba_n_heads": 8, "mamba_d_state": 8, "mamba_expand": 2}
V = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 40, "out_hidden_size": 32}
N = {**T, "model_type": "nemotron_h", "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "n_routed_experts": 4}
Z = {**T, "n_mamba_heads": 4, "mamba_d_state": 8}

TINY: list[tuple[dict[str, Any], str | None]] = [
    ({"model_type": "mamba", **T}, None),
    ({"model_type": "mamba", **T, "tie_word_embeddings": False, "use_bias": True, "use_conv_bias": False}, None),
    ({"model_type": "mamba", "hidden_size": 32, "expand": 3, "time_step_rank": 5}, "MambaModel"),
    ({"model_type": "falcon_mamba", **T}, None),
    ({"model_type": "mamba2", **T, "num_heads": 8, "head_dim": 8, "n_groups": 2, "use_bias": True}, None),
    ({"model_type": "jamba", **T, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1}, None),
    ({"model_type": "jamba", **T, "num_experts": 1, "mamba_proj_bias": True, "mamba_conv_bias": False}, None),
    ({"model_type": "jamba", **T, "num_labels": 3}, "JambaForSequenceClassification"),
    ({"model_type": "bamba", **S}, None),
    (
        {
            "model_type": "bamba",
            **S,
            "attn_layer_indices": [1, 3],
            "mamba_conv_bias": False,
            "mamba_proj_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
        None,
    ),
    (
        {
            "model_type": "granitemoehybrid",
            **S,
            "layer_types": ["mamba", "attention"] * 2,
            "num_local_experts": 4,
            "shared_intermediate_size": 40,
        },
        None,
    ),
    ({"model_type": "granitemoehybrid", **S, "num_local_experts": 0, "tie_word_embeddings": True}, None),
    ({"model_type": "falcon_h1", **S, "mamba_d_ssm": 48}, None),
    (
        {
            "model_type": "falcon_h1",
            **S,
            "mamba_d_ssm": None,
            "mamba_rms_norm": True,
            "projectors_bias": True,
            "mamba_proj_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 16,
        },
        None,
    ),
    (
        {
            "model_type": "zamba2",
            **Z,
            "num_mem_blocks": 2,
            "use_shared_attention_adapter": True,
            "adapter_rank": 3,
            "num_hidden_layers": 6,
            "layers_block_type": ["mamba", "hybrid", "hybrid", "hybrid", "mamba", "hybrid"],
        },
        None,
    ),
    (
        {
            "model_type": "zamba2",
            **Z,
            "num_hidden_layers": 3,
            "add_bias_linear": True,
            "mamba_ngroups": 2,
            "layers_block_type": ["hybrid", "hybrid", "mamba"],
        },
        "Zamba2ForSequenceClassification",
    ),
    ({"model_type": "zamba", **T, "num_hidden_layers": 10, "num_key_value_heads": 4}, None),
    (
        {
            **N,
            "hybrid_override_pattern": "M-*EM",
            "head_dim": 16,
            "moe_intermediate_size": 24,
            "moe_latent_size": 16,
            "moe_shared_expert_intermediate_size": 40,
            "mlp_bias": True,
            "use_bias": True,
        },
        None,
    ),
    ({**N, "layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba"], "use_conv_bias": False}, None),
    (N, "NemotronHModel"),
    (
        {
            "model_type": "qwen3_next",
            **T,
            "num_experts": 4,
            "moe_intermediate_size": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 6,
            "head_dim": 16,
            "shared_expert_intermediate_size": 10,
            "attention_bias": True,
            "mlp_only_layers": [1],
        },
        None,
    ),
    (
        {"model_type": "qwen3_next", **T, "num_experts": 0, "full_attention_interval": 2, "tie_word_embeddings": True},
        None,
    ),
    ({"model_type": "qwen3_next", **T, "num_experts": 2}, "Qwen3NextForTokenClassification"),
    ({"model_type": "qwen3_5_text", **T, "full_attention_interval": 2}, None),
    ({"model_type": "qwen3_5_moe_text", **T, "num_experts": 4}, None),
    ({"model_type": "qwen3_5", "text_config": {**T, "tie_word_embeddings": True}, "vision_config": V}, None),
    ({"model_type": "qwen3_5", "tie_word_embeddings": True, "text_config": T, "vision_config": V}, None),
    ({"model_type": "qwen3_5", "text_config": T, "vision_config": V}, "Qwen3_5Model"),
    ({"model_type": "qwen3_5", "text_config": T, "vision_config": V}, "Qwen3_5ForCausalLM"),
    ({"model_type": "qwen3_5_moe", "text_config": {**T, "num_experts": 4}, "vision_config": V}, None),
    ({"model_type": "lfm2", **T}, None),
    ({"model_type": "lfm2", **T, "full_attn_idxs": [1, 3], "conv_bias": True}, None),
    (
        {
            "model_type": "lfm2",
            **T,
            "block_auto_adjust_ff_dim": False,
            "tie_embedding": False,
            "layer_types": ["conv", "full_attention", "conv", "conv"],
        },
        None,
    ),
    ({"model_type": "lfm2", **T, "block_ffn_dim_multiplier": 1.5, "block_multiple_of": 8}, None),
    (
        {
            "model_type": "lfm2_moe",
            **T,
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "head_dim": 16,
            "layer_types": ["conv", "full_attention", "conv", "conv"],
        },
        None,
    ),
    ({"model_type": "recurrent_gemma", **T}, None),
    (
        {
            "model_type": "recurrent_gemma",
            **T,
            "lru_width": 64,
            "block_types": ["recurrent", "attention"],
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
        None,
    ),
    ({"model_type": "minimax", **T, "num_local_experts": 4}, None),
    (
        {
            "model_type": "minimax",
            **T,
            "num_local_experts": 4,
            "head_dim": 16,
            "block_size": 128,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "tie_word_embeddings": True,
        },
        None,
    ),
    ({"model_type": "minimax", **T, "num_local_experts": 4}, "MiniMaxModel"),
    ({"model_type": "olmo_hybrid", **T}, None),
    (
        {
            "model_type": "olmo_hybrid",
            **T,
            "attention_bias": True,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 6,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
        None,
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "class_name"), TINY, ids=lambda v: v.get("model_type") if isinstance(v, dict) else v
)
def test_closed_form_is_the_model_on_meta(values: dict[str, Any], class_name: str | None) -> None:
    from on_meta import differences

    assert differences(values, class_name) == []
