"""How memory goes through a training step: what is live of each category, from its first allocation to its last."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hfvram.answer import placing
from hfvram.answer.resolve import resolve
from hfvram.answer.simulated import SHELF, key_of, run
from hfvram.memory.allocator import replay
from hfvram.memory.timeline import Category, Timeline
from hfvram.model.identify import Model
from hfvram.read import cache
from hfvram.request import Request

MOMENTS = 400
"""A step has tens of thousands of allocations; of each stretch of them its fullest moment is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """Bytes as they were asked for, without the allocator's rounding, at moments in the order of allocations.

    `live_bytes` has a row for each category; `phases` say at which moment one begins; the peak stands at the moment
    `peak`, in `peak_phase`, and most of it is of `peak_category`.
    """

    categories: tuple[Category, ...]
    live_bytes: tuple[tuple[int, ...], ...]
    phases: tuple[tuple[int, str], ...]
    peak: int
    peak_phase: str
    peak_category: Category


def course_of(model: Model, asked: Request) -> Course | None:
    """Of the fullest GPU, by the engine that answers `asked`; None where it is no training."""
    request, _ = resolve(model.architecture, asked)
    if request.mode == "inference" or request.method == "guide" or model.components:
        return None
    if request.method == "simulate":
        key = key_of(model, request) + "-course"
        if (kept := cache.load(SHELF, key)) is not None:
            return _restored(kept)
        made = course(run(model, request), request.expandable_segments)
        cache.store(SHELF, key, asdict(made))
        return made
    timelines = [share.timeline for share in placing.shares_of(model, request)]
    fullest = max(timelines, key=lambda t: replay(t, request.expandable_segments).reserved_bytes + t.managed_bytes)
    return course(fullest, request.expandable_segments)


def course(timeline: Timeline, expandable_segments: bool = False) -> Course:
    """The step of a timeline in which its peak stands."""
    at = replay(timeline, expandable_segments).event
    start, stop = step(timeline.marks, at, len(timeline.events))
    categories: list[Category] = [tag.category for tag in timeline.standing.bytes_by_tag]
    categories = list(dict.fromkeys([*categories, *(tag.category for tag in timeline.tags)]))
    row = {category: i for i, category in enumerate(categories)}
    live = [0] * len(categories)
    for tag, count in timeline.standing.bytes_by_tag.items():
        live[row[tag.category]] += count
    stretch = -(-(stop - start) // MOMENTS) or 1
    moments: list[tuple[int, ...]] = []
    most = -1
    for i, event in enumerate(timeline.events[:stop], 1):
        handle = event if event >= 0 else ~event
        change = timeline.sizes[handle] if event >= 0 else -timeline.sizes[handle]
        live[row[timeline.tags[handle].category]] += change
        if i <= start:
            continue
        moment = (i - start - 1) // stretch
        if moment == len(moments):
            moments.append(tuple(live))
            most = sum(live)
        if i == at:
            moments[moment], most = tuple(live), 1 << 80  # nothing else of this stretch stands for it
        elif change > 0 and (total := sum(live)) > most:
            moments[moment], most = tuple(live), total
    peak = min(max(at - start - 1, 0) // stretch, len(moments) - 1)
    return Course(
        categories=tuple(categories),
        live_bytes=tuple(zip(*moments, strict=True)),
        phases=tuple(((n - start) // stretch, name) for n, name in timeline.marks if start <= n < stop),
        peak=peak,
        peak_phase=timeline.phase_at(at),
        peak_category=categories[max(range(len(categories)), key=lambda k: moments[peak][k])],
    )


def step(marks: Sequence[tuple[int, str]], at: int, end: int) -> tuple[int, int]:
    """From where to where the step goes in which event `at` stands: forwards and backwards up to the optimizer's step.

    >>> step([(1, "forward"), (5, "backward"), (9, "optimizer step"), (12, "forward"), (19, "end")], 14, 19)
    (12, 19)
    >>> step([(1, "forward"), (5, "backward"), (9, "optimizer step"), (12, "forward"), (19, "end")], 7, 19)
    (1, 12)
    """
    names = [name for _, name in marks]
    starts = [n for i, (n, name) in enumerate(marks) if name == "forward" and (i == 0 or names[i - 1] != "backward")]
    ends = [n for n, name in marks if name == "end"] or [end]
    bounds = [*(starts or [0]), ends[-1]]
    start = max((n for n in bounds[:-1] if n < at), default=bounds[0])
    return start, min(n for n in bounds if n > start)


def _restored(found: dict[str, Any]) -> Course:
    rows = tuple(map(tuple, found["live_bytes"]))
    phases = tuple((n, name) for n, name in found["phases"])
    return Course(**{**found, "categories": tuple(found["categories"]), "live_bytes": rows, "phases": phases})
