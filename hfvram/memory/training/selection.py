"""PyTorch's operators that choose rows, places and experts, over tensors without values.

Source: PyTorch 2.11, tools/autograd/derivatives.yaml, torch/csrc/autograd/FunctionsManual.cpp (`index_backward`,
`value_selecting_reduction_backward`, `div_tensor_other_grad`), aten/src/ATen/native/cuda/GroupedBlas.cpp.
"""

from collections.abc import Sequence
from functools import partial

from hfvram.memory.timeline import Tag
from hfvram.memory.training.operators import Found, Grads, attach, first
from hfvram.memory.training.tape import Saved, Tape
from hfvram.memory.training.tensors import ITEM_BYTES, Shape, Tensor, is_contiguous


def top_k(t: Tape, x: Tensor, k: int, tag: Tag | None = None) -> tuple[Tensor, Tensor]:
    """The k largest of each row, and where they stand, which is kept."""
    node = t.record(partial(_placed, x.shape), (x,))
    shape = (*x.shape[:-1], k)
    values, places = t.new(shape, x.dtype, None, tag), t.new(shape, "int64", None, tag)
    t.keep(node, places)
    return attach(values, node), places


def largest(t: Tape, x: Tensor, tag: Tag | None = None) -> tuple[Tensor, Tensor]:
    """The largest of each row, whose dimension goes, and where it stands."""
    node = t.record(partial(_placed, x.shape), (x,))
    values, places = t.new(x.shape[:-1], x.dtype, None, tag), t.new(x.shape[:-1], "int64", None, tag)
    t.keep(node, places)
    return attach(values, node), places


def maximum(t: Tape, x: Tensor, tag: Tag | None = None) -> Tensor:
    """The largest of each row, whose dimension stays with one element."""
    node = t.record(partial(_placed, x.shape), (x,))
    shape = (*x.shape[:-1], 1)
    values, places = t.new(shape, x.dtype, None, tag), t.new(shape, "int64", None, tag)
    t.keep(node, places)
    return attach(values, node)


def _placed(shape: Shape, t: Tape, saved: Saved, grads: Grads) -> Found:
    """Put into zeros, on meta not in place."""
    zeros = t.new(shape, first(grads).dtype)
    return (t.new(shape, zeros.dtype) if t.on_meta else zeros,)


def gather(t: Tape, x: Tensor, places: Tensor, tag: Tag | None = None) -> Tensor:
    """Elements of each row; the rows themselves are kept, too."""
    node = t.record(partial(_placed, x.shape), (x,), x, places)
    return attach(t.new(places.shape, x.dtype, None, tag), node)


def exchange(t: Tape, x: Tensor, tag: Tag | None = None) -> Tensor:
    """All-to-all: as many rows come from other ranks as were sent to them, and so do their gradients."""
    node = t.record(_exchanged, (x,))
    return attach(t.new(x.shape, x.dtype, None, tag), node)


def _exchanged(t: Tape, saved: Saved, grads: Grads) -> Found:
    grad = first(grads)
    return (t.new(grad.shape, grad.dtype),)


def rows(t: Tape, x: Tensor, places: Tensor, tag: Tag | None = None) -> Tensor:
    """Rows of x by their places, which are kept: `x[places]`."""
    node = t.record(partial(_put, x.shape), (x,), places)
    return attach(t.new((*places.shape, *x.shape[1:]), x.dtype, None, tag), node)


def _put(shape: Shape, t: Tape, saved: Saved, grads: Grads) -> Found:
    """Rows are added into zeros after their places were sorted; on meta not in place.

    The sort has the places by element, sorted, and whose they were, and CUB's copies of keys and values.
    Source: PyTorch 2.11, native/cuda/Indexing.cu `index_put_with_sort_kernel`.
    """
    (places,) = saved
    assert places is not None
    zeros = t.new(shape, first(grads).dtype)
    if t.on_meta:
        return (t.new(shape, zeros.dtype),)
    t.moment(*[places.nbytes] * 3, 2 * places.nbytes)
    return (zeros,)


