"""Layers of one shape allocate alike: the events of one are written again for the rest, at a fraction of the time."""

from typing import NamedTuple

from hfvram.memory.timeline import Tag, Timeline


class Pattern(NamedTuple):
    """Sizes, tags and events of a layer, counted from its first handle; which are its cache, its output, and what
    is left of it when it is done."""

    sizes: list[int]
    tags: list[Tag]
    events: list[int]
    cache: list[int]
    out: int
    left: list[int]


def pattern(t: Timeline, first_event: int, cache: list[int], out: int, left: list[int]) -> Pattern:
    """What matters of what the timeline holds since `first_event`: what stays, what is live when that is allocated, and
    what is live at the fullest moment."""
    events, sizes = t.events[first_event:], t.sizes
    live: dict[int, None] = {}
    staying = {out, *cache, *left}
    wanted = set(staying)
    fullest: set[int] = set()
    total = most = 0
    for event in events:
        if event >= 0:
            live[event] = None
            total += sizes[event]
            if total > most:
                most, fullest = total, set(live)
            if event in staying:
                wanted.update(live)
        else:
            live.pop(~event, None)
            total -= sizes[~event]
    large = max((sizes[e] for e in events if e >= 0), default=0) // 4
    wanted.update(e for e in events if e >= 0 and sizes[e] >= large)
    kept = {handle: i for i, handle in enumerate(sorted(wanted | fullest))}
    return Pattern(
        sizes=[sizes[handle] for handle in kept],
        tags=[t.tags[handle] for handle in kept],
        events=[kept[e] if e >= 0 else ~kept[~e] for e in events if (e if e >= 0 else ~e) in kept],
        cache=[kept[handle] for handle in cache],
        out=kept[out],
        left=[kept[handle] for handle in left],
    )


def repeat(t: Timeline, layer: Pattern, cache: list[int], left: list[int]) -> int:
    """Write the pattern once more; `cache` and `left` get their handles. Returns that of the output."""
    base = len(t.sizes)
    t.sizes += layer.sizes
    t.tags += layer.tags
    t.events += [base + e if e >= 0 else e - base for e in layer.events]
    cache += [base + i for i in layer.cache]
    left += [base + i for i in layer.left]
    return base + layer.out
