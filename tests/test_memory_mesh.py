"""How GPUs stand to one another, and the table of those that differ."""

from dataclasses import replace

import pytest

import hfvram
from hfvram.answer.estimate import Rank
from hfvram.errors import HfvramError
from hfvram.memory.mesh import Mesh, mesh_of
from hfvram.request import Request
from hfvram.show.explain import explain
from hfvram.show.markdown import markdown
from hfvram.show.text import text


def test_data_is_what_is_left() -> None:
    assert mesh_of(Request(gpus=64, tp=8, pp=2, cp=2)) == Mesh(gpus=64, tp=8, pp=2, cp=2)
    assert mesh_of(Request(gpus=64, tp=8, pp=2, cp=2)).data == 2
    assert mesh_of(Request(ep=8)).gpus == 8


def test_gpus_that_the_model_does_not_divide() -> None:
    with pytest.raises(HfvramError, match="--gpus 6 is not divisible by the 4 that hold the model: valid are 4, 8"):
        mesh_of(Request(gpus=6, tp=2, pp=2))


def rank(name: str, gpus: int, each: int) -> Rank:
    sums = ("weights", "cache", "gradients", "optimizer", "activations", "peak_allocated", "peak_reserved", "device")
    return Rank(name=name, gpus=gpus, **{f"{n}_bytes": 0 if n == "cache" else each for n in sums})


def test_ranks_that_differ_make_a_table() -> None:
    alone = hfvram.estimate("gpt2", offline=True, ctx=64)
    assert alone.ranks == ()
    two = replace(alone, ranks=(rank("stage 1 of 2", 4, 3 << 30), rank("stage 2 of 2", 4, 5 << 30)))
    rows = [line.split() for line in text(two, 120).splitlines() if line.startswith(("GPUs", "stage"))]
    sums = ["weights", "gradients", "optimizer", "activations", "allocated", "device"]
    assert rows[0] == ["GPUs", "of", "them", *sums]  # and no cache, of which nobody has any
    assert rows[1] == ["stage", "1", "of", "2", "4", *["3.0", "GiB"] * 6]
    assert "stage 2 of 2" in explain(two, 120)
    assert "| stage 2 of 2 | 4 | 5.0 GiB |" in markdown(two)
    assert [r["name"] for r in two.to_dict()["ranks"]] == ["stage 1 of 2", "stage 2 of 2"]


def test_ranks_that_are_alike_are_one() -> None:
    shared = hfvram.estimate("gpt2", offline=True, mode="train", method="formula", ctx=64, gpus=4, fsdp="full_shard")
    (only,) = shared.ranks
    assert (only.name, only.gpus, only.device_bytes) == ("all", 4, shared.device_bytes)
    assert only.peak_allocated_bytes == shared.peak_allocated_bytes
    assert "GPUs  of them" not in text(shared, 120)
