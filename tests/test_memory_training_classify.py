"""Training of sequence classifiers by formula, against their own code, event by event."""

from typing import Any

import pytest
from test_memory_training_decoders import MODELS as DECODERS
from test_memory_training_encoders import config_of
from test_memory_training_moe import MODELS as MIXTURES
from test_memory_training_train import GROUPED, formed, held, live, sequence
from test_memory_training_train import MODELS as FIRST

from hfvram.errors import HfvramError
from hfvram.memory.training.classify import LAST
from hfvram.request import Request

ONE = {"id2label": {"0": "good"}, "label2id": {"good": 0}}
DECODER = GROUPED | {"head_dim": 16, "pad_token_id": 0, "num_local_experts": 4, "num_experts_per_tok": 2}
CLASSES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "distilbert": "DistilBert",
    "electra": "Electra",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "mixtral": "Mixtral",
}
ENCODERS = ("bert", "roberta", "distilbert", "electra", "xlm-roberta", "camembert")
OPTIONS: list[dict[str, Any]] = [
    {"batch": 2},
    {"gradient_checkpointing": True},
    {"dtype": "fp32", "mixed_precision": "bf16", "batch": 2},
]


def classifier(kind: str) -> dict[str, Any]:
    base = config_of(kind) if kind in ENCODERS else DECODER | {"model_type": kind}
    return base | {"architectures": [f"{CLASSES[kind]}ForSequenceClassification"]}


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [*CLASSES, "bert, a number", "llama, a number"])
def test_event_by_event_as_the_models_own_code(kind: str, options: dict[str, Any]) -> None:
    config = classifier(kind.partition(",")[0]) | (ONE if "number" in kind else {})
    held(config, **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(set(LAST) - set(CLASSES) - {"phi3"}))
def test_other_decoders_event_by_event(kind: str) -> None:
    """All but Phi-3, whose optimizer goes through its parameters in another order than is written."""
    pytest.importorskip("torch")
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES

    from hfvram.memory.exact.simulate import simulate

    config = {"model_type": kind} | (DECODERS | MIXTURES | FIRST)[kind]
    config |= {"architectures": [NAMES[kind]], "pad_token_id": 0}
    request = {"mode": "train", "ctx": 32, "dtype": "bf16", "quant": "none", "batch": 2}
    exact = simulate(config, None, Request.from_dict(request | {"method": "simulate"}))
    assert sequence(formed(config, on_meta=True, batch=2)) == sequence(exact)


def test_a_classifier_keeps_no_logits_over_the_vocabulary() -> None:
    kept = live(formed(classifier("llama")), "backward")
    assert kept["logits (saved activations)"] == 2 * 2  # of the pooled token: two classes in bf16
    assert kept["labels"] == 8


def test_what_has_no_formula_is_said() -> None:
    with pytest.raises(HfvramError, match="adapters or several GPUs of LlamaForSequenceClassification has no formula"):
        formed(classifier("llama"), mode="lora")
    with pytest.raises(HfvramError, match="GPT2ForSequenceClassification has no formula"):
        formed(FIRST["gpt2"] | {"architectures": ["GPT2ForSequenceClassification"]})
