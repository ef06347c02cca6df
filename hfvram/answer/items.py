"""A timeline at its peak → items that add up to it, each with its formula in numbers."""

from dataclasses import replace

from hfvram.answer.estimate import Item, Offloaded
from hfvram.memory.allocator import Peaks
from hfvram.memory.timeline import Elsewhere, Tag, Timeline

ROUNDING = Item(
    name="rounding",
    category="rounding",
    bytes=0,
    formula="blocks of 512 B; remainders of 1 MiB and less are not split off",
    source="PyTorch 2.11: c10/cuda/CUDACachingAllocator.cpp",
    certainty="derived",
)


def items(timeline: Timeline, peaks: Peaks) -> tuple[Item, ...]:
    """What is live at the peak, by name, largest first; what the allocator's rounding adds comes last."""
    groups: dict[Tag, tuple[int, int]] = {tag: (n, 0) for tag, n in timeline.standing.bytes_by_tag.items()}
    for handle in timeline.live(peaks.event):
        tag, nbytes = timeline.tags[handle], timeline.sizes[handle]
        if nbytes:
            total, count = groups.get(tag, (0, 0))
            groups[tag] = (total + nbytes, count + 1)
    rounding = peaks.allocated_bytes - sum(total for total, _ in groups.values())
    found = [
        Item(
            name=tag.name,
            category=tag.category,
            bytes=total,
            formula=in_numbers(tag, total, count, timeline.symbols),
            source=tag.source,
            certainty=tag.certainty,
        )
        for tag, (total, count) in groups.items()
    ]
    found.sort(key=lambda item: -item.bytes)
    if rounding:
        found.append(replace(ROUNDING, bytes=rounding))
    return tuple(found)


def offloaded(timeline: Timeline) -> tuple[Offloaded, ...]:
    """What is kept in CPU memory or on NVMe, by place and name, largest first."""
    groups: dict[tuple[Elsewhere, Tag], tuple[int, int]] = {}
    for place, tag, nbytes in timeline.elsewhere:
        total, count = groups.get((place, tag), (0, 0))
        groups[place, tag] = (total + nbytes, count + 1)
    found = [
        Offloaded(
            name=tag.name,
            category=tag.category,
            place=place,
            bytes=total,
            formula=in_numbers(tag, total, count, timeline.symbols),
            source=tag.source,
            certainty=tag.certainty,
        )
        for (place, tag), (total, count) in groups.items()
    ]
    return tuple(sorted(found, key=lambda item: -item.bytes))


def in_numbers(tag: Tag, total: int, count: int, symbols: dict[str, int]) -> str:
    """The tag's formula, how often it stands, and its numbers where they multiply to the bytes.

    >>> tag = Tag("x", "activations", "b·s·f·e")
    >>> in_numbers(tag, 3 * 1 * 8184 * 14336 * 2, 3, {"b": 1, "s": 8184, "f": 14336, "e": 2})
    '3 × b·s·f·e = 3 × 1·8,184·14,336·2'
    """
    if not tag.formula:
        return f"{count:,} tensors" if count > 1 else ""
    times = f"{count} × " if count > 1 else ""
    parts = tag.formula.split("·")
    values = [int(p) if p.isdigit() else symbols.get(p, 0) for p in parts]
    product = max(count, 1)
    for value in values:
        product *= value
    if product != total:
        return f"{times}{tag.formula}"
    return f"{times}{tag.formula} = {times}{'·'.join(f'{v:,}' for v in values)}"


def derived(found: tuple[Item, ...]) -> tuple[Item, ...]:
    """The items of a run on a GPU that was not measured: its kernels and workspaces follow PyTorch's source alone."""
    kinds = ("activations", "workspace")
    return tuple(replace(item, certainty="derived") if item.category in kinds else item for item in found)
