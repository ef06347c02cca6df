"""The allocator by hand-worked sequences, and against a second model of it that keeps plain lists of segments.

Constants as in PyTorch's c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h: blocks of 512 B; up to 1 MiB
from segments of 2 MiB; below 10 MiB from segments of 20 MiB; else segments rounded to 2 MiB; a block of the large pool
is split only where more than 1 MiB is left.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfvram.memory.allocator import FREE, SIZE, Allocator, Block, Peaks, replay, segment_bytes, stand
from hfvram.memory.timeline import Standing, Tag, Timeline
from hfvram.units import KiB, MiB

TAG = Tag("x", "activations")


class ByHand(Allocator):
    """The allocator driven one block at a time, as a test by hand wants it."""

    __slots__ = ("handles", "peak_allocated")

    def __init__(self) -> None:
        super().__init__()
        self.handles: dict[int, int] = {}
        self.peak_allocated = 0

    def malloc(self, nbytes: int, stream: int = 0) -> Block:
        handle = len(self.handles)
        peak, _ = self.run((handle,), {handle: nbytes}, {handle: stream} if stream else None)
        self.peak_allocated = max(self.peak_allocated, peak)
        block = self.blocks[handle]
        self.handles[handle] = id(block)
        return block

    def free(self, block: Block) -> None:
        handle = next(h for h, b in self.blocks.items() if b is block)
        self.run((~handle,), {})

    def empty_cache(self) -> None:
        super().empty_cache()
        self.peak_allocated = self.allocated

    def copy(self) -> "ByHand":
        same, other = super().copy(), ByHand()
        other.allocated, other.reserved, other.gaps, other.pools = same.allocated, same.reserved, same.gaps, same.pools
        other.peak_allocated = self.peak_allocated
        return other


@pytest.mark.parametrize(
    ("nbytes", "allocated"), [(1, 512), (511, 512), (512, 512), (513, 1024), (1000, 1024), (1024, 1024)]
)
def test_sizes_are_rounded_to_512_bytes(nbytes: int, allocated: int) -> None:
    a = ByHand()
    a.malloc(nbytes)
    assert (a.allocated, a.reserved) == (allocated, 2 * MiB)


@pytest.mark.parametrize(
    ("nbytes", "segment"),
    [
        (512, 2 * MiB),
        (1 * MiB, 2 * MiB),
        (1 * MiB + 1, 20 * MiB),
        (10 * MiB - 512, 20 * MiB),
        (10 * MiB, 10 * MiB),
        (10 * MiB + 1, 12 * MiB),
        (12 * MiB, 12 * MiB),
        (20 * MiB + 512, 22 * MiB),
        (1000 * MiB + 1, 1002 * MiB),
    ],
)
def test_segments(nbytes: int, segment: int) -> None:
    a = ByHand()
    a.malloc(nbytes)
    rounded = -(-nbytes // 512) * 512
    assert a.reserved == segment == segment_bytes(rounded)


def test_small_blocks_share_a_segment() -> None:
    a = ByHand()
    for _ in range(4):
        a.malloc(512 * KiB)
    assert (a.allocated, a.reserved) == (2 * MiB, 2 * MiB)
    a.malloc(1)
    assert (a.allocated, a.reserved) == (2 * MiB + 512, 4 * MiB)


def test_medium_blocks_share_twenty_mebibytes() -> None:
    a = ByHand()
    for n, reserved in [(9, 20), (9, 20), (2, 20), (2, 40)]:
        a.malloc(n * MiB)
        assert a.reserved == reserved * MiB
    assert a.allocated == 22 * MiB


def test_a_large_remainder_of_a_mebibyte_or_less_is_not_split_off() -> None:
    a = ByHand()
    a.malloc(11 * MiB)  # a segment of 12: what is left, 1 MiB, stays with the block
    assert (a.allocated, a.reserved) == (12 * MiB, 12 * MiB)
    b = ByHand()
    b.malloc(11 * MiB - 512)  # 1 MiB and 512 B are left: a block of their own
    assert (b.allocated, b.reserved) == (11 * MiB - 512, 12 * MiB)
    b.malloc(1 * MiB + 512)
    assert (b.allocated, b.reserved) == (12 * MiB, 12 * MiB)


def test_a_small_remainder_is_always_split_off() -> None:
    a = ByHand()
    a.malloc(1 * MiB)
    a.malloc(1 * MiB - 512)
    a.malloc(512)
    assert (a.allocated, a.reserved) == (2 * MiB, 2 * MiB)


def test_pools_do_not_lend_to_each_other() -> None:
    a = ByHand()
    a.free(a.malloc(9 * MiB))
    a.malloc(512)
    assert a.reserved == 22 * MiB
    a.free(a.malloc(512))
    a.malloc(2 * MiB)
    assert a.reserved == 22 * MiB


def test_the_smallest_free_block_that_is_large_enough_serves() -> None:
    a = ByHand()
    blocks = [a.malloc(n * MiB) for n in (40, 30, 50)]
    for block in blocks:
        a.free(block)
    assert a.malloc(29 * MiB) is not None
    # of 40, 30 and 50 the one of 30 served, with its last mebibyte
    assert (a.allocated, a.reserved) == (30 * MiB, 120 * MiB)
    a.malloc(40 * MiB)
    assert (a.allocated, a.reserved) == (70 * MiB, 120 * MiB)
    a.malloc(51 * MiB)  # 50 is too small: a new segment of 52
    assert a.reserved == 172 * MiB


def test_of_equal_blocks_the_lowest_address_serves_and_segments_grow_downwards() -> None:
    a = ByHand()
    first, second = a.malloc(30 * MiB), a.malloc(30 * MiB)
    a.free(first)
    a.free(second)
    assert a.malloc(30 * MiB) is second


def test_large_segments_are_aligned_and_small_ones_fill_the_gaps() -> None:
    a = ByHand()
    assert a.place(20 * MiB) == -20 * MiB
    assert a.place(40 * MiB) == -64 * MiB  # from -64 to -24: 4 MiB stay free above, none below
    assert a.place(2 * MiB) == -22 * MiB
    assert a.place(4 * MiB) == -68 * MiB  # 2 MiB are left above, so it lies below all
    assert a.copy().place(2 * MiB) == -24 * MiB


def test_addresses_given_back_serve_again() -> None:
    a = ByHand()
    blocks = [a.malloc(n * MiB) for n in (20, 40, 12, 12)]
    assert [block[1] // MiB for block in blocks] == [-20, -64, -76, -88]
    for block in blocks[:3]:
        a.free(block)
    a.empty_cache()
    assert a.place(60 * MiB) == -64 * MiB  # the first two are one gap now
    assert a.place(12 * MiB) == -76 * MiB


def test_within_a_segment_the_lowest_address_comes_first() -> None:
    a = ByHand()
    left, _, right, _ = (a.malloc(4 * MiB) for _ in range(4))
    a.malloc(4 * MiB)  # the segment's last
    a.free(right)
    a.free(left)
    assert a.malloc(4 * MiB)[1] == left[1]


def test_neighbours_merge_on_both_sides() -> None:
    a = ByHand()
    left, middle, right = (a.malloc(4 * MiB) for _ in range(3))
    last = a.malloc(8 * MiB)  # 20 in all: the segment is full
    a.free(left)
    a.free(right)
    a.malloc(5 * MiB)  # no two neighbours are free
    assert a.reserved == 40 * MiB
    a.free(middle)
    a.malloc(12 * MiB)  # 4 + 4 + 4
    assert a.reserved == 40 * MiB
    a.free(last)
    assert a.allocated == 17 * MiB


def test_segments_do_not_merge() -> None:
    a = ByHand()
    for block in [a.malloc(20 * MiB), a.malloc(20 * MiB)]:
        a.free(block)
    a.malloc(40 * MiB)
    assert a.reserved == 80 * MiB


def test_segments_are_kept_until_the_cache_is_emptied() -> None:
    a = ByHand()
    stays = a.malloc(3 * MiB)
    a.free(a.malloc(100 * MiB))
    a.free(a.malloc(512))
    assert (a.allocated, a.peak_allocated, a.reserved) == (3 * MiB, 103 * MiB, 122 * MiB)
    a.empty_cache()  # the segment of 20 is in use
    assert (a.allocated, a.peak_allocated, a.reserved) == (3 * MiB, 3 * MiB, 20 * MiB)
    a.malloc(17 * MiB)
    assert a.reserved == 20 * MiB
    a.free(stays)
    a.empty_cache()
    assert a.reserved == 20 * MiB


def test_a_copy_goes_its_own_way() -> None:
    a = ByHand()
    held = a.malloc(4 * MiB)
    a.free(a.malloc(30 * MiB))
    b = a.copy()
    block = b.malloc(16 * MiB)  # the rest of the segment of 20 fits best
    assert (b.allocated, b.reserved) == (20 * MiB, 50 * MiB)
    assert (a.allocated, a.reserved) == (4 * MiB, 50 * MiB)
    b.malloc(31 * MiB)
    b.free(block)
    assert b.allocated == 36 * MiB  # the segment of 32 whole: 1 MiB stays
    assert (a.allocated, a.reserved, a.peak_allocated) == (4 * MiB, 50 * MiB, 34 * MiB)
    a.free(held)
    a.malloc(20 * MiB)
    assert a.reserved == 50 * MiB
    b.malloc(16 * MiB)
    b.malloc(30 * MiB)
    assert b.reserved == 82 * MiB  # both were free in the copy, which knows nothing of what happened to the other


def test_streams_do_not_lend_to_each_other() -> None:
    a = ByHand()
    a.free(a.malloc(30 * MiB, 1))
    a.free(a.malloc(100, 1))
    a.malloc(30 * MiB)
    a.malloc(100)
    assert a.reserved == 64 * MiB
    a.malloc(30 * MiB, 1)
    assert a.reserved == 64 * MiB
    copy = a.copy()
    copy.free(copy.malloc(40 * MiB, 1))
    copy.malloc(40 * MiB, 2)
    assert copy.reserved == 144 * MiB
    copy.empty_cache()  # of stream 1 the 40, and 2 of the small blocks
    assert (copy.reserved, a.reserved) == (102 * MiB, 64 * MiB)


def test_peak_is_the_fullest_moment() -> None:
    a = ByHand()
    first = a.malloc(4 * MiB)
    a.free(a.malloc(8 * MiB))
    a.free(first)
    assert (a.allocated, a.peak_allocated, a.reserved) == (0, 12 * MiB, 20 * MiB)


# --- timelines


def test_replay_tells_the_event_of_the_peak() -> None:
    t = Timeline(Standing(((3 * MiB, TAG),)))
    first = t.alloc(4 * MiB, TAG)
    t.alloc(0, TAG)
    t.moment(TAG, 6 * MiB, 1 * MiB)  # events 3 to 6
    t.free(first)
    t.moment(TAG, 2 * MiB)
    # 3 + 4 + 6 + 1, the last one in the small pool: 20 and 2 MiB reserved
    assert replay(t) == Peaks(14 * MiB, 22 * MiB, 4)
    assert t.live(4) == [0, 1, 2, 3]


def test_nothing_costs_nothing() -> None:
    assert replay(Timeline(Standing(()))) == Peaks(0, 0, 0)
    t = Timeline(Standing(((512, TAG),)))
    t.free(t.alloc(0, TAG))
    assert replay(t) == Peaks(512, 2 * MiB, 0)


def test_a_replay_leaves_no_trace() -> None:
    standing = Standing(((5 * MiB, TAG), (700, TAG), (32 * MiB, TAG)))
    t = Timeline(standing)
    t.moment(TAG, 14 * MiB, 300)
    # 14 of the 15 that are left of the segment of 20: the last one is not split off; 1024 + 512 small
    first = replay(t)
    assert first == Peaks(52 * MiB + 1536, 54 * MiB, 2)
    assert replay(t) == first
    assert stand(standing).allocated == 37 * MiB + 1024


def test_peaks_start_anew_once_the_model_stands() -> None:
    t = Timeline(Standing(((3 * MiB, TAG),)))
    t.moment(TAG, 50 * MiB)
    stays = t.alloc(30 * MiB, TAG)  # out of the segment of 50, which is in use now
    t.restart()  # after 3 events
    t.moment(TAG, 8 * MiB)
    t.free(stays)
    assert replay(t) == Peaks(41 * MiB, 70 * MiB, 4)
    t.restart()  # the 50 are given back: what comes now fits in the segment of 20
    t.moment(TAG, 17 * MiB)
    assert replay(t) == Peaks(20 * MiB, 20 * MiB, 7)


def test_a_timeline_names_the_stream() -> None:
    t = Timeline(Standing(()))
    t.moment(TAG, 30 * MiB)
    other = t.alloc(30 * MiB, TAG)
    assert replay(t).reserved_bytes == 30 * MiB
    t.streams[other] = 1
    assert replay(t) == Peaks(30 * MiB, 60 * MiB, 1)


def test_phases_and_what_is_live() -> None:
    t = Timeline(Standing(()))
    first = t.alloc(1, TAG)
    t.mark("prefill")
    second = t.alloc(2, TAG)
    t.free(first)
    t.mark("decode")
    t.alloc(3, TAG)
    assert [t.phase_at(i) for i in range(5)] == ["start", "start", "prefill", "prefill", "decode"]
    assert (t.live(2), t.live(3), t.live(4)) == ([first, second], [second], [second, 2])


# --- against a second model


class Plain:
    """The same rules, written without a thought of speed: segments are lists of [size, name or None]."""

    def __init__(self) -> None:
        self.segments: list[tuple[tuple[bool, int], list[list[int | None]]]] = []
        self.peak = 0

    def malloc(self, name: int, nbytes: int, stream: int) -> None:
        size = max(512, -(-nbytes // 512) * 512)
        small = size <= MiB
        fits = [
            (block[0], i, j)
            for i, (pool, blocks) in enumerate(self.segments)
            for j, block in enumerate(blocks)
            if pool == (small, stream) and block[1] is None and block[0] is not None and block[0] >= size
        ]
        if fits:
            _, i, j = min(fits)
        else:
            whole = 2 * MiB if small else 20 * MiB if size < 10 * MiB else -(-size // (2 * MiB)) * 2 * MiB
            self.segments.append(((small, stream), [[whole, None]]))
            i, j = len(self.segments) - 1, 0
        blocks = self.segments[i][1]
        rest = (blocks[j][0] or 0) - size
        if rest >= 512 if small else rest > MiB:
            blocks[j : j + 1] = [[size, name], [rest, None]]
        else:
            blocks[j][1] = name
        self.peak = max(self.peak, self.allocated)

    def free(self, name: int) -> None:
        for _, blocks in self.segments:
            for block in blocks:
                if block[1] == name:
                    block[1] = None
            j = 0
            while j + 1 < len(blocks):
                if blocks[j][1] is None and blocks[j + 1][1] is None:
                    blocks[j : j + 2] = [[(blocks[j][0] or 0) + (blocks[j + 1][0] or 0), None]]
                else:
                    j += 1

    def empty_cache(self) -> None:
        self.segments = [s for s in self.segments if any(b[1] is not None for b in s[1])]
        self.peak = self.allocated

    @property
    def allocated(self) -> int:
        return sum(b[0] or 0 for _, blocks in self.segments for b in blocks if b[1] is not None)

    @property
    def reserved(self) -> int:
        return sum(b[0] or 0 for _, blocks in self.segments for b in blocks)


near = [n + d for n in (512, MiB, 2 * MiB, 9 * MiB, 10 * MiB, 12 * MiB, 20 * MiB, 64 * MiB) for d in (-511, -1, 0, 1)]
sizes = st.sampled_from(near) | st.integers(1, 3 * MiB) | st.integers(1, 100 * MiB)
steps = st.lists(st.tuples(st.sampled_from("mmmmfffe"), sizes, st.integers(0, 1000)), max_size=120)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(steps)
def test_against_a_second_model(steps: list[tuple[str, int, int]]) -> None:
    a, plain, live = ByHand(), Plain(), dict[int, Block]()
    for name, (what, nbytes, which) in enumerate(steps):
        if what == "m":
            live[name] = a.malloc(nbytes, which % 2)
            plain.malloc(name, nbytes, which % 2)
        elif what == "f" and live:
            gone = sorted(live)[which % len(live)]
            a.free(live.pop(gone))
            plain.free(gone)
        elif what == "e":
            a.empty_cache()
            plain.empty_cache()
        assert (a.allocated, a.reserved, a.peak_allocated) == (plain.allocated, plain.reserved, plain.peak)
    assert sum(block[SIZE] for block in live.values()) == a.allocated
    assert not any(block[FREE] for block in live.values())


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(steps, steps)
def test_a_copy_behaves_like_the_original(
    before: list[tuple[str, int, int]], after: list[tuple[str, int, int]]
) -> None:
    """Whatever stood before is not freed any more: the copy then answers every later sequence alike."""
    a = ByHand()
    old: list[Block] = []
    for what, nbytes, which in before:
        if what == "m":
            old.append(a.malloc(nbytes, which % 2))
        elif what == "f" and old:
            a.free(old.pop(which % len(old)))
        elif what == "e":
            a.empty_cache()
    b = a.copy()
    ours: list[Block] = []
    theirs: list[Block] = []
    for what, nbytes, which in after:
        if what == "m":
            ours.append(a.malloc(nbytes, which % 2))
            theirs.append(b.malloc(nbytes, which % 2))
        elif what == "f" and ours:
            i = which % len(ours)
            a.free(ours.pop(i))
            b.free(theirs.pop(i))
        elif what == "e":
            a.empty_cache()
            b.empty_cache()
        assert (a.allocated, a.reserved, a.peak_allocated) == (b.allocated, b.reserved, b.peak_allocated)
