"""Encoders by formula: each against its own code, event by event."""

from typing import Any

import pytest

from hfvram.errors import HfvramError
from hfvram.memory.training.train import timeline
from hfvram.model.infer import infer
from hfvram.request import Request
from tests.test_memory_training_train import sequence

SMALL: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", SMALL),
    "bert, no dropout": ("BertForMaskedLM", SMALL | {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}),
    "roberta": ("RobertaForMaskedLM", SMALL),
    "xlm-roberta": ("XLMRobertaForMaskedLM", SMALL),
    "camembert": ("CamembertForMaskedLM", SMALL),
    "electra": ("ElectraForMaskedLM", SMALL | {"embedding_size": 32}),
    "electra, one width": ("ElectraForMaskedLM", SMALL | {"embedding_size": 64, "hidden_act": "relu"}),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": 256, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128},
    ),
}
OPTIONS: list[dict[str, Any]] = [
    {"batch": 2},
    {"gradient_checkpointing": True},
    {"dtype": "fp32", "mixed_precision": "bf16", "grad_accum": 2, "batch": 2},
    {"dtype": "fp32", "mixed_precision": "bf16", "gradient_checkpointing": True},
    {"attention": "eager", "batch": 2, "dtype": "fp32"},
    {"attention": "eager", "batch": 2, "gradient_checkpointing": True},
]


def config_of(name: str) -> dict[str, Any]:
    class_name, sizes = MODELS[name]
    return sizes | {"model_type": name.split(",")[0], "architectures": [class_name]}


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
    architecture, asked = infer(config_of(name) | {"num_hidden_layers": 24, "n_layers": 24}), request()
    assert sequence(timeline(architecture, asked)) == sequence(timeline(architecture, asked, whole=True))


def test_what_has_no_formula_is_said() -> None:
    """A bias beside an untied head gets no gradient."""
    with pytest.raises(HfvramError, match="a bias that is never used"):
        timeline(infer(config_of("bert") | {"tie_word_embeddings": False}), request())
    for other in ("BertModel", "BertForPreTraining", "BertForTokenClassification"):
        with pytest.raises(HfvramError, match=f"{other} has no formula"):
            timeline(infer(config_of("bert") | {"architectures": [other]}), request())
    decoder = {"architectures": ["BertLMHeadModel"], "is_decoder": True}
    with pytest.raises(HfvramError, match="BertLMHeadModel has no formula"):
        timeline(infer(config_of("bert") | decoder), request())
    for options in ({"padding": True}, {"attention": "flash_attention_2"}):
        with pytest.raises(HfvramError, match="with --padding or --attention"):
            timeline(infer(config_of("bert")), request(**options))


T5: dict[str, Any] = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 256}
T5 |= {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0}
MT5 = T5 | {"model_type": "mt5", "architectures": ["MT5ForConditionalGeneration"]}
GATED = T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("options", [{"batch": 2}, {"dtype": "fp32", "ctx": 30}, OPTIONS[2]], ids=str)
@pytest.mark.parametrize(
    "config",
    [T5, GATED, T5 | {"num_decoder_layers": 3}, MT5],
    ids=["t5", "gated", "unequal", "mt5"],
)
def test_t5_event_by_event(config: dict[str, Any], options: dict[str, Any], again: bool) -> None:
    pytest.importorskip("torch")
    options = options | {"gradient_checkpointing": again}
    from hfvram.memory.exact.simulate import simulate

    exact = simulate(config, None, request(method="simulate", **options))
    formula = timeline(infer(config), request(**options), on_meta=True)
    assert sequence(formula) == sequence(exact)
    for fact in ("gradients_bytes", "optimizer_bytes", "trainable_parameters"):
        assert getattr(formula, fact) == getattr(exact, fact)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("decoder", [24, 12])
def test_two_towers_are_stretched_as_whole(decoder: int, again: bool) -> None:
    """Towers of one depth are written short, others in full."""
    architecture = infer(T5 | {"num_layers": 24, "num_decoder_layers": decoder})
    asked = request(gradient_checkpointing=again)
    short, full = timeline(architecture, asked), timeline(architecture, asked, whole=True)
    assert sequence(short) == sequence(full)
    assert short.gradients_bytes == full.gradients_bytes == 2 * architecture.parameters


@pytest.mark.parametrize("options", [{"attention": "eager"}, {"dtype": "fp16"}, {"padding": True}], ids=str)
def test_what_of_t5_has_no_formula_is_said(options: dict[str, Any]) -> None:
    with pytest.raises(HfvramError, match=r"T5ForConditionalGeneration .* has no formula"):
        timeline(infer(T5), request(**options))


def test_t5_without_dropout_is_said() -> None:
    """PyTorch's own math path adds a learned bias in another way."""
    with pytest.raises(HfvramError, match="T5ForConditionalGeneration without dropout"):
        timeline(infer(T5 | {"dropout_rate": 0.0}), request())
