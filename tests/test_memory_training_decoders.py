"""Training by formula of decoders that differ from Llama, each against its own code, event by event."""

from typing import Any

import pytest

from hfvram.errors import HfvramError
from hfvram.memory.training.train import timeline
from hfvram.model.infer import infer
from hfvram.request import Request
from tests.test_memory_training_train import OPTIONS, sequence

SMALL: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0}
HEADS = SMALL | {"head_dim": 16}
SLIDING = SMALL | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
OPT = SMALL | {"ffn_dim": 96, "word_embed_proj_dim": 64}
THREE = HEADS | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}}
SEEING: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SEEING |= {"image_size": 28, "patch_size": 14}
TOWER: dict[str, Any] = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64}
IN_ANY_ORDER = ("gemma3",)
"""Types whose rotary angles transformers 5.17 makes in the order of a set, which is another in every process."""
MODELS: dict[str, dict[str, Any]] = {
    "cohere": SMALL,
    "cohere, normed heads": SMALL | {"use_qk_norm": True},
    "cohere2": SLIDING,
    "ernie4_5": HEADS,
    "exaone4": SLIDING,
    "gemma3": {
        "text_config": HEADS | {"model_type": "gemma3_text", "sliding_window": 16, "sliding_window_pattern": 2},
        "vision_config": SEEING | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": 200,
    },
    "gemma3_text": HEADS | {"sliding_window": 16, "sliding_window_pattern": 2},
    "glm": HEADS,
    "glm4": HEADS,
    "helium": HEADS,
    "hunyuan_v1_dense": HEADS,
    "llava": {
        "text_config": SMALL | {"model_type": "llama"},
        "vision_config": SEEING | {"model_type": "clip_vision_model"},
        "image_token_index": 255,
    },
    "mistral3": {
        "text_config": HEADS | {"model_type": "mistral"},
        "vision_config": SEEING | {"model_type": "pixtral"},
        "image_token_index": 255,
    },
    "qwen2_vl": {
        "text_config": THREE | {"model_type": "qwen2_vl_text"},
        "vision_config": TOWER | {"model_type": "qwen2_vl", "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {
        "text_config": THREE | {"model_type": "qwen2_5_vl_text"},
        "vision_config": TOWER | {"model_type": "qwen2_5_vl", "fullatt_block_indexes": [1]},
    },
    "qwen3_vl": {
        "text_config": THREE | {"model_type": "qwen3_vl_text"},
        "vision_config": TOWER | {"model_type": "qwen3_vl", "deepstack_visual_indexes": [0]},
    },
    "qwen3_vl_moe": {
        "text_config": THREE
        | {"model_type": "qwen3_vl_moe_text", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
        "vision_config": TOWER | {"model_type": "qwen3_vl_moe", "deepstack_visual_indexes": [0]},
    },
    "ministral": HEADS,
    "ministral3": HEADS,
    "nanochat": SMALL,
    "nemotron": SMALL,
    "olmo": SMALL,
    "olmo, clipped": SMALL | {"clip_qkv": 8.0},
    "olmo3": SLIDING,
    "opt": OPT,
    "opt, as 350M": OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "phi": SMALL,
    "phi, normed heads": SMALL | {"qk_layernorm": True},
    "smollm3": SMALL | {"no_rope_layers": [1, 0]},
    "stablelm": SMALL,
    "stablelm, parallel": SMALL | {"qk_layernorm": True, "use_parallel_residual": True, "hidden_dropout": 0.1},
}


def config_of(name: str) -> dict[str, Any]:
    return {"model_type": name.split(",")[0]} | MODELS[name]


def request(**options: Any) -> Request:
    return Request.from_dict({"mode": "train", "ctx": 32, "dtype": "bf16", "quant": "none"} | options)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_event_by_event_as_the_models_own_code(name: str, options: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    from hfvram.memory.exact.simulate import simulate

    if "checkpoint_every" in options and "text_config" in config_of(name):
        pytest.skip("which layers of a tower are recomputed has no formula")
    exact = simulate(config_of(name), None, request(method="simulate", **options))
    formula = timeline(infer(config_of(name)), request(**options), on_meta=True)
    order = sorted if name in IN_ANY_ORDER else list
    assert order(sequence(formula)) == order(sequence(exact))
    for fact in ("gradients_bytes", "optimizer_bytes", "trainable_parameters"):
        assert getattr(formula, fact) == getattr(exact, fact)


@pytest.mark.parametrize("name", MODELS)
def test_many_layers_are_stretched_as_whole(name: str) -> None:
    """A model of many layers, of which a few are written, against all of them written."""
    config = config_of(name)
    text = config.get("text_config", config)
    deeper = {k: v for k, v in text.items() if k not in ("layer_types", "no_rope_layers")} | {"num_hidden_layers": 24}
    config = config | {"text_config": deeper} if "text_config" in config else deeper
    architecture, asked = infer(config), request()
    assert sequence(timeline(architecture, asked)) == sequence(timeline(architecture, asked, whole=True))


def test_towers_over_several_gpus_are_said() -> None:
    with pytest.raises(HfvramError, match="over several GPUs has no formula"):
        timeline(infer(config_of("llava")), request(gpus=2, fsdp="full_shard"))


def test_what_has_no_formula_is_said() -> None:
    """A window's mask that no layer takes is made by the code, but no size of it is known."""
    full = SMALL | {"model_type": "cohere2", "layer_types": ["full_attention"] * 2}
    with pytest.raises(HfvramError, match="without a layer that slides has no formula"):
        timeline(infer(full), request())
