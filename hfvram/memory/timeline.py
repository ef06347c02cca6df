"""A request as a sequence of allocations and frees, by category: what both engines write and the allocator replays."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

Category = Literal[
    "weights", "buffers", "gradients", "optimizer", "cache", "activations", "workspace", "rounding", "inputs"
]
Certainty = Literal["exact", "derived", "calibrated", "guess"]
Elsewhere = Literal["cpu", "nvme", "disk"]


class Tag(NamedTuple):
    """What an allocation is: allocations of one name become one item of the answer.

    `formula` is in the field's symbols, joined by `·`, so that an answer can put the numbers in.
    """

    name: str
    category: Category
    formula: str = ""
    source: str = ""
    certainty: Certainty = "derived"


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
Made = tuple[str, Any, Any, Any]
"""The tensor of an allocation: the module (or parameter) that it is of, its operator, its shape and its dtype."""


def starred(path: str) -> str:
    """A module's path without its numbers, which is what alike modules have in common.

    >>> starred("model.layers.12.mlp.experts.3.up_proj")
    'model.layers.*.mlp.experts.*.up_proj'
    """
    return _NUMBER.sub("*", path)


@dataclass(frozen=True, eq=False)
class Standing:
    """What stands before the first token: weights and buffers, in the order in which they are built."""

    tensors: tuple[tuple[int, Tag], ...]

    @cached_property
    def bytes_by_tag(self) -> dict[Tag, int]:
        totals: dict[Tag, int] = {}
        for nbytes, tag in self.tensors:
            totals[tag] = totals.get(tag, 0) + nbytes
        return totals


class Timeline:
    """What stands from the start, then events in order.

    An allocation is an index into `sizes` and `tags`; a free is its complement (`~index`). `marks` name phases.
    """

    __slots__ = (
        "cache_bytes",
        "elsewhere",
        "events",
        "gradients_bytes",
        "made",
        "managed_bytes",
        "marks",
        "optimizer_bytes",
        "restarts",
        "sizes",
        "standing",
        "streams",
        "symbols",
        "tags",
        "trainable_parameters",
        "tuned",
    )

    def __init__(self, standing: Standing) -> None:
        self.standing = standing
        self.sizes: list[int] = []
        self.tags: list[Tag] = []
        self.events: list[int] = []
        self.marks: list[tuple[int, str]] = []
        self.streams: dict[int, int] = {}
        """The CUDA stream of an allocation, where it is not the default one (0)."""
        self.made: dict[int, Made] = {}
        """Of the exact engine's allocations: which tensor each is."""
        self.restarts: list[int] = []
        """After how many events unused memory is given back and the peaks start anew."""
        self.symbols: dict[str, int] = {}
        """What the symbols of the formulas stand for."""
        self.tuned: set[tuple[object, ...]] = set()
        """Triton kernels that were launched already, by what their autotuner looks at."""
        self.gradients_bytes = self.optimizer_bytes = self.trainable_parameters = 0
        """Of training: all gradients and optimizer states in raw sizes, and the parameters that they are of."""
        self.managed_bytes = 0
        """Optimizer states in CUDA's managed memory: on the device while there is room, but not the allocator's."""
        self.elsewhere: list[tuple[Elsewhere, Tag, int]] = []
        """What this GPU's process keeps in CPU memory or on NVMe instead of on the GPU, in raw bytes."""
        self.cache_bytes = 0
        """The whole cache once the request is done, in raw sizes."""

    def alloc(self, nbytes: int, tag: Tag) -> int:
        """Allocate `nbytes` (0 costs nothing); the handle frees it."""
        handle = len(self.sizes)
        self.sizes.append(nbytes)
        self.tags.append(tag)
        self.events.append(handle)
        return handle

    def free(self, *handles: int) -> None:
        self.events.extend([~h for h in handles])

    def moment(self, tag: Tag, *sizes: int) -> None:
        """Allocate these together, and free them at once."""
        self.free(*[self.alloc(n, tag) for n in sizes])

    def restart(self) -> None:
        """Give back what is unused, and start the peaks anew: the model stands, what follows is the request."""
        self.restarts.append(len(self.events))

    def mark(self, phase: str) -> None:
        """What follows belongs to this phase."""
        self.marks.append((len(self.events), phase))

    def phase_at(self, event: int) -> str:
        """The phase in which this event stands."""
        return next((name for at, name in reversed(self.marks) if at < event), "start")

    def phases(self) -> dict[str, tuple[int, int]]:
        """By the name of a phase, over all of its times: the most bytes that are live at once in it, as they were asked
        for, and the most activations.

        >>> t = Timeline(Standing(((100, Tag("weights", "weights")),)))
        >>> t.mark("forward")
        >>> saved = t.alloc(30, Tag("x", "activations"))
        >>> t.mark("backward")
        >>> t.free(saved)
        >>> t.moment(Tag("w", "gradients"), 50)
        >>> t.phases()
        {'forward': (130, 30), 'backward': (150, 30)}
        """
        found: dict[str, tuple[int, int]] = {}
        marks, name = dict(self.marks), ""
        live, activations, most, most_activations = sum(self.standing.bytes_by_tag.values()), 0, 0, 0
        for i, event in enumerate(self.events):
            if i in marks:
                found[name] = most, most_activations
                name = marks[i]
                most, most_activations = found.get(name, (0, 0))
                most, most_activations = max(most, live), max(most_activations, activations)
            handle = event if event >= 0 else ~event
            change = self.sizes[handle] if event >= 0 else -self.sizes[handle]
            live += change
            if live > most:
                most = live
            if self.tags[handle].category == "activations":
                activations += change
                if activations > most_activations:
                    most_activations = activations
        found[name] = most, most_activations
        return {name: peaks for name, peaks in found.items() if name not in ("", "end")}

    def fullest_bytes(self) -> int:
        """The most bytes that are live at once, as they were asked for: no rounding, no allocator."""
        live = most = 0
        sizes = self.sizes
        for event in self.events:
            if event >= 0:
                live += sizes[event]
                if live > most:
                    most = live
            else:
                live -= sizes[~event]
        return most + sum(self.standing.bytes_by_tag.values())

    def live(self, upto: int) -> list[int]:
        """Handles that are live after the first `upto` events, in order of allocation."""
        handles: dict[int, None] = {}
        for e in self.events[:upto]:
            if e >= 0:
                handles[e] = None
            else:
                del handles[~e]
        return list(handles)
