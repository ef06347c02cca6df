"""Training by formula of gated delta nets, against their own code, event by event."""

from typing import Any

import pytest
from test_memory_training_train import GROUPED, formed, held

from hfvram.errors import HfvramError

NET: dict[str, Any] = GROUPED | {"head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
NET |= {"linear_key_head_dim": 16, "linear_value_head_dim": 24, "full_attention_interval": 2}
NET |= {"layer_types": ["linear_attention", "full_attention"]}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
EXPERTS |= {"shared_expert_intermediate_size": 80}
THREE: dict[str, Any] = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e6}
QWEN_35 = NET | {"rope_parameters": THREE | {"partial_rotary_factor": 0.25, "mrope_interleaved": True}}
TOWER: dict[str, Any] = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64}
TOWER |= {"model_type": "qwen3_5", "deepstack_visual_indexes": []}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_next": NET | EXPERTS | {"model_type": "qwen3_next", "norm_topk_prob": True, "mlp_only_layers": [0]},
    "qwen3_5": QWEN_35 | {"model_type": "qwen3_5_text"},
    "qwen3_5_moe": QWEN_35 | EXPERTS | {"model_type": "qwen3_5_moe_text"},
    "qwen3_5, its states cached": {
        "model_type": "qwen3_5",
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "text_config": QWEN_35 | {"model_type": "qwen3_5_text"},
        "vision_config": TOWER,
    },
}
OPTIONS: list[dict[str, Any]] = [
    {"batch": 2},
    {"ctx": 100},
    {"ctx": 64, "gradient_checkpointing": True},
    {"dtype": "fp32", "grad_accum": 2},
    {"dtype": "fp32", "mixed_precision": "bf16", "batch": 2, "ctx": 100},
    {"attention": "eager", "kernels": "fallback"},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_event_by_event_as_the_models_own_code(name: str, options: dict[str, Any]) -> None:
    held(MODELS[name], **options)


def test_what_a_chunk_keeps_grows_with_tokens_alone() -> None:
    """Twice the tokens: twice of what is kept of each, the last state apart."""
    one, two = (formed(MODELS["qwen3_5"], ctx=n).fullest_bytes() for n in (1024, 2048))
    four = formed(MODELS["qwen3_5"], ctx=4096).fullest_bytes()
    assert four - two == pytest.approx(2 * (two - one), rel=0.01)


def test_what_has_no_formula_is_said() -> None:
    with pytest.raises(HfvramError, match="padding or flash attention of Qwen3_5ForCausalLM has no formula"):
        formed(MODELS["qwen3_5"], padding=True)
