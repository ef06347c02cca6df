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
MODELS: dict[str, dict[str, Any]] = {
    "cohere": SMALL,
    "cohere, normed heads": SMALL | {"use_qk_norm": True},
    "cohere2": SLIDING,
    "ernie4_5": HEADS,
    "exaone4": SLIDING,
    "gemma3_text": HEADS | {"sliding_window": 16, "sliding_window_pattern": 2},
    "glm": HEADS,
    "glm4": HEADS,
    "helium": HEADS,
    "hunyuan_v1_dense": HEADS,
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

    exact = simulate(config_of(name), None, request(method="simulate", **options))
    formula = timeline(infer(config_of(name)), request(**options), on_meta=True)
    assert sequence(formula) == sequence(exact)
    for fact in ("gradients_bytes", "optimizer_bytes", "trainable_parameters"):
        assert getattr(formula, fact) == getattr(exact, fact)


@pytest.mark.parametrize("name", MODELS)
def test_many_layers_are_stretched_as_whole(name: str) -> None:
    """A model of many layers, of which a few are written, against all of them written."""
    config = config_of(name) | {"num_hidden_layers": 24}
    config.pop("layer_types", None)
    config.pop("no_rope_layers", None)
    architecture, asked = infer(config), request()
    assert sequence(timeline(architecture, asked)) == sequence(timeline(architecture, asked, whole=True))


def test_what_has_no_formula_is_said() -> None:
    """A window's mask that no layer takes is made by the code, but no size of it is known."""
    full = SMALL | {"model_type": "cohere2", "layer_types": ["full_attention"] * 2}
    with pytest.raises(HfvramError, match="without a layer that slides has no formula"):
        timeline(infer(full), request())