def masked(t: Tape, x: Tensor, mask: Tensor, tag: Tag | None = None) -> Tensor:
    """A copy, filled with a number where the mask is true: `masked_fill`."""
    node = t.record(_masked, (x,), mask)
    return attach(t.like(x, tag=tag), node)


def masked_in_place(t: Tape, x: Tensor, mask: Tensor) -> Tensor:
    """The same without a copy: `masked_fill_`."""
    node = t.record(_masked, (x,), mask)
    out = x.alias()
    out.base = x.base
    return attach(out, node)


def _masked(t: Tape, saved: Saved, grads: Grads) -> Found:
    return (t.like(first(grads)),)


def total(t: Tape, x: Tensor, dim: int, keep: bool = False, tag: Tag | None = None) -> Tensor:
    """The sum over one dimension, which goes or stays with one element; autocast makes it fp32."""
    dim %= len(x.shape)
    node = t.record(partial(_summed, x.shape, dim, keep), (x,))
    shape = (*x.shape[:dim], *([1] if keep else []), *x.shape[dim + 1 :])
    return attach(t.new(shape, "fp32" if t.autocast else x.dtype, None, tag), node)


def _summed(shape: Shape, dim: int, keep: bool, t: Tape, saved: Saved, grads: Grads) -> Found:
    grad = first(grads)
    strides = list(grad.strides)
    if keep:
        strides[dim] = 0
    else:
        strides.insert(dim, 0)
    return (grad.as_(shape, tuple(strides)),)


def all_of(t: Tape, x: Tensor, tag: Tag | None = None) -> Tensor:
    """The sum of all elements."""
    node = t.record(partial(_everywhere, x.shape), (x,))
    return attach(t.new((), x.dtype, None, tag), node)


def _everywhere(shape: Shape, t: Tape, saved: Saved, grads: Grads) -> Found:
    return (first(grads).as_(shape, (0,) * len(shape)),)


def add_in_place(t: Tape, x: Tensor, y: Tensor) -> Tensor:
    """x += y"""
    return attach(x.alias(), t.record(_added, (x, y)))


def _added(t: Tape, saved: Saved, grads: Grads) -> Found:
    return grads[0], grads[0]


def noisy(t: Tape, x: Tensor, tag: Tag | None = None) -> Tensor:
    """x times noise, in place; the noise is kept."""
    noise = t.like(x, tag=tag)
    return attach(x.alias(), t.record(_noised, (x,), noise))


def _noised(t: Tape, saved: Saved, grads: Grads) -> Found:
    (noise,) = saved
    assert noise is not None
    return (t.elementwise(first(grads), noise),)


