"""CUDA's caching allocator with `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`: one segment a pool, which grows.

Source: PyTorch 2.11, c10/cuda/CUDACachingAllocator.cpp (`ExpandableSegment`, `find_expandable_block`, `map_block`,
`get_free_block`, `should_split`, `unmap_block`). Each pool of each stream reserves more addresses than the GPU has
memory, and maps pages where they are needed, 2 MiB for small blocks and 20 MiB for large ones; free neighbours merge
over pages; every remainder is split off. Not measured.
"""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from typing import Final

SMALL: Final = 1 << 20
SMALL_PAGE: Final = 2 << 20
LARGE_PAGE: Final = 20 << 20
ADDRESSES: Final = 1 << 60
"""More than any GPU holds: PyTorch reserves nine eighths of its memory, and would take a second segment beyond."""


class Block:
    """A stretch of addresses: in use, free, or without memory behind it."""

    __slots__ = ("address", "after", "before", "free", "mapped", "size")

    def __init__(self, address: int, size: int, before: "Block | None", after: "Block | None") -> None:
        self.address, self.size = address, size
        self.before, self.after = before, after
        self.free, self.mapped = True, False
        if before:
            before.after = self
        if after:
            after.before = self

    def expandable_size(self) -> int:
        """The size, with what lies behind it if that could still be mapped."""
        return self.size + (self.after.size if self.after and not self.after.mapped else 0)


