"""Layers that repeat are written five times and counted as often as they stand: of a run over five of them, the third
one's events are written again for all that are left out.

Every event belongs to a chunk: a phase of the run, and the repeated group of layers that is at work in it, or none. The
third group refers to tensors of its own, of its neighbours, and of none; with its number those shift alike. Where a run
is not of that kind, `stretch` says so, and every layer is written.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from hfvram.memory.timeline import Timeline
from hfvram.model.layers import Layer

WRITTEN: Final = 5
TEMPLATE: Final = 2
LONGEST_PERIOD: Final = 8

Segment = tuple[int, int, int | None]
"""(events before, handles before, group): where a chunk begins."""


class Plan(NamedTuple):
    """The layers to write, each with the number of its repeated group (0 to 4) or None; and how many groups there
    are in truth."""

    layers: list[tuple[Layer, int | None]]
    groups: int


def plan(layers: Sequence[Layer], every: int = 1) -> Plan:
    """The longest stretch of layers that repeat with a short period, shortened. Where one of `every` layers is
    checkpointed, the period is a multiple of that, and a layer's place in the plan says as its own whether it is.

    >>> a, b = Layer(), Layer(norm="layer")
    >>> short = plan([a, *[b, a] * 9, b])
    >>> len(short.layers), short.groups, [group for _, group in short.layers[-3:]]
    (10, 10, [3, 4, 4])
    >>> [plan([a] * 24, every).groups for every in (1, 2, 3, 5)]
    [24, 12, 8, 0]
    """
    best = (0, 0, 0, 0)
    for period in range(every, LONGEST_PERIOD * every + 1, every):
        start = 0
        for i in range(period, len(layers) + 1):
            if i < len(layers) and layers[i] is layers[i - period]:
                continue
            groups = (i - start) // period
            if groups > WRITTEN:
                best = max(best, ((groups - WRITTEN) * period, -period, start, groups))
            start = i - period + 1
    saved, minus_period, start, groups = best
    if not saved:
        return Plan([(x, None) for x in layers], 0)
    period = -minus_period
    written = [(layers[start + i % period], i // period) for i in range(WRITTEN * period)]
    after = layers[start + groups * period :]
    return Plan([*[(x, None) for x in layers[:start]], *written, *[(x, None) for x in after]], groups)


def copies(groups: int) -> int:
    """How many groups the third one stands for."""
    return groups - WRITTEN + 1


class _Chunk(NamedTuple):
    phase: int
    group: int | None
    events: range
    handles: range


def stretch(t: Timeline, segments: Sequence[Segment], groups: int) -> Timeline | None:
    """The timeline of all `groups` from that of five; None where they don't repeat event by event."""
    chunks = _chunks(t, segments)
    if not _repeats(t, chunks):
        return None
    owner: list[int] = []
    for i, chunk in enumerate(chunks):
        owner += [i] * len(chunk.handles)
    out = Timeline(t.standing)
    written: dict[tuple[int, int | None], int] = {}
    """Where the handles of a phase and the number of a group begin."""
    names = {at: [name for a, name in t.marks if a == at] for at, _ in t.marks}
    restarts = set(t.restarts)
    for i, chunk in enumerate(chunks):
        at = chunk.events.start
        if at in restarts:
            restarts.discard(at)
            out.restarts.append(len(out.events))
        for name in names.pop(at, ()):
            out.mark(name)
        relations = _relations(t, chunks, owner, chunk)
        rising = chunks[i - 1].group == TEMPLATE - 1
        for number in _numbers(chunk.group, groups, rising):
            written[chunk.phase, number] = len(out.sizes)
            out.sizes += t.sizes[chunk.handles.start : chunk.handles.stop]
            out.tags += t.tags[chunk.handles.start : chunk.handles.stop]
            shift = len(out.sizes) - chunk.handles.stop
            out.streams |= {h + shift: t.streams[h] for h in chunk.handles if h in t.streams}
            _write(out, chunk, number, relations, written, groups)
    for at in sorted(names):
        for name in names[at]:
            out.mark(name)
    kept = "symbols", "elsewhere", "gradients_bytes", "optimizer_bytes", "managed_bytes", "trainable_parameters"
    for name in kept:
        setattr(out, name, getattr(t, name))
    return out


def _chunks(t: Timeline, segments: Sequence[Segment]) -> list[_Chunk]:
    bounds: list[Segment] = [(0, 0, None), *segments, (len(t.events), len(t.sizes), None)]
    chunks, phase = [], 0
    for (event, handle, group), (end, last, _) in pairwise(bounds):
        phase += group is None
        chunks.append(_Chunk(phase, group, range(event, end), range(handle, last)))
    return chunks


def _repeats(t: Timeline, chunks: list[_Chunk]) -> bool:
    """Whether in each phase all groups are at work once, in order, and the three in the middle allocate alike."""
    found: dict[int, list[_Chunk]] = {}
    for chunk in chunks:
        if chunk.group is not None:
            found.setdefault(chunk.phase, []).append(chunk)
    for parts in found.values():
        order = [chunk.group for chunk in parts]
        if order not in (list(range(WRITTEN)), list(range(WRITTEN))[::-1]):
            return False
        middle = [t.sizes[c.handles.start : c.handles.stop] for c in parts[1:-1]]
        if not middle[0] == middle[1] == middle[2]:
            return False
    return True


def _numbers(group: int | None, groups: int, rising: bool) -> Sequence[int | None]:
    """The numbers of the groups that a written one stands for, in the order in which they run."""
    if group is None:
        return (None,)
    if group < TEMPLATE:
        return (group,)
    if group > TEMPLATE:
        return (groups - WRITTEN + group,)
    numbers = range(TEMPLATE, groups - TEMPLATE)
    return numbers if rising else numbers[::-1]


_Relation = tuple[bool, int, int | None, int]
"""Of an event: whether it frees, and the phase, group and place of its tensor."""


def _relations(t: Timeline, chunks: list[_Chunk], owner: list[int], chunk: _Chunk) -> list[_Relation]:
    found = []
    for at in chunk.events:
        event = t.events[at]
        handle = event if event >= 0 else ~event
        its = chunks[owner[handle]]
        found.append((event < 0, its.phase, its.group, handle - its.handles.start))
    return found


def _write(
    out: Timeline,
    chunk: _Chunk,
    number: int | None,
    relations: list[_Relation],
    written: dict[tuple[int, int | None], int],
    groups: int,
) -> None:
    """The events of one copy of a chunk: what it frees of the third group, all groups that this stands for have."""
    write = out.events.append
    run: list[tuple[int, int]] = []
    for frees, phase, group, place in relations:
        if number is None and group == TEMPLATE:
            run.append((phase, place))
            continue
        if run:
            _all(out, run, written, groups)
            run = []
        if group is None:
            target = None
        elif number is None:
            target = group if group < TEMPLATE else groups - WRITTEN + group
        else:
            assert chunk.group is not None
            target = number + group - chunk.group
        handle = written[phase, target] + place
        write(~handle if frees else handle)
    if run:
        _all(out, run, written, groups)


def _all(out: Timeline, run: list[tuple[int, int]], written: dict[tuple[int, int | None], int], groups: int) -> None:
    for number in range(TEMPLATE, groups - TEMPLATE):
        out.events += [~(written[phase, number] + place) for phase, place in run]
