"""A request as a sequence of allocations and frees, by category: what both engines write and the allocator replays."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

Category = Literal[
    "weights", "buffers", "gradients", "optimizer", "cache", "activations", "workspace", "rounding", "inputs"
]
Certainty = Literal["exact", "derived", "calibrated", "guess"]


class Tag(NamedTuple):
    """What an allocation is, in words: allocations of one tag become one item of the answer."""

    name: str
    category: Category
    formula: str = ""
    source: str = ""
    certainty: Certainty = "derived"


@dataclass(slots=True)
class Timeline:
    """Events in order. An allocation is a positive index into `sizes` and `tags`; a free is its negative, minus one.

    `mark` names a moment (`prefill`, `decode`), so that an answer can say when the peak stands.
    """

    sizes: list[int]
    tags: list[Tag]
    events: list[int]
    marks: list[tuple[int, str]]

    def __init__(self) -> None:
        self.sizes, self.tags, self.events, self.marks = [], [], [], []

    def alloc(self, nbytes: int, tag: Tag) -> int:
        """Allocate `nbytes` (0 is allowed and costs nothing); the handle frees it."""
        handle = len(self.sizes)
        self.sizes.append(nbytes)
        self.tags.append(tag)
        self.events.append(handle)
        return handle

    def free(self, *handles: int) -> None:
        self.events.extend(-h - 1 for h in handles)

    def momentary(self, tag: Tag, *sizes: int) -> None:
        """Allocate these together, and free them at once."""
        self.free(*[self.alloc(n, tag) for n in sizes])

    def mark(self, name: str) -> None:
        """What follows belongs to the phase `name`."""
        self.marks.append((len(self.events), name))

    def live(self, upto: int) -> Iterable[int]:
        """Handles that are live after the first `upto` events."""
        handles: dict[int, None] = {}
        for e in self.events[:upto]:
            if e >= 0:
                handles[e] = None
            else:
                handles.pop(-e - 1, None)
        return handles

    def phase_at(self, event: int) -> str:
        name = ""
        for at, mark in self.marks:
            if at > event:
                break
            name = mark
        return name
