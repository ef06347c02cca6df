"""Fine-grained fp8 on meta: what stands, counted by hand from the sizes of the layers, and what is refused."""

from typing import Any

import pytest

pytest.importorskip("torch")

from hfvram.errors import HfvramError
from hfvram.memory.exact.simulate import simulate
from hfvram.memory.timeline import Timeline
from hfvram.memory.weights import standing
from hfvram.model.infer import infer
from hfvram.request import Request

pytestmark = pytest.mark.slow

STORED = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
DENSE = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 512}
DENSE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
MIXTURE = {"model_type": "qwen3_moe", "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1}
MIXTURE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512, "num_experts": 4}
MIXTURE |= {"num_experts_per_tok": 2, "moe_intermediate_size": 128, "tie_word_embeddings": False}


def ran(config: dict[str, Any], **options: Any) -> Timeline:
    asked = {"ctx": 64, "new_tokens": 2, "dtype": "bf16", "quant": "fp8", "phase": "generate"} | options
    return simulate(config, None, Request.from_dict(asked))


def weights(timeline: Timeline) -> int:
    """Bytes of the weights that stand once the model is built."""
    built = timeline.live(timeline.restarts[0])
    return sum(timeline.sizes[h] for h in built if timeline.tags[h].category == "weights")


def layer(outputs: int, inputs: int) -> int:
    """A byte a weight, and four for each block of 128 x 128."""
    return outputs * inputs + 4 * -(-outputs // 128) * -(-inputs // 128)


def test_a_checkpoint_is_loaded_as_it_is_stored() -> None:
    blocks = 2 * (2 * layer(256, 256) + 2 * layer(128, 256) + 2 * layer(384, 256) + layer(256, 384))
    others = 2 * (2 * 512 * 256 + 5 * 256)  # embedding, head and norms stay in bf16
    assert weights(ran(DENSE | {"quantization_config": STORED})) == blocks + others


def test_loading_in_fp8_stands_as_a_checkpoint_in_fp8() -> None:
    assert weights(ran(DENSE)) == weights(ran(DENSE | {"quantization_config": STORED}))


def test_layers_that_are_left_alone_stay_in_bf16() -> None:
    spared = STORED | {"modules_to_not_convert": ["lm_head", "down_proj"]}
    more = 2 * (2 * 256 * 384 - layer(256, 384))
    assert weights(ran(DENSE | {"quantization_config": spared})) - weights(ran(DENSE)) == more


def test_experts_are_fp8_with_scales_of_their_own() -> None:
    experts = 4 * (layer(2 * 128, 256) + layer(256, 128))
    attention = 2 * layer(256, 256) + 2 * layer(128, 256)
    others = 2 * (2 * 512 * 256 + 3 * 256 + 2 * 64 + 4 * 256)  # and the norms of heads, and the router
    assert weights(ran(MIXTURE)) == attention + experts + others


def test_nothing_is_dequantized_while_it_runs() -> None:
    timeline = ran(DENSE | {"quantization_config": STORED}, ctx=32)
    assert max(timeline.sizes[h] for h in range(len(timeline.sizes)) if timeline.tags[h].category == "activations") < (
        2 * 384 * 256
    )


@pytest.mark.parametrize("mode", ["train", "lora"])
def test_training_is_refused(mode: str) -> None:
    with pytest.raises(HfvramError, match="can't train fp8") as caught:
        ran(DENSE, mode=mode, phase=None, new_tokens=None)
    assert caught.value.kind == "usage"


def test_another_format_of_fp8_is_left_to_the_formula() -> None:
    with pytest.raises(HfvramError, match="--method formula") as caught:
        ran(DENSE | {"quantization_config": {"quant_method": "fbgemm_fp8"}})
    assert caught.value.kind == "usage"


SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 500, "max_position_embeddings": 512, "head_dim": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 64}
LINEAR |= {"shared_expert_intermediate_size": 128, "linear_value_head_dim": 64}
LINEAR |= {"layer_types": ["linear_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Qwen2ForCausalLM", {"model_type": "qwen2"}),  # biases, which stand in fp32 beside packed weights
        ("BertForMaskedLM", {"model_type": "bert"}),
        ("Qwen3MoeForCausalLM", {"model_type": "qwen3_moe", **EXPERTS}),
        (
            "Qwen3NextForCausalLM",
            {"model_type": "qwen3_next", "shared_expert_intermediate_size": 128, **EXPERTS, **LINEAR},
        ),
    ],
)
def test_the_formulas_weights_are_those_of_the_code(name: str, more: dict[str, Any]) -> None:
    config = {**SMALL, **more, "architectures": [name], "torch_dtype": "bfloat16"}
    theirs = ran(config, phase="encode" if "Bert" in name else "prefill")
    ours = standing(infer(config), "bf16", "fp8", True).bytes_by_tag
    assert sum(n for tag, n in ours.items() if tag.category == "weights") == weights(theirs)
