"""Bounds for what is not understood: full attention by sizes, weights by headers, refusals where there are none."""

from typing import Any

import pytest

from hfvram.errors import HfvramError
from hfvram.model.bound import bound, by_its_code, can_run, weights_only
from hfvram.model.infer import infer
from hfvram.read.checkpoint import Checkpoint, StoredTensor

MARTIAN: dict[str, Any] = {
    "model_type": "martian",
    "architectures": ["MartianForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "layer_types": ["telepathy"] * 3,
    "torch_dtype": "bfloat16",
}
UNKNOWN = HfvramError("unknown_architecture", "model type 'martian' is not known")


def checkpoint(config: dict[str, Any], tensors: tuple[StoredTensor, ...] | None = None) -> Checkpoint:
    return Checkpoint(id="a/b", source="local", config=config, tensors=tensors)


def test_every_layer_counts_as_full_attention() -> None:
    a = bound(checkpoint(MARTIAN), UNKNOWN)
    assert a.layer_kinds == {"full_attention": 3, "dense": 3}
    assert (a.model_type, a.class_name, a.dtype) == ("martian", "MartianForCausalLM", "bf16")
    # Llama's tensors: embedding and head, a layer of 64 · (64 + 32 + 32 + 64), three of 64 · 256, two norms; a norm
    assert a.parameters == 2 * 6400 + 3 * (64 * 192 + 3 * 64 * 256 + 128) + 64
    (warning,) = a.warnings
    assert "'martian'" in warning
    assert "weights like those of Llama" in warning


def test_weights_are_those_of_the_headers() -> None:
    tensors = (StoredTensor("a.weight", "BF16", (10, 10), 200), StoredTensor("b", "BF16", (7,), 14))
    a = bound(checkpoint(MARTIAN, tensors), UNKNOWN)
    assert a.parameters == 107
    assert a.layer_kinds == {"full_attention": 3, "dense": 3}
    assert "weights by the headers" in a.warnings[0]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("n_embd", "hidden_size"),
        ("d_model", "hidden_size"),
        ("n_layer", "num_hidden_layers"),
        ("n_head", "num_attention_heads"),
    ],
)
def test_sizes_by_other_names(given: str, name: str) -> None:
    config = {given if k == name else k: v for k, v in MARTIAN.items()}
    assert bound(checkpoint(config), UNKNOWN).parameters == bound(checkpoint(MARTIAN), UNKNOWN).parameters


def test_sizes_of_a_nested_text_model() -> None:
    inner = {k: v for k, v in MARTIAN.items() if k != "architectures"}
    a = bound(checkpoint({"model_type": "martian_vl", "text_config": inner}), UNKNOWN)
    assert (a.model_type, len(a.text.layers)) == ("martian_vl", 3)


@pytest.mark.parametrize("missing", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_without_sizes_it_stays_unknown(missing: str) -> None:
    with pytest.raises(HfvramError) as caught:
        bound(checkpoint({k: v for k, v in MARTIAN.items() if k != missing}), UNKNOWN)
    assert caught.value is UNKNOWN


@pytest.mark.parametrize("value", ["64", -64, [64], {"a": 64}, 1e400, 10**30, True, 63])
def test_hostile_sizes(value: Any) -> None:
    with pytest.raises(HfvramError) as caught:
        bound(checkpoint({**MARTIAN, "hidden_size": value}), UNKNOWN)
    assert caught.value.kind == "bad_config"


def test_weights_alone() -> None:
    tensors = (
        StoredTensor("a", "F16", (10, 10), 200),
        StoredTensor("b", "F32", (5,), 20),
        StoredTensor("c", "F8_E4M3", (8,), 8),
    )
    a = weights_only(checkpoint({"_class_name": "UNet2DConditionModel"}, tensors), UNKNOWN)
    assert (a.parameters, a.dtype, a.class_name, a.task) == (113, "fp16", "UNet2DConditionModel", "encoder")
    assert [p.dtype for p in a.all_params] == ["fp16", "fp32", None]
    for nothing in (None, ()):
        with pytest.raises(HfvramError):
            weights_only(checkpoint({}, nothing), UNKNOWN)


def test_a_bound_needs_no_less_than_the_model_that_it_stands_for() -> None:
    """A Mistral with a window, its type unknown: no window, no less memory."""
    config = {**MARTIAN, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8}
    del config["layer_types"]
    likeness = bound(checkpoint({**config, "model_type": "martian"}), UNKNOWN)
    assert likeness.attention is not None
    assert likeness.attention.window is None
    assert infer({**config, "intermediate_size": 256}).parameters == likeness.parameters


class TestByItsCode:
    """Types that transformers builds and no reader knows."""

    def test_only_types_that_no_reader_knows_and_transformers_does(self) -> None:
        pytest.importorskip("transformers")
        asked = ("biogpt", "llama", "martian", "", 5, None)
        assert [can_run({"model_type": kind}) for kind in asked] == [True, False, False, False, False, False]

    @pytest.mark.slow
    def test_tensors_and_class_are_those_of_its_code(self) -> None:
        pytest.importorskip("torch")
        config = {"model_type": "biogpt", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        config |= {"intermediate_size": 64, "vocab_size": 100, "max_position_embeddings": 50, "dtype": "bfloat16"}
        a = by_its_code(checkpoint(config), UNKNOWN)
        assert (a.class_name, a.task, a.dtype, a.generates) == ("BioGptForCausalLM", "causal", "bf16", True)
        # embeddings, two positions more than asked; a layer's four products and two, with biases; five norms; tied head
        assert a.parameters == 32 * (100 + 52) + 2 * (4 * (32 * 32 + 32) + 2 * 32 * 64 + 96 + 4 * 32) + 64
        assert (len(a.text.layers), a.layer_kinds, a.max_positions) == (2, {}, 50)
        assert "its own code" in a.warnings[0]

    @pytest.mark.slow
    def test_what_it_does_not_know_either_stays_unknown(self) -> None:
        pytest.importorskip("torch")
        with pytest.raises(HfvramError) as caught:
            by_its_code(checkpoint(MARTIAN), UNKNOWN)
        assert caught.value is UNKNOWN
