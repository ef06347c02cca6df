"""What meta tensors can't tell: answers to questions about values, each by an assumption that is written here.

- The input is unpadded unless it is said to be: a mask is all ones (`all`, or `sum() == numel()`); activations are all
  finite.
- A token is an ordinary one: none of the special ids that it is compared to, above zero and below every bound.
- Routing is balanced: each of E experts gets 1/E of the choices, and every expert that can get one gets one.
- What was filled with one value (`ones`, `zeros`, `full`) has it; a sum, a count or a comparison of such is worked out.
- Any other mask selects everything, any other boolean is False, any other number 0, and all numbers are equal.

So code that depends on data takes the path of ordinary, balanced input.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

if TYPE_CHECKING:
    from hfvram.memory.exact.tracker import Tracker

aten = torch.ops.aten


def mean(tracker: "Tracker", tensor: Any) -> float | None:
    """What the elements of a tensor are assumed to be in the mean, None where nothing is known."""
    if not isinstance(tensor, torch.Tensor):
        return float(tensor) if isinstance(tensor, (int, float)) else None
    handle = tracker.handle_of(tensor)
    return None if handle is None else tracker.assumed.get(handle)


def scalar(tracker: "Tracker", tensor: Any) -> bool | int | float:
    """The value of a tensor of one element."""
    known = mean(tracker, tensor)
    if tensor.dtype == torch.bool:
        handle = tracker.handle_of(tensor)
        return bool(known) if handle is None else tracker.told.get(handle, bool(known))
    value = known or 0.0
    return value if tensor.dtype.is_floating_point else round(value)


def values(tracker: "Tracker", tensor: Any) -> Any:
    """A tensor of host memory with the assumed values, whole numbers that add up."""
    out = torch.zeros(tensor.shape, dtype=tensor.dtype)
    known, number = mean(tracker, tensor), tensor.numel()
    if known and number:
        least, more = divmod(round(known * number), number)
        flat = torch.full((number,), least)
        flat[:more] += 1
        out.copy_(flat.view(tensor.shape))
    return out


def selected(tracker: "Tracker", mask: Any) -> int:
    """How many elements of a mask are true; an expert's share is rounded up."""
    known = mean(tracker, mask)
    number: int = mask.numel()
    return number if known is None else min(number, math.ceil(known * number - 1e-6))


@contextlib.contextmanager
def legible() -> Iterator[None]:
    """A number on meta is written as its value: names of modules are made of some (`expert_3`)."""
    written = torch.Tensor.__format__

    def write(tensor: Any, spec: str) -> str:
        return format(tensor.item(), spec) if tensor.is_meta and tensor.dim() == 0 else written(tensor, spec)

    with patch.object(torch.Tensor, "__format__", write):
        yield


def learn(tracker: "Tracker", tensor: Any, value: float | None) -> None:
    """The elements of this tensor are so many in the mean."""
    if value is not None and (handle := tracker.add(tensor)) is not None:
        tracker.assumed[handle] = value


def forget(tracker: "Tracker", tensor: Any) -> None:
    """Something was written into this tensor."""
    if (handle := tracker.handle_of(tensor)) is not None:
        tracker.assumed.pop(handle, None)


def _tell(tracker: "Tracker", tensor: Any, value: bool) -> None:
    if (handle := tracker.add(tensor)) is not None:
        tracker.told[handle] = value


def _constant(value: float) -> Callable[[Any, Any, Any], None]:
    return lambda tracker, args, out: learn(tracker, out, value)


def _same(tracker: "Tracker", args: Any, out: Any) -> None:
    learn(tracker, out, mean(tracker, args[0]))


def _filled(tracker: "Tracker", args: Any, out: Any) -> None:
    learn(tracker, out, mean(tracker, args[1]))


def _sum(tracker: "Tracker", args: Any, out: Any) -> None:
    if (known := mean(tracker, args[0])) is not None and out.numel():
        learn(tracker, out, known * args[0].numel() / out.numel())


