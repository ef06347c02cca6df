"""Expandable segments, by hand and against a second model: a map of pages."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfvram.memory.allocator import Allocator, replay
from hfvram.memory.expandable import ExpandableAllocator
from hfvram.memory.timeline import Standing, Tag, Timeline
from hfvram.units import MiB

TAG = Tag("x", "activations")


def run(allocator: Allocator | ExpandableAllocator, *events: int, sizes: dict[int, int]) -> int:
    """MiB that are reserved after the events."""
    allocator.run(events, {k: v * MiB for k, v in sizes.items()})
    return allocator.reserved // MiB


def test_pages_are_mapped_as_they_are_needed() -> None:
    """20 MiB a page: 30 MiB take two, the 10 MiB that are left of them serve with one page more for 25."""
    a = ExpandableAllocator()
    assert run(a, 0, sizes={0: 30}) == 40
    assert run(a, 1, sizes={1: 25}) == 60
    assert a.allocated == 55 * MiB
    small = ExpandableAllocator()
    small.run([0, 1], {0: MiB, 1: MiB})
    assert small.reserved == 2 * MiB
    small.run([2], {2: 512})
    assert small.reserved == 4 * MiB


def test_a_little_more_each_step_leaves_no_slivers() -> None:
    """A cache that grows by concatenation: old and new stand together, then the old goes. Segments of their own keep
    every size that there ever was; one that grows needs little more than the last two."""
    sizes = {i: 100 + 2 * i for i in range(20)}
    events = [0]
    for i in range(1, 20):
        events += [i, ~(i - 1)]
    plain, grown = run(Allocator(), *events, sizes=sizes), run(ExpandableAllocator(), *events, sizes=sizes)
    assert plain > 2 * grown
    assert grown < 138 + 136 + 110 + 20


def test_freed_neighbours_merge_over_what_would_have_been_segments() -> None:
    sizes = {0: 40, 1: 40, 2: 80}
    assert run(Allocator(), 0, 1, ~0, ~1, 2, sizes=sizes) == 160
    assert run(ExpandableAllocator(), 0, 1, ~0, ~1, 2, sizes=sizes) == 80


def test_every_remainder_is_split_off() -> None:
    """12 MiB of 12.5: a plain allocator keeps the half with the block, which costs the next one a segment."""
    a = ExpandableAllocator()
    a.run([0], {0: 12 * MiB + 512})
    assert a.allocated == 12 * MiB + 512


def test_the_end_that_can_grow_is_taken_last() -> None:
    """Free are 30 MiB between two blocks and 20 at the end, which could grow: 18 go into the 30."""
    a = ExpandableAllocator()
    run(a, 0, 1, 2, ~0, sizes={0: 30, 1: 30, 2: 20})
    assert a.reserved == 80 * MiB
    run(a, ~2, sizes={})
    run(a, 3, 4, sizes={3: 18, 4: 20})
    assert a.reserved == 80 * MiB
    run(a, 5, sizes={5: 12})
    assert a.reserved == 80 * MiB


def test_emptying_unmaps_whole_pages_and_the_lowest_hole_is_filled_first() -> None:
    a = ExpandableAllocator()
    run(a, 0, 1, 2, ~1, sizes={0: 10, 1: 60, 2: 10})
    assert a.reserved == 80 * MiB
    a.empty_cache()
    assert a.reserved == 40 * MiB  # of 10 to 70 MiB, the pages from 20 to 60
    assert run(a, 3, sizes={3: 50}) == 80
    assert run(a, 4, sizes={4: 10}) == 80


def test_streams_and_pools_have_segments_of_their_own() -> None:
    a = ExpandableAllocator()
    a.run([0, 1, ~0, 2], {0: 10 * MiB, 1: 512, 2: 10 * MiB}, {2: 1})
    assert a.reserved == (20 + 2 + 20) * MiB


def test_a_replay_takes_them_if_asked() -> None:
    t = Timeline(Standing(((30 * MiB, TAG), (30 * MiB, TAG))))
    t.free(t.alloc(12 * MiB, TAG), t.alloc(12 * MiB, TAG))
    t.alloc(24 * MiB, TAG)
    assert replay(t).reserved_bytes == (60 + 24 + 24) * MiB
    assert replay(t, expandable=True).reserved_bytes == 100 * MiB  # 84 in pages of 20


class Pages:
    """One pool as a set of mapped pages and the stretches in use."""

    def __init__(self, page: int) -> None:
        self.page, self.mapped, self.used = page, set[int](), dict[int, tuple[int, int]]()

    def stretches(self) -> list[tuple[int, int, str]]:
        """(address, size, what): used, free, unmapped; the last is endless."""
        edges = {p * self.page for p in self.mapped} | {(p + 1) * self.page for p in self.mapped} | {0, 1 << 60}
        used = dict(self.used.values())
        edges |= set(used) | {a + s for a, s in used.items()}
        found: list[tuple[int, int, str]] = []
        points = sorted(edges)
        for a, b in pairwise(points):
            inside = any(x <= a < x + s for x, s in used.items())
            what = "used" if inside else "free" if a // self.page in self.mapped else "unmapped"
            if found and found[-1][2] == what != "used":
                found[-1] = found[-1][0], b - found[-1][0], what
            else:
                found.append((a, b - a, what))
        return found

    def malloc(self, name: int, size: int) -> None:
        s = self.stretches()
        grows = {a: n + (s[i + 1][1] if s[i + 1][2] == "unmapped" else 0) for i, (a, n, _) in enumerate(s[:-1])}
        fits = sorted((n, a) for a, n, what in s if what == "free" and n >= size)
        while len(fits) > 1 and grows[fits[1][1]] < grows[fits[0][1]]:
            fits.pop(0)
        if fits:
            self.used[name] = fits[0][1], size
            return
        for i, (a, _, what) in enumerate(s):
            if what != "unmapped":
                continue
            first = i - 1 if i and s[i - 1][2] == "free" else i
            room = 0
            for _, n, what in s[first:]:
                if what == "used":
                    break
                room += n
            if room >= size:
                a = s[first][0]
                self.mapped |= set(range(a // self.page, -(-(a + size) // self.page)))
                self.used[name] = a, size
                return

    def empty(self) -> None:
        spans = [range(a // self.page, -(-(a + n) // self.page)) for a, n in self.used.values()]
        self.mapped &= {p for span in spans for p in span}


near = [n + d for n in (512, MiB, 2 * MiB, 20 * MiB, 40 * MiB) for d in (-511, -1, 0, 1)]
some = st.sampled_from(near) | st.integers(1, 2 * MiB) | st.integers(1, 70 * MiB)
steps = st.lists(st.tuples(st.sampled_from("mmmmfffe"), some, st.integers(0, 1000)), max_size=60)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(steps, st.integers(0, 60))
def test_against_a_map_of_pages(steps: list[tuple[str, int, int]], copied_at: int) -> None:
    a, pools = ExpandableAllocator(), {True: Pages(2 * MiB), False: Pages(20 * MiB)}
    live: dict[int, bool] = {}
    for name, (what, nbytes, which) in enumerate(steps):
        if name == copied_at:  # what stands is never freed from here on
            a = a.copy()
            live.clear()
        if what == "m":
            live[name] = small = (size := -(-nbytes // 512) * 512) <= MiB
            a.run([name], {name: nbytes})
            pools[small].malloc(name, size)
        elif what == "f" and live:
            gone = sorted(live)[which % len(live)]
            a.run([~gone], {})
            del pools[live.pop(gone)].used[gone]
        elif what == "e":
            a.empty_cache()
            for pool in pools.values():
                pool.empty()
        assert a.reserved == sum(len(p.mapped) * p.page for p in pools.values())
        assert a.allocated == sum(n for p in pools.values() for _, n in p.used.values())
