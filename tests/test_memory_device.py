"""What stands beside PyTorch's allocator, against what was measured."""

import json
from pathlib import Path

from hfvram.memory.device import CONTEXT_BYTES, device_bytes
from hfvram.units import MiB

MEASURED = Path(__file__).parents[1] / "fixtures" / "measured" / "h100.jsonl"
CASES = [case for case in map(json.loads, MEASURED.read_text().splitlines()) if case["request"]["mode"] == "inference"]


def test_the_context_is_that_of_nearly_every_case() -> None:
    """What `nvidia-smi` showed for a process that had only made its context."""
    off = [abs(case["measured"]["context_bytes"] - CONTEXT_BYTES) < MiB for case in CASES]
    assert sum(off) >= 0.9 * len(off)


def test_device_memory_is_reserved_memory_and_a_constant() -> None:
    assert device_bytes(0) == 695 * MiB
    assert device_bytes(5000 * MiB) == 5695 * MiB


def test_most_inference_cases_are_within_a_hundredth_of_a_gibibyte() -> None:
    near = [
        abs(device_bytes(m["peak_reserved_bytes"]) - m["device_bytes"]) < 11 * MiB
        for m in (case["measured"] for case in CASES)
        if m["device_bytes"] > m["peak_reserved_bytes"]
    ]
    assert sum(near) > len(near) / 2
