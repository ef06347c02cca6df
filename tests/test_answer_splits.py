"""What doesn't go together while several GPUs train is a usage error that says what would."""

from typing import Any

import pytest

from hfvram.answer.supported import check
from hfvram.errors import HfvramError
from hfvram.request import Request


@pytest.mark.parametrize(
    ("options", "valid"),
    [
        ({"zero": 3, "fsdp": "full_shard", "gpus": 4}, "valid is one of them"),
        ({"zero": 2, "gpus": 4, "method": "simulate"}, "valid is --method formula"),
        ({"fsdp": "full_shard", "gpus": 1}, "valid are --gpus 2 and more"),
        ({"offload": ("experts",)}, "optimizer, optimizer=nvme, params, params=nvme, activations"),
        ({"offload": ("optimizer", "optimizer=nvme"), "zero": 3}, "valid is one of them"),
        ({"offload": ("optimizer",)}, "--zero 1, 2 or 3"),
        ({"offload": ("optimizer",), "fsdp": "full_shard", "gpus": 2}, "--offload params"),
        ({"offload": ("optimizer=nvme",), "zero": 2}, "--zero 3"),
        ({"offload": ("params",), "zero": 2}, "--zero 3 or --fsdp"),
        ({"offload": ("params=nvme",), "fsdp": "full_shard", "gpus": 2}, "--zero 3"),
        ({"offload": ("activations",)}, "--gradient-checkpointing"),
        ({"offload": ("optimizer=tape",)}, "optimizer=nvme"),
    ],
    ids=str,
)
def test_refused_with_what_is_valid(options: dict[str, Any], valid: str) -> None:
    with pytest.raises(HfvramError) as caught:
        check(Request.from_dict({"mode": "train", **options}))
    assert caught.value.kind == "usage"
    assert valid in caught.value.message


@pytest.mark.parametrize(
    "options",
    [
        {"zero": 1, "offload": ("optimizer",)},
        {"zero": 3, "offload": ("optimizer=nvme", "params")},
        {"fsdp": "hybrid_shard", "offload": ("params",), "gpus": 8},
        {"offload": ("activations",), "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_answered(options: dict[str, Any]) -> None:
    check(Request.from_dict({"mode": "train", "method": "formula", **options}))


def test_zero_is_for_training() -> None:
    with pytest.raises(HfvramError, match="--mode inference has no use for it"):
        check(Request(zero=3))
    check(Request(zero=0))


def test_chunks_and_shared_sequences_are_for_training() -> None:
    with pytest.raises(HfvramError, match="--pp-chunks is for training"):
        check(Request(pp_chunks=2))
    with pytest.raises(HfvramError, match="valid for --mode inference is --cp 1"):
        check(Request(cp=2))
