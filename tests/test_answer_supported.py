"""What is not answered yet is refused by name, with what is valid."""

from typing import Any

import pytest

from hfvram.answer.supported import TRAINING, check
from hfvram.errors import HfvramError
from hfvram.request import Request

NOT_YET: list[tuple[dict[str, Any], str]] = [
    ({"pp": 2}, "1"),
    ({"ep": 8}, "1"),
    ({"sp": True}, "False"),
    ({"offload": ("params", "layers")}, "experts, layers"),
]


@pytest.mark.parametrize(("options", "valid"), NOT_YET, ids=str)
def test_not_yet(options: dict[str, Any], valid: str) -> None:
    with pytest.raises(HfvramError) as caught:
        check(Request(**options))
    error = caught.value
    (name,) = options
    assert (error.kind, error.exit_code) == ("usage", 2)
    assert f"--{name.replace('_', '-')} " in error.message
    assert "not supported yet" in error.message
    assert valid in error.message.partition("this version answers")[2]


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd"},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "checkpoint_every": 2},
        {"grad_accum": 4},
        {"mixed_precision": "bf16"},
        {"lora_r": 8},
        {"lora_targets": "q_proj"},
        {"lora_dropout": 0.1},
        {"adapter_dtype": "bf16"},
        {"rslora": True},
        {"dora": True},
        {"modules_to_save": ("lm_head",)},
        {"freeze": "embed_tokens"},
    ],
    ids=str,
)
def test_training_options_with_inference(options: dict[str, Any]) -> None:
    assert set(options) <= set(TRAINING)
    with pytest.raises(HfvramError) as caught:
        check(Request(**options))
    assert caught.value.kind == "usage"
    assert "--mode inference has no use for it" in caught.value.message


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "lora", "freeze": "mlp"},
        {"mode": "train", "rslora": True},
        {"mode": "train", "dora": True},
        {"mode": "train", "modules_to_save": ("lm_head",)},
        {"mode": "qlora", "dora": True},
    ],
    ids=str,
)
def test_options_of_one_kind_of_training(options: dict[str, Any]) -> None:
    with pytest.raises(HfvramError, match=r"is for --mode|valid is --mode lora") as caught:
        check(Request(**options))
    assert caught.value.kind == "usage"


def test_sharding_is_for_training() -> None:
    for options in ({"gpus": 4}, {"gpus": 4, "fsdp": "full_shard"}, {"gpus": 16, "fsdp": "hybrid_shard"}):
        check(Request(mode="train", method="formula", **options))  # type: ignore[arg-type]


def test_what_is_answered() -> None:
    for options in ({}, {"cache": "static"}, {"method": "guide"}, {"quant": "nf4"}, {"zero": 0}, {"gpus": 2}):
        check(Request(**options))  # type: ignore[arg-type]