def every_second(t: Tape, x: Tensor) -> Tensor:
    """Half of the last dimension, every other element; its gradient is as large as the whole."""
    node = t.record(partial(_widened, x.shape), (x,))
    return attach(x.as_((*x.shape[:-1], x.shape[-1] // 2), (*x.strides[:-1], 2 * x.strides[-1])), node)


def _widened(shape: Shape, t: Tape, saved: Saved, grads: Grads) -> Found:
    return (t.new(shape, first(grads).dtype),)


def turned(t: Tape, x: Tensor, angles: Tensor, tag: Tag | None = None) -> Tensor:
    """Pairs that are complex numbers, times others that need no gradient."""
    node = t.record(_conjugated, (x,), angles)
    out = attach(t.elementwise(x, angles, tag=tag), node)
    return attach(out.as_(out.shape, out.strides), t.record(_as_complex, (out,)))


def _conjugated(t: Tape, saved: Saved, grads: Grads) -> Found:
    (angles,) = saved
    assert angles is not None
    return (t.elementwise(first(grads), t.like(angles)),)


def _as_complex(t: Tape, saved: Saved, grads: Grads) -> Found:
    grad = first(grads)
    return (grad if is_contiguous(grad.shape, grad.strides) else t.new(grad.shape, grad.dtype),)


def filled(t: Tape, shape: Shape, parts: Sequence[Tensor], tag: Tag | None = None) -> Tensor:
    """A new tensor into which parts are copied along the last dimension."""
    out = t.new(shape, parts[0].dtype, None, tag)
    for part in parts:
        out = put(t, out, part)
    return out


def put(t: Tape, out: Tensor, part: Tensor) -> Tensor:
    """`out`, into a place of which a part was copied."""
    node = t.record(partial(_copied, out.shape, part.shape, part.dtype, out.node is not None), (out, part))
    return attach(out.alias(), node)


def _copied(shape: Shape, of: Shape, dtype: str, before: bool, t: Tape, saved: Saved, grads: Grads) -> Found:
    """The whole gradient is copied, its slice again; what stood there before has zeros."""
    grad = first(grads)
    whole = t.new(shape, grad.dtype)
    part = t.new(of, grad.dtype)
    zeros = t.new(part.shape, part.dtype) if before else None
    found = part if part.dtype == dtype else t.like(part, dtype)
    del zeros
    return whole, found


def divide(t: Tape, x: Tensor, by: Tensor, tag: Tag | None = None) -> Tensor:
    """x by another tensor."""
    node = t.record(_divided, (x, by), x if by.node else None, by)
    return attach(t.elementwise(x, by, tag=tag), node)


def divide_in_place(t: Tape, x: Tensor, by: Tensor, tag: Tag | None = None) -> Tensor:
    """The same into x, of which a copy is kept."""
    node = t.record(_divided, (x, by), None)
    if node is not None:
        node.saved = ()
        t.keep(node, t.like(x, tag=tag) if by.node else None, by)
    out = x.alias()
    return attach(out, node)


def _divided(t: Tape, saved: Saved, grads: Grads) -> Found:
    grad, (x, by) = first(grads), saved
    assert by is not None
    of_by = None if x is None else _of_divisor(t, grad, x, by)
    return t.elementwise(grad, by), of_by


def _of_divisor(t: Tape, grad: Tensor, x: Tensor, by: Tensor) -> Tensor:
    """−grad · ((x ÷ by) ÷ by)"""
    quotient = t.elementwise(x, by)
    again = t.elementwise(quotient, by)
    minus = t.elementwise(grad)
    return t.elementwise(minus, again)


def grouped_product(t: Tape, x: Tensor, weight: Tensor, ends: Tensor, turned: bool, tag: Tag | None = None) -> Tensor:
    """Rows of x, group after group, each times its group's matrix of a (groups, inputs, outputs) view; `turned` where
    that view is the transpose of how the weight lies."""
    node = t.record(
        partial(_grouped, turned), (x, weight), x if weight.node else None, weight if x.node else None, ends
    )
    t.multiplies()
    return attach(_padded(t, (x.shape[0], weight.shape[2]), x.dtype, tag), node)


def _padded(t: Tape, shape: Shape, dtype: str, tag: Tag | None = None) -> Tensor:
    """Rows of whole 16 bytes, which the kernels for bf16 ask for."""
    if dtype != "bf16":
        return t.new(shape, dtype, None, tag)
    step = 16 // ITEM_BYTES[dtype]
    width = -(-shape[-1] // step) * step
    out = t.new((*shape[:-1], width), dtype, None, tag)
    return out.as_(shape, out.strides) if width != shape[-1] else out


def _grouped(turned: bool, t: Tape, saved: Saved, grads: Grads) -> Found:
    grad, (x, weight, ends) = first(grads), saved
    assert ends is not None
    t.multiplies()
    of_weight = None
    if x is not None:
        groups, inputs, outputs = ends.shape[0], x.shape[1], grad.shape[1]
        of_weight = _padded(t, (groups, outputs, inputs) if turned else (groups, inputs, outputs), grad.dtype)
        if turned:
            a, b, c = of_weight.strides
            of_weight = of_weight.as_((groups, inputs, outputs), (a, c, b))
    return None if weight is None else _padded(t, (grad.shape[0], weight.shape[1]), grad.dtype), of_weight
