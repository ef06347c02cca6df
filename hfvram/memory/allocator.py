"""CUDA's caching allocator, replayed: what a sequence of allocations and frees costs in allocated and reserved bytes.

Source: PyTorch 2.11, c10/cuda/CUDACachingAllocator.cpp with default settings (`kMinBlockSize` 512 B, `kSmallSize` and
`kSmallBuffer` 1 and 2 MiB, `kLargeBuffer` 20 MiB, `kMinLargeAlloc` 10 MiB, `kRoundLarge` 2 MiB): sizes are rounded to
512 B; the smallest free block that is large enough serves; it is split unless the remainder is small; free neighbours
merge; a segment is never given back while there is room. Of free blocks of one size the lowest address serves.

Where cudaMalloc puts a segment is fitted, its addresses were not seen: below those before it, one of 32 MiB or more at
a multiple of 32 MiB, a smaller one in the highest gap that this leaves. So 76 of 120 measured cases reserve
exactly what was measured; without the alignment 73, with segments that grow upwards 68. It matters in 39 of them, and
in one the answer is far off (a Mamba-2 without its kernels, +82 %: it hangs on 2 MiB in 19 GiB).
"""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from typing import Any

from hfvram.memory.expandable import ExpandableAllocator
from hfvram.memory.timeline import Standing, Timeline

SMALL = 1 << 20
SMALL_SEGMENT = 2 << 20
LARGE_SEGMENT = 20 << 20
LARGE = 10 << 20
ROUND_SEGMENT = 2 << 20
PREFETCH, GRAPHS = 100, 101
"""Streams beside those of sharded training: an offloaded cache's, and one for the pool that CUDA graphs have."""
ALIGNED = 32 << 20
"""Segments of this size and more lie at its multiples."""

# A block is a list, the quickest record that Python has: size, address, whether it is free, its neighbours, its pool.
SIZE, ADDRESS, FREE, BEFORE, AFTER, POOL = range(6)
Block = list[Any]
Pool = list[tuple[int, int, Block]]


