"""The largest tensors that are live at the peak, each by where it is from and what it is."""

from dataclasses import replace
from typing import Any

from hfvram.answer.estimate import LiveTensor
from hfvram.memory.allocator import Peaks
from hfvram.memory.timeline import Made, Tag, Timeline, starred

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
MADE = ("activations", "cache", "workspace")
"""Categories of tensors of which the operator says what they are."""
OPERATORS = {"to_copy": "cast", "clone": "copy", "cat": "concatenation", "add": "sum", "mul": "product"}
SILENT = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "zeros", "new_zeros", "None")
"""Operators that only make room, for what is written into it by another."""


def largest(timeline: Timeline, peaks: Peaks, number: int = 10, alike: bool = True) -> tuple[LiveTensor, ...]:
    """The largest tensors at the peak, one for all that differ only in the numbers of their paths (layers) if `alike`.

    Nothing, where the timeline was written by a formula, which has no tensors.
    """
    if not timeline.made:
        return ()
    found: dict[Any, LiveTensor] = {}
    counts: dict[Any, int] = {}
    handles = [h for h in timeline.live(peaks.event) if timeline.sizes[h]]
    for handle in sorted(handles, key=lambda h: -timeline.sizes[h]):
        tensor = named(timeline.tags[handle], timeline.made.get(handle), timeline.sizes[handle])
        key = replace(tensor, path=starred(tensor.path)) if alike else handle
        if key not in found:
            if len(found) == number:
                if not alike or tensor.bytes < min(t.bytes for t in found.values()):
                    break
                continue
            found[key] = tensor
        counts[key] = counts.get(key, 0) + 1
    return tuple(replace(tensor, count=counts[key]) for key, tensor in found.items())


def named(tag: Tag, made: Made | None, nbytes: int) -> LiveTensor:
    """A tensor in words: what it is, from the tag where that says it, else by its category and its operator."""
    path, operator, shape, dtype = made or ("", None, (), "")
    path = "" if " " in path or path == tag.category else path  # not a module's, but said of what is in none
    what, _, kind = tag.name.rpartition(" (")
    if kind.endswith(")") and tag.category == "activations":
        what = "recomputed activations" if kind == "recomputed)" else kind[:-1]
    else:
        what = tag.category if path and tag.name in (starred(path), starred(path.rpartition(".")[0])) else tag.name
    by = getattr(operator, "__name__", str(operator)).strip("_")
    return LiveTensor(
        path=path,
        what=what,
        category=tag.category,
        operator="" if by in SILENT or tag.category not in MADE else OPERATORS.get(by, by),
        shape=tuple(shape),
        dtype=DTYPES.get(name := str(dtype).removeprefix("torch."), name),
        bytes=nbytes,
        count=1,
    )
