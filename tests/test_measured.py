"""Inference answers against GPU memory that was measured (fixtures/measured/h100.jsonl), without a GPU."""

import json
import statistics
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import hfvram

MEASURED = Path(__file__).parents[1] / "fixtures" / "measured" / "h100.jsonl"
CASES = {case["id"]: case for case in map(json.loads, MEASURED.read_text().splitlines())}
INFERENCE = [name for name, case in CASES.items() if case["request"]["mode"] == "inference"]


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The formula's answer to a case by its id, worked out once."""

    @cache
    def estimate(name: str) -> "hfvram.Estimate":
        folder = tmp_path_factory.mktemp("model")
        (folder / "config.json").write_text(json.dumps(CASES[name]["config"]))
        return hfvram.estimate(str(folder), method="formula", **CASES[name]["request"])

    return estimate


def errors(answer: Any, figure: str) -> dict[str, float]:
    """Sizes of the errors in percent, by case."""
    out = {}
    for name in INFERENCE:
        measured = CASES[name]["measured"]
        # read after memory had been given back, the device's figure says nothing about the peak
        if figure != "device_bytes" or measured["device_bytes"] >= measured["peak_reserved_bytes"]:
            out[name] = abs(getattr(answer(name), figure) / measured[figure] - 1) * 100
    return out


@pytest.mark.parametrize("name", INFERENCE)
def test_parameters_are_exact(answer: Any, name: str) -> None:
    assert answer(name).model.parameters == CASES[name]["measured"]["parameters"]


@pytest.mark.parametrize("name", [n for n in INFERENCE if CASES[n]["measured"]["cache_bytes"] is not None])
def test_cache_is_exact(answer: Any, name: str) -> None:
    assert answer(name).cache_bytes == CASES[name]["measured"]["cache_bytes"]


@pytest.mark.parametrize("name", INFERENCE)
def test_items_are_what_stands_at_the_peak(answer: Any, name: str) -> None:
    assert sum(item.bytes for item in answer(name).items) == answer(name).peak_allocated_bytes


def test_peak_allocated(answer: Any) -> None:
    off = errors(answer, "peak_allocated_bytes")
    ordered = sorted(off.values())
    assert statistics.median(ordered) <= 1
    assert ordered[round(0.95 * (len(ordered) - 1))] <= 4
    assert max(off.items(), key=lambda case: case[1])[1] <= 10


@pytest.mark.parametrize("figure", ["peak_reserved_bytes", "device_bytes"])
def test_reserved_and_device(answer: Any, figure: str) -> None:
    ordered = sorted(errors(answer, figure).values())
    assert statistics.median(ordered) <= 2
    assert ordered[round(0.95 * (len(ordered) - 1))] <= 8


def test_interval_holds_most_cases(answer: Any) -> None:
    """The interval of device memory is honest: nine in ten measured cases lie in it."""
    inside = [
        answer(n).interval.low_bytes <= CASES[n]["measured"]["device_bytes"] <= answer(n).interval.high_bytes
        for n in errors(answer, "device_bytes")
    ]
    assert sum(inside) >= 0.9 * len(inside)
