"""Recommended GPUs run the request, as `--gpu` says of each."""

import re

import pytest

import hfvram
from hfvram.answer.estimate import Recommended

LLAMA = "meta-llama/Llama-3.1-70B"


def options(r: Recommended) -> dict[str, object]:
    words = r.options.split()
    pairs = zip(words[::2], words[1::2], strict=True)
    return {name.removeprefix("--").replace("-", "_"): value for name, value in pairs}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "asked"),
    [
        ("Qwen/Qwen3-8B", {}),
        (LLAMA, {"ctx": 8192}),
        (LLAMA, {"ctx": 8192, "engine": "vllm"}),
        ("Qwen/Qwen3-8B", {"mode": "lora", "ctx": 1024, "method": "formula"}),
        ("Qwen/Qwen3-8B", {"gpus": 2, "tp": 2}),
    ],
)
def test_each_runs_it_and_half_as_many_do_not(model: str, asked: dict[str, object]) -> None:
    found = hfvram.estimate(model, offline=True, recommend=True, **asked).recommended
    assert found
    assert [r.gpus * r.capacity_bytes for r in found] == sorted(r.gpus * r.capacity_bytes for r in found)
    for r in found:
        fit = hfvram.estimate(model, offline=True, **{**asked, **options(r), "gpu": r.gpu}).fit
        assert fit
        assert fit.fits, r
        assert (r.gpus > int(asked.get("gpus", 1))) is bool(r.options)  # type: ignore[call-overload]


def test_where_one_is_not_enough_several_are_named() -> None:
    found = hfvram.estimate(LLAMA, offline=True, ctx=8192, recommend=True).recommended
    several = {r.gpu: (r.gpus, r.options) for r in found if r.gpus > 1}
    assert several["RTX PRO 6000"] == (2, "--gpus 2 --tp 2")
    assert not [gpu for gpu in several if re.match(r"M\d", gpu)]  # a computer has one of Apple's


def test_a_placed_model_is_recommended_by_what_one_gpu_takes() -> None:
    one = hfvram.estimate("Qwen/Qwen3-8B", offline=True, recommend=True).recommended
    placed = hfvram.estimate("Qwen/Qwen3-8B", offline=True, recommend=True, gpus=2, gpu="RTX 4060").recommended
    assert [r.gpu for r in placed] == [r.gpu for r in one]
