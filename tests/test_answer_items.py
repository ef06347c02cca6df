"""Items add up to the peak, each with its numbers where its formula has them."""

import pytest

from hfvram.answer.items import in_numbers, items, offloaded
from hfvram.memory.allocator import replay
from hfvram.memory.timeline import Standing, Tag, Timeline

WEIGHTS = Tag("weights", "weights", "P·e", "source", "exact")
CACHE = Tag("cache", "cache", "2·b·s")
ACTIVATION = Tag("hidden", "activations", "b·s·h·e")


def written() -> Timeline:
    t = Timeline(Standing(((1000, WEIGHTS), (24, WEIGHTS))))
    t.symbols = {"P": 512, "e": 2, "b": 3, "s": 100, "h": 8}
    for _ in range(2):
        t.alloc(600, CACHE)
    t.moment(ACTIVATION, 4800, 0)
    return t


def test_they_add_up_largest_first_and_rounding_last() -> None:
    t = written()
    peaks = replay(t)
    found = items(t, peaks)
    # 1024 and 512 for the weights, 1024 each for the caches, 5120
    assert peaks.allocated_bytes == 1536 + 2048 + 5120
    assert [(i.name, i.bytes) for i in found] == [
        ("hidden", 4800),
        ("cache", 1200),
        ("weights", 1024),
        ("rounding", 1680),
    ]
    assert sum(i.bytes for i in found) == peaks.allocated_bytes
    assert [i.formula for i in found[:3]] == [
        "b·s·h·e = 3·100·8·2",
        "2 × 2·b·s = 2 × 2·3·100",
        "P·e = 512·2",
    ]
    assert (found[2].certainty, found[2].source, found[2].category) == ("exact", "source", "weights")


def test_what_was_freed_before_the_peak_is_not_there() -> None:
    t = Timeline(Standing(()))
    t.moment(ACTIVATION, 1024)
    t.alloc(2048, CACHE)
    assert [(i.name, i.bytes) for i in items(t, replay(t))] == [("cache", 2048)]


def test_no_rounding_no_item() -> None:
    t = Timeline(Standing(((512, WEIGHTS),)))
    assert [i.name for i in items(t, replay(t))] == ["weights"]


@pytest.mark.parametrize(
    ("formula", "total", "count", "shown"),
    [
        ("b·s·h", 24, 1, "b·s·h = 2·3·4"),
        ("b·s·h", 48, 2, "2 × b·s·h = 2 × 2·3·4"),
        ("b·s·h", 25, 1, "b·s·h"),  # the numbers don't make the bytes: none are shown
        ("b·s·h", 24, 2, "2 × b·s·h"),
        ("b·zz", 0, 1, "b·zz = 2·0"),
        ("5·b", 10, 1, "5·b = 5·2"),
        ("", 10, 1, ""),
        ("the sizes in the headers", 10, 1, "the sizes in the headers"),
        ("big·b", 2_000_000, 1, "big·b = 1,000,000·2"),
    ],
)
def test_formulas_in_numbers(formula: str, total: int, count: int, shown: str) -> None:
    symbols = {"b": 2, "s": 3, "h": 4, "big": 10**6}
    assert in_numbers(Tag("x", "activations", formula), total, count, symbols) == shown


def test_what_is_kept_elsewhere_adds_up_by_place_and_name() -> None:
    t = written()
    moment = Tag("optimizer states: first moment", "optimizer", "P·4")
    t.elsewhere = [("cpu", moment, 2048), ("cpu", moment, 2048), ("nvme", moment, 100), ("cpu", WEIGHTS, 1024)]
    found = [(x.name, x.place, x.bytes, x.formula) for x in offloaded(t)]
    assert found == [
        ("optimizer states: first moment", "cpu", 4096, "2 × P·4 = 2 × 512·4"),
        ("weights", "cpu", 1024, "P·e = 512·2"),
        ("optimizer states: first moment", "nvme", 100, "P·4"),
    ]
