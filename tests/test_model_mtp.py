"""Heads for multi-token prediction: their parameters by the models' own reports and by hand."""

from typing import Any

import pytest
from small import LLAMA

from hfvram.errors import HfvramError
from hfvram.model.infer import infer
from hfvram.model.mtp import mtp
from hfvram.read.catalogue import lookup


def heads(values: dict[str, Any]) -> Any:
    return mtp(infer(values), values)


def test_deepseek_v3_has_11_5_billion_and_a_projection_beside_what_it_shares() -> None:
    """README_WEIGHTS.md of DeepSeek-V3: "11.5B unique parameters", without embedding and head."""
    entry = lookup("deepseek-ai/DeepSeek-V3")
    assert entry is not None
    values = dict(entry.config)
    found = heads(values)
    latent = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168 + 1536 + 512
    layer = latent + 257 * 3 * 7168 * 2048 + 256 * 7168 + 2 * 7168
    assert round(layer / 1e9, 2) == 11.51
    assert found.parameters == layer + 2 * 7168 * 7168 + 3 * 7168
    assert found.quantization == "fp8"
    assert found.layer_kinds == {"latent_attention": 1, "moe": 1} or len(found.text.layers) == 1


def test_a_dense_model_by_hand() -> None:
    values = LLAMA | {"model_type": "mimo", "architectures": ["Qwen2ForCausalLM"], "num_nextn_predict_layers": 2}
    values |= {"model_type": "qwen2"}
    # queries and output, keys and values, three of the feed-forward; biases; two norms; 2h → h and three norms
    layer = 2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256 + 256 + 2 * 128 + 2 * 256
    assert heads(values).parameters == 2 * (layer + 512 * 256 + 3 * 256)


def test_of_layers_that_do_one_thing_each_both_are_taken() -> None:
    entry = lookup("Qwen/Qwen3-Next-80B-A3B-Instruct")
    assert entry is not None
    values = dict(entry.config)
    found = heads(values)  # says nothing of it, and has one
    assert found.layer_kinds["full_attention"] == 1
    assert found.moe is not None


def test_what_a_quantization_leaves_alone() -> None:
    section = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["mtp*"]}
    values = LLAMA | {"num_nextn_predict_layers": 1, "quantization_config": section}
    assert heads(values).quantization is None
    assert heads(values | {"quantization_config": section | {"ignore": ["lm_head"]}}).quantization == "fp8"
    assert heads(values | {"quantization_config": section | {"ignore": ["model.layers.2*"]}}).quantization is None


@pytest.mark.parametrize("more", [{}, {"num_nextn_predict_layers": 0}])
def test_none(more: dict[str, Any]) -> None:
    with pytest.raises(HfvramError, match="--draft mtp") as caught:
        heads(LLAMA | more)
    assert caught.value.kind == "usage"