def _histogram(tracker: "Tracker", args: Any, out: Any) -> None:
    learn(tracker, out, args[0].numel() / out.numel())


def _scatter(tracker: "Tracker", args: Any, out: Any) -> None:
    """A choice of few written as a mask."""
    if isinstance(args[3], (int, float)) and out.numel():
        share = args[2].numel() / out.numel()
        learn(tracker, out, (mean(tracker, args[0]) or 0.0) * (1 - share) + args[3] * share)


def _eq(tracker: "Tracker", args: Any, out: Any) -> None:
    """Of whole numbers compared to each of a row of others, one is equal: `one_hot`."""
    if out.numel() == 1:
        _tell(tracker, out, tracker.unpadded)
        return
    other = args[1]
    if not isinstance(other, torch.Tensor):
        _compare(lambda a, b: a == b, lambda b: False)(tracker, args, out)
    elif other.dim() == 1 and other.numel() > 1 and args[0].shape[-1:] == (1,) and not other.is_floating_point():
        learn(tracker, out, 1 / other.numel())


def _all(tracker: "Tracker", args: Any, out: Any) -> None:
    if out.numel() == 1:
        _tell(tracker, out, tracker.unpadded or args[0].dim() > 2)


def _compare(holds: Callable[[float, float], bool], token: Callable[[float], bool]) -> Callable[[Any, Any, Any], None]:
    """A comparison with a number: of known values, or of tokens, which are ordinary: `token` of the number."""

    def note(tracker: "Tracker", args: Any, out: Any) -> None:
        if not isinstance(args[1], (int, float)):
            return
        if (known := mean(tracker, args[0])) is not None:
            learn(tracker, out, float(holds(known, args[1])))
        elif not args[0].is_floating_point() and args[0].dtype != torch.bool:
            learn(tracker, out, float(token(args[1])))

    return note


def _above(tracker: "Tracker", args: Any, out: Any) -> None:
    """Of counts below one in the mean, as many are above zero as there are."""
    known = mean(tracker, args[0])
    if known is not None and args[1] == 0 and 0 < known < 1:
        learn(tracker, out, known)
    else:
        _compare(lambda a, b: a > b, lambda b: b <= 0)(tracker, args, out)


def _not(tracker: "Tracker", args: Any, out: Any) -> None:
    if (known := mean(tracker, args[0])) is not None and args[0].dtype == torch.bool:
        learn(tracker, out, 1 - known)


def _and(tracker: "Tracker", args: Any, out: Any) -> None:
    a, b = mean(tracker, args[0]), mean(tracker, args[1])
    if a == 0 or b == 0:
        learn(tracker, out, 0)
    elif a is not None and b is not None and out.dtype == torch.bool:
        learn(tracker, out, a * b)


NOTES: dict[Any, Callable[[Any, Any, Any], None]] = {
    aten.all: _all,
    aten._is_all_true: _all,
    aten.eq: _eq,
    aten.ne: _compare(lambda a, b: a != b, lambda b: True),
    aten.ge: _compare(lambda a, b: a >= b, lambda b: b <= 0),
    aten.lt: _compare(lambda a, b: a < b, lambda b: b > 0),
    aten.gt: _above,
    aten.ones: _constant(1.0),
    aten.ones_like: _constant(1.0),
    aten.new_ones: _constant(1.0),
    aten.zeros: _constant(0.0),
    aten.zeros_like: _constant(0.0),
    aten.new_zeros: _constant(0.0),
    aten.full: _filled,
    aten._to_copy: _same,
    aten.clone: _same,
    aten.sum: _sum,
    aten.histc: _histogram,
    aten.scatter: _scatter,
    aten.bitwise_not: _not,
    aten.logical_not: _not,
    aten.bitwise_and: _and,
    aten.logical_and: _and,
}
"""What is known of an operator's output."""
