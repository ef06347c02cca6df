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


def _nonzero(tracker: "Tracker", func: Any, args: Any, kwargs: Any) -> Any:
    rows = selected(tracker, args[0])
    return torch.empty((args[0].dim(), rows), dtype=torch.int64, device="meta").t()


def _masked_select(tracker: "Tracker", func: Any, args: Any, kwargs: Any) -> Any:
    whole, mask = torch.broadcast_tensors(args[0], args[1])
    share = selected(tracker, args[1]) / max(args[1].numel(), 1)
    return whole.new_empty(round(mask.numel() * share))


def _indexed(tracker: "Tracker", indices: Any) -> list[Any] | None:
    """Indices where masks have become the positions that they select, as CUDA makes them; None where none is a mask."""
    found: list[Any] = []
    masks = False
    for index in indices:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            found.append(index)
        else:
            masks = True
            with tracker:  # these are seen, too
                found += aten.nonzero(index).unbind(1)
    return found if masks else None


def _index(tracker: "Tracker", func: Any, args: Any, kwargs: Any) -> Any:
    found = _indexed(tracker, args[1])
    return NotImplemented if found is None else func(args[0], found)


def _index_put(tracker: "Tracker", func: Any, args: Any, kwargs: Any) -> Any:
    """A single value is filled in by `masked_fill_` on CUDA, without positions; of several there are as many as fit."""
    if args[2].numel() == 1:
        return NotImplemented
    mask = args[1][0] if len(args[1]) == 1 else None
    if mask is not None and mask.dtype == torch.bool and args[2].dim() > args[0].dim() - mask.dim():
        learn(tracker, mask, args[2].shape[0] / mask.numel())
    found = _indexed(tracker, args[1])
    return NotImplemented if found is None else func(args[0], found, *args[2:], **kwargs)


def _masked_fill(tracker: "Tracker", func: Any, args: Any, kwargs: Any) -> Any:
    """The value may be a number of host memory, which on meta is refused."""
    value = args[2]
    if not isinstance(value, torch.Tensor) or value.device.type == "meta":
        return NotImplemented
    return func._overloadpacket.Scalar(args[0], args[1], value.item())


def _ctc_loss(tracker: "Tracker", func: Any, args: Any, kwargs: Any) -> Any:
    """Every target is as long as the others. Source: PyTorch 2.11, native/cuda/LossCTC.cu."""
    frames, batch, _ = args[0].shape
    longest = args[1].shape[1] if args[1].dim() == 2 else -(-args[1].numel() // batch)
    return args[0].new_empty(batch), args[0].new_empty((batch, frames, 2 * longest + 1))


def _ctc_loss_backward(tracker: "Tracker", func: Any, args: Any, kwargs: Any) -> Any:
    """Beside the gradient it holds the betas, which are as large as the alphas."""
    with tracker:
        betas = torch.empty_like(args[6])
    out = torch.empty_like(args[1])
    tracker.see(out)
    del betas
    return out


def _bincount(tracker: "Tracker", func: Any, args: Any, kwargs: Any) -> Any:
    weights = args[1] if len(args) > 1 else kwargs.get("weights")
    bins = max(args[2] if len(args) > 2 else kwargs.get("minlength", 0), 1)
    dtype = torch.int64 if weights is None else torch.float32 if weights.dtype == torch.float32 else torch.float64
    out = torch.empty(bins, dtype=dtype, device="meta")
    if weights is None:
        learn(tracker, out, args[0].numel() / bins)
    return out


def _unique(tracker: "Tracker", func: Any, args: Any, kwargs: Any) -> Any:
    """All are equal: there is one value, each index is its, and it counts all."""
    like = args[0]
    counts = torch.empty(1, dtype=torch.int64, device="meta")
    learn(tracker, counts, like.numel())
    return like.new_empty(1), torch.empty(like.shape, dtype=torch.int64, device="meta"), counts


def _repeat_interleave(tracker: "Tracker", func: Any, args: Any, kwargs: Any) -> Any:
    size = kwargs.get("output_size")
    known = mean(tracker, args[0])
    if size is None:
        size = args[0].numel() if known is None else round(known * args[0].numel())
    return torch.empty(size, dtype=torch.int64, device="meta")


def _to_host(tracker: "Tracker", func: Any, args: Any, kwargs: Any) -> Any:
    device = kwargs.get("device")
    if device is None or device.type == "meta" or args[0].device.type != "meta":
        return NotImplemented
    return values(tracker, args[0]).to(kwargs.get("dtype") or args[0].dtype)


ANSWERS: dict[Any, Callable[[Any, Any, Any, Any], Any]] = {
    aten.nonzero: _nonzero,
    aten.masked_select: _masked_select,
    aten.index: _index,
    aten.index_put: _index_put,
    aten.index_put_: _index_put,
    aten.masked_fill: _masked_fill,
    aten.masked_fill_: _masked_fill,
    aten._ctc_loss: _ctc_loss,
    aten._ctc_loss_backward: _ctc_loss_backward,
    aten.bincount: _bincount,
    aten._unique2: _unique,
    aten.unique_consecutive: _unique,
    aten.unique_dim: _unique,
    aten.repeat_interleave: _repeat_interleave,
    aten._to_copy: _to_host,
}
"""Operators that meta can't run, or runs otherwise; NotImplemented where it can after all."""


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
