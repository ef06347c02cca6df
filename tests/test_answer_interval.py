"""The interval: which measured cases are like the question, and where their errors put the figure."""

import json
from pathlib import Path
from typing import Any

import pytest

from hfvram.answer import interval as module
from hfvram.answer.interval import MARGIN, group, interval
from hfvram.model.infer import infer
from hfvram.request import Request

FACTS = Path(__file__).parents[1] / "fixtures" / "configs" / "facts.jsonl"
CONFIGS = {f["id"]: f["config"] for f in map(json.loads, FACTS.read_text().splitlines())}
ACCURACY = json.loads(Path(module.__file__).with_name("accuracy.json").read_text())
LLAMA, MIXTRAL = "meta-llama/Llama-3.1-8B-Instruct", "mistralai/Mixtral-8x7B-v0.1"


@pytest.mark.parametrize(
    ("model", "quant", "name"),
    [
        (LLAMA, "auto", "inference-dense"),
        (LLAMA, "none", "inference-dense"),
        (LLAMA, "nf4", "inference-quantized"),
        (MIXTRAL, "auto", "inference-moe"),
        (MIXTRAL, "int8", "inference-quantized"),
        ("deepseek-ai/DeepSeek-V2-Lite", "auto", "inference-moe"),
        ("state-spaces/mamba-2.8b-hf", "auto", "inference-ssm"),
        ("ai21labs/AI21-Jamba-1.5-Mini", "auto", "inference-ssm"),
        ("google-bert/bert-base-uncased", "auto", "inference-dense"),
    ],
)
def test_groups_of_inference(model: str, quant: str, name: str) -> None:
    assert group(infer(CONFIGS[model]), Request(quant=quant)) == name


@pytest.mark.parametrize(
    ("model", "options", "name"),
    [
        (LLAMA, {}, "train-dense"),
        (LLAMA, {"gradient_checkpointing": True}, "train-dense-ckpt"),
        (MIXTRAL, {}, "train-moe"),
        ("state-spaces/mamba-2.8b-hf", {}, "train-ssm"),
        ("state-spaces/mamba-2.8b-hf", {"kernels": "fallback"}, "train-ssm-fallback"),
        (LLAMA, {"mode": "lora", "gradient_checkpointing": True}, "lora"),
        (LLAMA, {"mode": "qlora", "quant": "nf4"}, "qlora"),
        (LLAMA, {"fsdp": "full_shard", "gpus": 8}, "fsdp"),
        (LLAMA, {"tp": 8, "gpus": 8}, "train on 8 GPUs"),
        (LLAMA, {"gpus": 2}, "train on 2 GPUs"),
    ],
)
def test_groups_of_training(model: str, options: dict[str, Any], name: str) -> None:
    request = Request.from_dict({"mode": "train", "quant": "none"} | options)
    assert group(infer(CONFIGS[model]), request) == name


def test_the_engine_that_answered_is_the_one_whose_errors_count() -> None:
    found = [interval(infer(CONFIGS[LLAMA]), Request(quant="none", method=m), 10**10) for m in ("formula", "simulate")]
    assert found[0].high_bytes > found[1].high_bytes


def test_errors_turned_round() -> None:
    """A figure that was 5 % too high where it was worst is right at 1/1.05 of it."""
    figure = 10**10
    for model, quant in [(LLAMA, "none"), (MIXTRAL, "none"), (LLAMA, "nf4")]:
        request = Request(quant=quant)
        errors: dict[str, Any] = ACCURACY["formula"][group(infer(CONFIGS[model]), request)]
        found = interval(infer(CONFIGS[model]), request, figure)
        assert found.low_bytes == int(figure / (1 + max(errors["high"], MARGIN)))
        assert found.high_bytes == int(figure / (1 + min(errors["low"], -MARGIN)))
        assert found.low_bytes < figure < found.high_bytes
        assert f"{errors['cases']} measured cases" in found.basis


@pytest.mark.parametrize(
    "options",
    [
        {"cache": "offloaded"},
        {"attention": "flash_attention_2"},
        {"expandable_segments": True},
        {"compute_capability": "8.9"},
    ],
)
def test_settings_that_were_never_measured_say_so(options: dict[str, Any]) -> None:
    found = interval(infer(CONFIGS[LLAMA]), Request.from_dict({"quant": "none"} | options), 10**10)
    assert "no measured case" in found.basis


def test_what_was_never_measured_says_so() -> None:
    fp8 = infer({**CONFIGS[LLAMA], "quantization_config": {"quant_method": "fp8"}})
    found = interval(fp8, Request(quant="fp8"), 10**10)
    assert (found.low_bytes, found.high_bytes) == (9 * 10**9, 11 * 10**9)
    assert "no measured case" in found.basis