def segment_bytes(size: int) -> int:
    """What is asked of the driver for a block of this (rounded) size that no free block can serve."""
    if size <= SMALL:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if size < LARGE else -(-size // ROUND_SEGMENT) * ROUND_SEGMENT


class Allocator:
    """One device's allocator. `allocated` and `reserved` are bytes now.

    Free blocks lie in pools, of small and of large ones for each stream: what one stream freed, no other gets.
    """

    __slots__ = ("allocated", "blocks", "gaps", "pools", "reserved")

    def __init__(self) -> None:
        self.allocated = self.reserved = 0
        self.gaps: list[tuple[float, int]] = [(-inf, 0)]
        """Free addresses, from the highest downwards: what alignment left, then everything below."""
        self.blocks: dict[int, Block] = {}
        self.pools: dict[int, tuple[Pool, Pool]] = {0: ([], [])}

    def run(
        self,
        events: Sequence[int],
        sizes: Sequence[int] | Mapping[int, int],
        streams: Mapping[int, int] | None = None,
    ) -> tuple[int, int]:
        """Allocate `sizes[e]` for each event e ≥ 0, and free it at ~e; nothing is done for 0 bytes.

        Returns the peak of allocated bytes, and after how many of these events it first stands (0: at the start).

        One loop without calls: a hundred thousand events are a large model's, and each of them counts.
        """
        streams = streams or {}
        pools, blocks, (small_pool, large_pool) = self.pools, self.blocks, self.pools[0]
        allocated, reserved = self.allocated, self.reserved
        peak, peak_event = allocated, 0
        for i, event in enumerate(events, 1):
            if event >= 0:
                if not (nbytes := sizes[event]):
                    continue
                size = (nbytes + 511) & -512
                small = size <= SMALL
                if event in streams:
                    pool = pools.setdefault(streams[event], ([], []))[0 if small else 1]
                else:
                    pool = small_pool if small else large_pool
                at = bisect_left(pool, (size,))
                if at < len(pool):
                    block = pool.pop(at)[2]
                    block[FREE] = False
                else:
                    segment = segment_bytes(size)
                    block = [segment, self.place(segment), False, None, None, pool]
                    reserved += segment
                rest = block[SIZE] - size
                if rest > SMALL or (rest and small):
                    after, address = block[AFTER], block[ADDRESS] + size
                    remainder = [rest, address, True, block, after, pool]
                    if after is not None:
                        after[BEFORE] = remainder
                    block[AFTER] = remainder
                    block[SIZE] = size
                    insort(pool, (rest, address, remainder))
                    allocated += size
                else:
                    allocated += block[SIZE]
                blocks[event] = block
                if allocated > peak:
                    peak, peak_event = allocated, i
            elif (freed := blocks.pop(~event, None)) is not None:
                size, address, _, before, after, pool = block = freed
                allocated -= size
                if before is not None and before[FREE]:
                    del pool[bisect_left(pool, (before[SIZE], before[ADDRESS]))]
                    before[SIZE] = size = before[SIZE] + size
                    before[AFTER] = after
                    if after is not None:
                        after[BEFORE] = before
                    block, address = before, before[ADDRESS]
                if after is not None and after[FREE]:
                    del pool[bisect_left(pool, (after[SIZE], after[ADDRESS]))]
                    block[SIZE] = size = size + after[SIZE]
                    block[AFTER] = beyond = after[AFTER]
                    if beyond is not None:
                        beyond[BEFORE] = block
                block[FREE] = True
                insort(pool, (size, address, block))
        self.allocated, self.reserved = allocated, reserved
        return peak, peak_event

    def place(self, segment: int) -> int:
        """The address of a new segment."""
        step = ALIGNED if segment >= ALIGNED else ROUND_SEGMENT
        for i, (low, high) in enumerate(self.gaps):
            if (address := (high - segment) // step * step) >= low:
                above, below = (address + segment, high), (low, address)
                self.gaps[i : i + 1] = [gap for gap in (above, below) if gap[0] < gap[1]]
                return address
        raise AssertionError("the lowest gap has no end")

    def empty_cache(self) -> None:
        """Give back every segment that is wholly free (`torch.cuda.empty_cache`)."""
        for pool in (pool for pools in self.pools.values() for pool in pools):
            whole = [x for x in pool if x[2][BEFORE] is None and x[2][AFTER] is None]
            self.reserved -= sum(x[0] for x in whole)
            self.gaps += [(address, address + size) for size, address, _ in whole]
            pool[:] = [x for x in pool if x[2][BEFORE] is not None or x[2][AFTER] is not None]
        gaps = sorted(self.gaps, reverse=True)
        self.gaps = gaps[:1]
        for low, high in gaps[1:]:
            if high == self.gaps[-1][0]:
                self.gaps[-1] = low, self.gaps[-1][1]
            else:
                self.gaps.append((low, high))

    def copy(self) -> "Allocator":
        """The same state for blocks that come later. What stands now can't be freed in the copy, nor merged with."""
        other = Allocator()
        other.allocated, other.reserved, other.gaps = self.allocated, self.reserved, [*self.gaps]
        for stream, pools in self.pools.items():
            other.pools[stream] = ([], [])
            for mine, pool in zip(pools, other.pools[stream], strict=True):
                for size, address, block in mine:
                    sides = [None if side is None else [0, 0, False, None, None, pool] for side in block[BEFORE:POOL]]
                    pool.append((size, address, [size, address, True, *sides, pool]))
        return other


@dataclass(frozen=True, slots=True)
class Peaks:
    """What a timeline costs. `event` is the number of events after which the peak of allocated bytes stands."""

    allocated_bytes: int
    reserved_bytes: int
    event: int


@lru_cache(maxsize=1024)
def stand(standing: Standing, expandable: bool = False) -> Allocator | ExpandableAllocator:
    """The allocator once weights and buffers stand, unused segments given back."""
    allocator = ExpandableAllocator() if expandable else Allocator()
    allocator.run(range(len(standing.tensors)), [nbytes for nbytes, _ in standing.tensors])
    allocator.empty_cache()
    return allocator


def replay(timeline: Timeline, expandable: bool = False) -> Peaks:
    """Run a timeline through the allocator, if asked the one of expandable segments; the peaks are those since its last
    restart.
    """
    allocator = stand(timeline.standing, expandable).copy()
    start, peak, event = 0, allocator.allocated, 0
    for stop in (*timeline.restarts, len(timeline.events)):
        if start:
            allocator.empty_cache()
        peak, event = allocator.run(timeline.events[start:stop], timeline.sizes, timeline.streams)
        event, start = start + event, stop
    return Peaks(peak, allocator.reserved, event)
