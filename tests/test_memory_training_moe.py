"""Training of mixtures of experts by formula: routing and experts by hand, and models against their own code."""

from typing import Any

import pytest
from test_memory_training_train import GROUPED, SMALL, formed, held, live

from hfvram.errors import HfvramError

MIXTRAL = GROUPED | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
SPARSE = GROUPED | {"num_experts": 8, "num_experts_per_tok": 4}
THIN = SPARSE | {"moe_intermediate_size": 48, "head_dim": 16}
QWEN2 = SPARSE | {"model_type": "qwen2_moe", "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80}
GRANITE = GROUPED | {"model_type": "granitemoe", "num_local_experts": 8, "num_experts_per_tok": 4}
LATENT = SMALL | {"moe_intermediate_size": 48, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 2}
LATENT |= {"kv_lora_rank": 32, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
LATENT |= {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4}
GLM = GROUPED | {"model_type": "glm4_moe", "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1}
GLM |= {"moe_intermediate_size": 48, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 16}
SINKS = GROUPED | {"model_type": "gpt_oss", "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16}
SINKS |= {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": MIXTRAL,
    "mixtral, a loss of balance": MIXTRAL | {"output_router_logits": True},
    "mixtral, noise": MIXTRAL | {"router_jitter_noise": 0.1},
    "olmoe": SPARSE | {"model_type": "olmoe"},
    "olmoe, normalized": SPARSE | {"model_type": "olmoe", "norm_topk_prob": True, "output_router_logits": True},
    "qwen2_moe": QWEN2 | {"mlp_only_layers": [0]},
    "qwen2_moe, a window": QWEN2 | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "qwen3_moe": THIN | {"model_type": "qwen3_moe", "norm_topk_prob": True},
    "gpt_oss": SINKS,
    "granitemoe": GRANITE | {"tie_word_embeddings": True},
    "deepseek_v2": LATENT | {"model_type": "deepseek_v2", "q_lora_rank": None},
    "deepseek_v2, groups": LATENT | {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy"},
    "deepseek_v3": LATENT | {"model_type": "deepseek_v3"},
    "deepseek_v3, halves": LATENT | {"model_type": "deepseek_v3", "rope_interleave": False, "norm_topk_prob": False},
    "glm4_moe_lite": LATENT | {"model_type": "glm4_moe_lite"},
    "glm4_moe": GLM | {"partial_rotary_factor": 0.5},
    "glm4_moe, normed queries": GLM | {"use_qk_norm": True, "attention_bias": True},
}
OPTIONS: list[dict[str, Any]] = [
    {"batch": 2},
    {"gradient_checkpointing": True},
    {"dtype": "fp32", "grad_accum": 2, "optimizer": "adafactor"},
    {"attention": "eager", "batch": 2, "dtype": "fp32", "optimizer": "muon"},
]


def test_what_a_mixture_keeps_for_its_backward() -> None:
    """32 tokens of h 64, each sent to 2 of 4 experts of f 96; 2 layers; bf16, weights of the experts in fp32."""
    kept = live(formed(MIXTRAL), "backward")
    saved = {name.removesuffix(" (saved activations)"): n for name, n in kept.items()}
    rows = 32 * 2
    # Tokens sorted by expert, what came out of the experts, and (to give the weights a gradient) nothing else of h.
    assert saved["experts, tokens by expert"] == 2 * 2 * rows * 64 * 2
    assert saved["experts, gate and up"] == 2 * rows * 2 * 96 * 2
    assert saved["experts, product"] == saved["feed-forward, activation function"] == 2 * rows * 96 * 2
    assert saved["router, probabilities"] == 2 * 32 * 4 * 4
    assert saved["experts, weighted outputs"] == 2 * rows * 4  # one number for each choice


def test_a_loss_of_balance_keeps_the_logits_of_every_layer() -> None:
    """Of 12 layers each, which without it are written as five."""
    deep = {"num_hidden_layers": 12}
    name = "router, logits (saved activations)"
    assert name not in live(formed(MIXTRAL | deep, gradient_checkpointing=True), "backward")
    asked = live(formed(MIXTRAL | deep | {"output_router_logits": True}, gradient_checkpointing=True), "backward")
    assert asked[name] == 12 * 32 * 4 * 2


def test_what_has_no_formula_is_said() -> None:
    with pytest.raises(HfvramError, match="flash_attention_2 of GptOssForCausalLM has no formula"):
        formed(SINKS, attention="flash_attention_2")
    with pytest.raises(HfvramError, match="output_router_logits of GraniteMoeForCausalLM has no formula"):
        formed(GRANITE | {"output_router_logits": True})  # transformers 5.17 itself fails here
    with pytest.raises(HfvramError, match="model type dbrx has no formula"):
        formed({"model_type": "dbrx"})


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_event_by_event_as_the_models_own_code(name: str, options: dict[str, Any]) -> None:
    held(MODELS[name], **options)
