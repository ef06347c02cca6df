"""Layers of one shape allocate alike: the events of one are written again for the rest, at a fraction of the time."""

from typing import NamedTuple

from hfvram.memory.timeline import Tag, Timeline


class Pattern(NamedTuple):
    """Sizes, tags and events of a layer, counted from its first handle; which handles are its cache and its output."""

    sizes: list[int]
    tags: list[Tag]
    events: list[int]
    cache: list[int]
    out: int


def pattern(t: Timeline, first_event: int, first_handle: int, cache: list[int], out: int) -> Pattern:
    """What the timeline holds since `first_event`, the first handle of which was `first_handle`."""
    return Pattern(
        sizes=t.sizes[first_handle:],
        tags=t.tags[first_handle:],
        events=[e - first_handle if e >= 0 else e + first_handle for e in t.events[first_event:]],
        cache=[handle - first_handle for handle in cache],
        out=out - first_handle,
    )


def repeat(t: Timeline, layer: Pattern, cache: list[int]) -> int:
    """Write the pattern once more; `cache` gets its handles. Returns that of the output."""
    base = len(t.sizes)
    t.sizes += layer.sizes
    t.tags += layer.tags
    t.events += [base + e if e >= 0 else e - base for e in layer.events]
    cache += [base + i for i in layer.cache]
    return base + layer.out
