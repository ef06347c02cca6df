"""Operators that meta can't run, or runs otherwise: what they return where the answer depends on data."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from hfvram.memory.exact.data_dependent import learn, mean, selected, values

if TYPE_CHECKING:
    from hfvram.memory.exact.tracker import Tracker

aten = torch.ops.aten


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
"""By operator; NotImplemented where meta can run it after all."""
