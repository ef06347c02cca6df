"""CUDA's caching allocator, replayed: what a sequence of allocations and frees costs in allocated and reserved bytes.

Source: PyTorch 2.11, c10/cuda/CUDACachingAllocator.cpp with default settings (`kMinBlockSize` 512 B, `kSmallSize` and
`kSmallBuffer` 1 and 2 MiB, `kLargeBuffer` 20 MiB, `kMinLargeAlloc` 10 MiB, `kRoundLarge` 2 MiB): sizes are rounded to
512 B; the smallest free block that is large enough serves; it is split unless the remainder is small; free neighbours
merge; a segment is never given back while there is room.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from hfvram.memory.timeline import Standing, Timeline

SMALL = 1 << 20
SMALL_SEGMENT = 2 << 20
LARGE_SEGMENT = 20 << 20
LARGE = 10 << 20
ROUND_SEGMENT = 2 << 20

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
    """One device's allocator. `allocated` and `reserved` are bytes now, `peak_allocated` at their fullest.

    Free blocks lie in pools, of small and of large ones for each stream: what one stream freed, no other gets.
    """

    __slots__ = ("allocated", "end", "peak_allocated", "pools", "reserved")

    def __init__(self) -> None:
        self.allocated = self.reserved = self.peak_allocated = 0
        self.end = 0
        self.pools: dict[int, tuple[Pool, Pool]] = {0: ([], [])}

    def malloc(self, nbytes: int, stream: int = 0) -> Block:
        size = (nbytes + 511) & ~511 or 512
        pools = self.pools.get(stream) or self.pools.setdefault(stream, ([], []))
        small = size <= SMALL
        pool = pools[0] if small else pools[1]
        at = bisect_left(pool, (size,))
        if at < len(pool):
            block = pool.pop(at)[2]
            block[FREE] = False
        else:
            segment = segment_bytes(size)
            block = [segment, self.end, False, None, None, pool]
            self.end += segment
            self.reserved += segment
        rest = block[SIZE] - size
        if rest > SMALL or (rest and small):
            after = block[AFTER]
            remainder = [rest, block[ADDRESS] + size, True, block, after, pool]
            if after is not None:
                after[BEFORE] = remainder
            block[AFTER] = remainder
            block[SIZE] = size
            insort(pool, (rest, remainder[ADDRESS], remainder))
        self.allocated += block[SIZE]
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        return block

    def free(self, block: Block) -> None:
        pool = block[POOL]
        self.allocated -= block[SIZE]
        before, after = block[BEFORE], block[AFTER]
        if before is not None and before[FREE]:
            del pool[bisect_left(pool, (before[SIZE], before[ADDRESS]))]
            before[SIZE] += block[SIZE]
            before[AFTER] = after
            if after is not None:
                after[BEFORE] = before
            block = before
        if after is not None and after[FREE]:
            del pool[bisect_left(pool, (after[SIZE], after[ADDRESS]))]
            block[SIZE] += after[SIZE]
            block[AFTER] = beyond = after[AFTER]
            if beyond is not None:
                beyond[BEFORE] = block
        block[FREE] = True
        insort(pool, (block[SIZE], block[ADDRESS], block))

    def empty_cache(self) -> None:
        """Give back every segment that is wholly free (`torch.cuda.empty_cache`), and forget the peak."""
        for pool in (pool for pools in self.pools.values() for pool in pools):
            whole = [x for x in pool if x[2][BEFORE] is None and x[2][AFTER] is None]
            self.reserved -= sum(x[0] for x in whole)
            pool[:] = [x for x in pool if x[2][BEFORE] is not None or x[2][AFTER] is not None]
        self.peak_allocated = self.allocated

    def copy(self) -> "Allocator":
        """The same state for blocks that come later. What stands now can't be freed in the copy, nor merged with."""
        other = Allocator()
        other.allocated, other.reserved, other.peak_allocated = self.allocated, self.reserved, self.peak_allocated
        other.end = self.end
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
def stand(standing: Standing) -> Allocator:
    """The allocator once weights and buffers stand, unused segments given back."""
    allocator = Allocator()
    for nbytes, _ in standing.tensors:
        if nbytes:
            allocator.malloc(nbytes)
    allocator.empty_cache()
    return allocator


def replay(timeline: Timeline) -> Peaks:
    """Run a timeline through the allocator."""
    allocator = stand(timeline.standing).copy()
    malloc, free, sizes, streams = allocator.malloc, allocator.free, timeline.sizes, timeline.streams
    blocks: dict[int, Block] = {}
    peak, peak_event, reserved, start = allocator.allocated, 0, allocator.reserved, 0
    for stop in (*timeline.restarts, len(timeline.events)):
        if start:
            allocator.empty_cache()
            peak, peak_event, reserved = allocator.allocated, start, allocator.reserved
        for i, event in enumerate(timeline.events[start:stop], start + 1):
            if event >= 0:
                if nbytes := sizes[event]:
                    blocks[event] = malloc(nbytes, streams[event]) if event in streams else malloc(nbytes)
                    if allocator.allocated > peak:
                        peak, peak_event = allocator.allocated, i
            elif (block := blocks.pop(~event, None)) is not None:
                free(block)
        start = stop
    return Peaks(peak, max(reserved, allocator.reserved), peak_event)
