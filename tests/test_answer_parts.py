"""Parts of an estimate add up to what is on the device, whoever answered."""

from pathlib import Path

import pytest
from estimates import llama_folder, mixtral, too_much

import hfvram
from hfvram.answer.parts import ORDER, parts

REQUESTS = [
    {},
    {"mode": "train", "method": "formula"},
    {"method": "guide"},
    {"engine": "vllm", "gpu": "H100"},
    {"engine": "sglang", "gpu": "24GB"},
    {"mode": "train", "gpus": 4, "fsdp": "full_shard", "method": "formula"},
]


@pytest.mark.parametrize("options", REQUESTS)
def test_parts_add_up(options: dict[str, object], tmp_path: Path) -> None:
    e = hfvram.estimate(llama_folder(tmp_path), **options)
    found = parts(e)
    assert sum(count for _, count in found) == e.device_bytes
    assert all(count > 0 for _, count in found)
    names = [name for name, _ in found]
    assert names == [name for name in ORDER if name in names]


def test_parts_by_hand() -> None:
    for e in (mixtral(), too_much()):
        found = dict(parts(e))
        assert found["weights"] == e.weights_bytes
        assert found["allocator"] == e.peak_reserved_bytes - e.peak_allocated_bytes
        assert found["CUDA"] == e.device_bytes - e.peak_reserved_bytes