class Segment:
    """One pool's addresses, in order from `first`; free blocks by size, those without memory by address."""

    __slots__ = ("first", "free", "page", "unmapped")

    def __init__(self, page: int) -> None:
        self.page = page
        self.first = Block(0, ADDRESSES, None, None)
        self.free: list[tuple[int, int, Block]] = []
        self.unmapped: list[tuple[int, Block]] = [(0, self.first)]

    def take(self, size: int) -> tuple[Block, int]:
        """A block of at least this size, no longer free, and how many bytes were mapped for it.

        The smallest that is large enough, where a block that could still grow counts as that large.
        """
        at = bisect_left(self.free, (size,))
        if at == len(self.free):
            return self._grow(size)
        while at + 1 < len(self.free) and self.free[at + 1][2].expandable_size() < self.free[at][2].expandable_size():
            at += 1
        return self.free.pop(at)[2], 0

    def give(self, block: Block) -> None:
        """Make a block free, one with its free neighbours."""
        block.free = True
        for side in (block.before, block.after):
            if side and side.free and side.mapped == block.mapped:
                self._forget(side)
                self._join(block, side)
        self._keep(block)

    def split(self, block: Block, size: int) -> None:
        """Cut a block to `size`; what is left is free, or without memory, as it was."""
        rest = Block(block.address + size, block.size - size, block, block.after)
        rest.mapped = block.mapped
        block.size = size
        self._keep(rest)

    def unmap(self) -> int:
        """Give back every page that is wholly free; how many bytes that were."""
        before = sum(size for size, _, _ in self.free)
        for _, _, block in list(self.free):
            first, last = (
                -(-block.address // self.page) * self.page,
                (block.address + block.size) // self.page * self.page,
            )
            if first >= last:
                continue
            self._forget(block)
            if block.address < first:
                self.split(block, first - block.address)
                self._keep(block)
                assert block.after is not None
                block = block.after
                self._forget(block)
            if last < block.address + block.size:
                self.split(block, last - block.address)
            block.mapped = False
            self.give(block)
        return before - sum(size for size, _, _ in self.free)

    def copy(self) -> "Segment":
        """The same stretches; what is in use can't be freed in the copy."""
        other = Segment(self.page)
        other.unmapped.clear()
        last: Block | None = None
        here: Block | None = self.first
        while here:
            block = Block(here.address, here.size, last, None)
            block.free, block.mapped = here.free, here.mapped
            if last is None:
                other.first = block
            if block.free:
                other._keep(block)
            last, here = block, here.after
        return other

    def _grow(self, size: int) -> tuple[Block, int]:
        """Map pages at the lowest address with room for `size`, a free block right before them included."""
        block = next(b for b in map(self._start, (u for _, u in self.unmapped)) if self._has_room(b, size))
        mapped = 0
        if not block.mapped:
            mapped = self._map(block, size)
        while block.size < size:
            behind = block.after
            assert behind is not None
            mapped += self._map(behind, size - block.size)
            block = behind
        self._forget(block)
        return block, mapped

    @staticmethod
    def _start(unmapped: Block) -> Block:
        before = unmapped.before
        return before if before and before.free else unmapped

    @staticmethod
    def _has_room(block: Block | None, size: int) -> bool:
        room = 0
        while room < size and block and block.free:
            room += block.size
            block = block.after
        return room >= size

    def _map(self, block: Block, size: int) -> int:
        size = min(-(-size // self.page) * self.page, block.size)
        self._forget(block)
        if size < block.size:
            self.split(block, size)
        block.mapped = True
        self.give(block)
        return size

    def _join(self, block: Block, side: Block) -> None:
        block.size += side.size
        if side is block.before:
            block.address, block.before = side.address, side.before
            if side.before:
                side.before.after = block
        else:
            block.after = side.after
            if side.after:
                side.after.before = block
        if side is self.first:
            self.first = block

    def _keep(self, block: Block) -> None:
        if block.mapped:
            insort(self.free, (block.size, block.address, block))
        else:
            insort(self.unmapped, (block.address, block))

    def _forget(self, block: Block) -> None:
        if block.mapped:
            del self.free[bisect_left(self.free, (block.size, block.address))]
        else:
            del self.unmapped[bisect_left(self.unmapped, (block.address,))]


class ExpandableAllocator:
    """One device's allocator; the same questions as `Allocator` answers."""

    __slots__ = ("allocated", "blocks", "reserved", "segments")

    def __init__(self) -> None:
        self.allocated = self.reserved = 0
        self.blocks: dict[int, tuple[Block, Segment]] = {}
        self.segments: dict[tuple[int, bool], Segment] = {}

    def run(
        self,
        events: Sequence[int],
        sizes: Sequence[int] | Mapping[int, int],
        streams: Mapping[int, int] | None = None,
    ) -> tuple[int, int]:
        """Allocate `sizes[e]` for each event e ≥ 0, and free it at ~e; nothing is done for 0 bytes.

        Returns the peak of allocated bytes, and after how many of these events it first stands (0: at the start).
        """
        streams = streams or {}
        peak, peak_event = self.allocated, 0
        for i, event in enumerate(events, 1):
            if event >= 0:
                if not sizes[event]:
                    continue
                size = (sizes[event] + 511) & -512
                segment = self._segment(streams.get(event, 0), size <= SMALL)
                block, mapped = segment.take(size)
                block.free = False
                self.reserved += mapped
                if block.size > size:
                    segment.split(block, size)
                self.blocks[event] = block, segment
                self.allocated += size
                if self.allocated > peak:
                    peak, peak_event = self.allocated, i
            elif (known := self.blocks.pop(~event, None)) is not None:
                block, segment = known
                self.allocated -= block.size
                segment.give(block)
        return peak, peak_event

    def empty_cache(self) -> None:
        """Give back every page that is wholly free (`torch.cuda.empty_cache`)."""
        self.reserved -= sum(segment.unmap() for segment in self.segments.values())

    def copy(self) -> "ExpandableAllocator":
        """The same state for blocks that come later. What stands now can't be freed in the copy."""
        other = ExpandableAllocator()
        other.allocated, other.reserved = self.allocated, self.reserved
        other.segments = {key: segment.copy() for key, segment in self.segments.items()}
        return other

    def _segment(self, stream: int, small: bool) -> Segment:
        if (stream, small) not in self.segments:
            self.segments[stream, small] = Segment(SMALL_PAGE if small else LARGE_PAGE)
        return self.segments[stream, small]
