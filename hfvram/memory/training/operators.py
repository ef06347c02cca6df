"""PyTorch's operators over tensors without values: what each allocates, what it saves, and what its gradient makes.

A gradient makes those of its inputs in the order of PyTorch's generated code, by the names of the arguments.
Source: PyTorch 2.11, tools/autograd/derivatives.yaml, torch/csrc/autograd/FunctionsManual.cpp; aten/src/ATen/native/
LinearAlgebra.cpp (`matmul`), Linear.cpp, SoftMax.cpp, cuda/{SoftMax,Embedding,Dropout}.cu; checked event by event
against the model's own code on the meta device.
"""

from collections.abc import Sequence
from functools import partial
from math import prod

from hfvram.memory.cuda_kernels import embedding_scratch_bytes
from hfvram.memory.timeline import Tag
from hfvram.memory.training.tape import Gradient, Node, Saved, Tape, promoted
from hfvram.memory.training.tensors import Shape, Tensor, contiguous, is_contiguous, preserved, viewed

Grads = list[Tensor | None]
Found = Sequence[Tensor | None]


def attach(out: Tensor, node: Node | None, index: int = 0) -> Tensor:
    """The output of a node."""
    out.node, out.index = node, index
    return out


def first(grads: Grads) -> Tensor:
    """The gradient of an operator's only output."""
    grad = grads[0]
    assert grad is not None
    return grad


def there(*saved: Tensor | None) -> list[Tensor]:
    """Of what was saved, the tensors that are there."""
    return [x for x in saved if x is not None]


def only(grads: Grads) -> Tensor:
    """The same, taken: a function written in Python lets go of it as it returns."""
    grad = grads.pop()
    assert grad is not None
    return grad


# -- views -----------------------------------------------------------------------------------------------------------


def transpose(t: Tape, x: Tensor, a: int, b: int) -> Tensor:
    """Swap two dimensions."""
    order = list(range(len(x.shape)))
    order[a], order[b] = order[b], order[a]
    return permute(t, x, *order)


def permute(t: Tape, x: Tensor, *order: int) -> Tensor:
    """Reorder dimensions."""
    node = t.record(partial(_permuted, order), (x,))
    return attach(_permute(x, order), node)


def _permute(x: Tensor, order: Sequence[int]) -> Tensor:
    return x.as_(tuple([x.shape[i] for i in order]), tuple([x.strides[i] for i in order]))


def _permuted(order: Shape, t: Tape, saved: Saved, grads: Grads) -> Found:
    return (_permute(first(grads), [order.index(i) for i in range(len(order))]),)


def reshape(t: Tape, x: Tensor, *shape: int, tag: Tag | None = None) -> Tensor:
    """Another shape: a view where the strides allow it, else of a copy. One size may be -1."""
    if -1 in shape:
        rest = -prod(shape)
        shape = tuple([x.numel // rest if n == -1 else n for n in shape])
    strides = viewed(x.shape, x.strides, shape)
    if strides is None:
        x = clone(t, x, True, tag)
        strides = contiguous(shape)
    node = t.record(partial(_reshaped, x.shape), (x,))
    return attach(x.as_(shape, strides), node)


def _reshaped(shape: Shape, t: Tape, saved: Saved, grads: Grads) -> Found:
    grad = first(grads)
    strides = viewed(grad.shape, grad.strides, shape)
    if strides is None:
        return (t.new(shape, grad.dtype),)
    return (grad.as_(shape, strides),)


def clone(t: Tape, x: Tensor, dense: bool = False, tag: Tag | None = None) -> Tensor:
    """A copy, row after row or as its source lies."""
    node = t.record(_same, (x,))
    strides = contiguous(x.shape) if dense else preserved(x.shape, x.strides)
    return attach(t.new(x.shape, x.dtype, strides, tag), node)


def dense(t: Tape, x: Tensor, tag: Tag | None = None) -> Tensor:
    """`contiguous()`: itself where it lies row after row, else a copy."""
    return x if is_contiguous(x.shape, x.strides) else clone(t, x, True, tag)


def _same(t: Tape, saved: Saved, grads: Grads) -> Found:
    return (grads[0],)


def expand(t: Tape, x: Tensor, *shape: int) -> Tensor:
    """Repeat dimensions of one element without copying them; new ones may come first."""
    new = len(shape) - len(x.shape)
    sizes = tuple([x.shape[i - new] if n == -1 else n for i, n in enumerate(shape)])
    strides = (0,) * new + tuple([0 if n != sizes[new + i] else x.strides[i] for i, n in enumerate(x.shape)])
    node = t.record(partial(_expanded, x.shape), (x,))
    return attach(x.as_(sizes, strides), node)


def _expanded(shape: Shape, t: Tape, saved: Saved, grads: Grads) -> Found:
    grad = first(grads)
    return (grad if grad.shape == shape else t.sum_to(grad, shape),)


def narrow(t: Tape, x: Tensor, dim: int, size: int, from_end: bool = False) -> Tensor:
    """A slice of `size` along a dimension; its gradient is as large as the whole. All of it is itself, unless it is
    asked for from the end."""
    if x.shape[dim] == size and not from_end:
        return x
    node = t.record(partial(_narrowed, x.shape), (x,))
    shape = list(x.shape)
    shape[dim] = size
    return attach(x.as_(tuple(shape), x.strides), node)


def _narrowed(shape: Shape, t: Tape, saved: Saved, grads: Grads) -> Found:
    return (t.new(shape, first(grads).dtype),)


def every(t: Tape, x: Tensor, step: int) -> Tensor:
    """Each `step`-th element of the last dimension; its gradient is as large as the whole."""
    node = t.record(partial(_narrowed, x.shape), (x,))
    shape, strides = (*x.shape[:-1], x.shape[-1] // step), (*x.strides[:-1], x.strides[-1] * step)
    return attach(x.as_(shape, strides), node)


def select(t: Tape, x: Tensor, dim: int) -> Tensor:
    """One place of a dimension, which goes; its gradient is as large as the whole."""
    node = t.record(partial(_narrowed, x.shape), (x,))
    shape, strides = list(x.shape), list(x.strides)
    del shape[dim], strides[dim]
    return attach(x.as_(tuple(shape), tuple(strides)), node)


def split(t: Tape, x: Tensor, dim: int, *sizes: int) -> list[Tensor]:
    """Views of consecutive parts; their gradients are joined by a copy, zeros standing for those that never came."""
    dim %= len(x.shape)
    node = t.record(partial(_joined, x.shape, dim, sizes), (x,))
    if node is not None:
        node.outputs = len(sizes)
    parts = []
    for i, size in enumerate(sizes):
        shape = list(x.shape)
        shape[dim] = size
        parts.append(attach(x.as_(tuple(shape), x.strides), node, i))
    return parts


def _joined(shape: Shape, dim: int, sizes: Shape, t: Tape, saved: Saved, grads: Grads) -> Found:
    dtype = next(g.dtype for g in grads if g is not None)
    zeros = []
    for grad, size in zip(grads, sizes, strict=True):
        if grad is None:
            zeros.append(t.new((*shape[:dim], size, *shape[dim + 1 :]), dtype))
    return (t.new(shape, dtype),)


def cat(t: Tape, parts: Sequence[Tensor], dim: int, tag: Tag | None = None) -> Tensor:
    """Join by a copy."""
    dim %= len(parts[0].shape)
    sizes = [p.shape[dim] for p in parts]
    node = t.record(partial(_parted, dim, sizes), parts)
    shape = list(parts[0].shape)
    shape[dim] = sum(sizes)
    return attach(t.new(tuple(shape), promoted(*parts), None, tag), node)


def _parted(dim: int, sizes: list[int], t: Tape, saved: Saved, grads: Grads) -> Found:
    grad = first(grads)
    return [grad.as_((*grad.shape[:dim], n, *grad.shape[dim + 1 :]), grad.strides) for n in sizes]


def stack(t: Tape, parts: Sequence[Tensor], tag: Tag | None = None) -> Tensor:
    """Join along a new last dimension, by a copy."""
    node = t.record(partial(_unstacked, len(parts)), parts)
    return attach(t.new((*parts[0].shape, len(parts)), promoted(*parts), None, tag), node)


def _unstacked(count: int, t: Tape, saved: Saved, grads: Grads) -> Found:
    grad = first(grads)
    return [grad.as_(grad.shape[:-1], grad.strides[:-1]) for _ in range(count)]


# -- element by element ----------------------------------------------------------------------------------------------


def to(t: Tape, x: Tensor, dtype: str, tag: Tag | None = None) -> Tensor:
    """Another dtype: itself where it has it."""
    if x.dtype == dtype:
        return x
    node = t.record(partial(_cast, x.dtype), (x,))
    return attach(t.new(x.shape, dtype, preserved(x.shape, x.strides), tag), node)


def _cast(dtype: str, t: Tape, saved: Saved, grads: Grads) -> Found:
    grad = first(grads)
    return (grad if grad.dtype == dtype else t.like(grad, dtype),)


def add(t: Tape, a: Tensor, b: Tensor, tag: Tag | None = None) -> Tensor:
    """Sum of two tensors: one gradient serves both."""
    node = t.record(_added, (a, b))
    return attach(t.elementwise(a, b, tag=tag), node)


def _added(t: Tape, saved: Saved, grads: Grads) -> Found:
    return grads[0], grads[0]


def add_in_place(t: Tape, a: Tensor, b: Tensor) -> Tensor:
    """a, to which b is added where it lies."""
    node = t.record(_added, (a, b))
    return attach(a.alias(), node)


def where(t: Tape, seen: Tensor, x: Tensor, tag: Tag | None = None) -> Tensor:
    """x where it is seen, a number elsewhere."""
    number = t.new((), x.dtype, None, tag)
    node = t.record(_where, (x,), seen)
    out = t.elementwise(x, tag=tag)
    del number
    return attach(out, node)


def _where(t: Tape, saved: Saved, grads: Grads) -> Found:
    grad = first(grads)
    zero = t.new((), grad.dtype)
    found = t.elementwise(grad)
    del zero
    return (found,)


def subtract(t: Tape, a: Tensor, b: Tensor, tag: Tag | None = None) -> Tensor:
    """Difference of two tensors."""
    node = t.record(partial(_subtracted, b.node is not None), (a, b))
    return attach(t.elementwise(a, b, tag=tag), node)


def _subtracted(both: bool, t: Tape, saved: Saved, grads: Grads) -> Found:
    grad = first(grads)
    return grad, t.like(grad) if both else None


def mul(t: Tape, a: Tensor, b: Tensor, tag: Tag | None = None) -> Tensor:
    """Product of two tensors: each is kept where the other needs a gradient."""
    node = t.record(_multiplied, (a, b), b if a.node else None, a if b.node else None)
    return attach(t.elementwise(a, b, tag=tag), node)


def _multiplied(t: Tape, saved: Saved, grads: Grads) -> Found:
    grad, (other, this) = first(grads), saved
    of_other = None if this is None else t.elementwise(grad, this)
    return None if other is None else t.elementwise(grad, other), of_other


def scale(t: Tape, x: Tensor, tag: Tag | None = None) -> Tensor:
    """Times a number, or divided by one."""
    node = t.record(_like, (x,))
    return attach(t.elementwise(x, tag=tag), node)


def _like(t: Tape, saved: Saved, grads: Grads) -> Found:
    return (t.elementwise(first(grads)),)


def negative(t: Tape, x: Tensor, tag: Tag | None = None) -> Tensor:
    """Minus x."""
    node = t.record(_like, (x,))
    return attach(t.elementwise(x, tag=tag), node)


def shift(t: Tape, x: Tensor, tag: Tag | None = None) -> Tensor:
    """Plus a number, or a tensor without a gradient that broadcasts to it."""
    node = t.record(_same, (x,))
    return attach(t.elementwise(x, tag=tag), node)


def mask(t: Tape, x: Tensor, additive: Tensor, tag: Tag | None = None) -> Tensor:
    """Plus a mask that needs no gradient."""
    node = t.record(_same, (x,))
    return attach(t.elementwise(x, additive, tag=tag), node)


def power(t: Tape, x: Tensor, tag: Tag | None = None) -> Tensor:
    """x to a whole number: the gradient holds a power, its multiple and their product."""
    x = wide(t, x)
    node = t.record(_powered, (x,), x)
    return attach(t.elementwise(x, tag=tag), node)


def _powered(t: Tape, saved: Saved, grads: Grads) -> Found:
    x = saved[0]
    assert x is not None
    lower = t.elementwise(x)
    multiple = t.elementwise(lower)
    return (t.elementwise(first(grads), multiple),)


def mean(t: Tape, x: Tensor, tag: Tag | None = None) -> Tensor:
    """Mean over the last dimension, which stays with one element."""
    node = t.record(partial(_spread, x.shape), (x,))
    return attach(t.new((*x.shape[:-1], 1), x.dtype, None, tag), node)


def _spread(shape: Shape, t: Tape, saved: Saved, grads: Grads) -> Found:
    return (t.new(shape, first(grads).dtype),)


def rsqrt(t: Tape, x: Tensor, tag: Tag | None = None) -> Tensor:
    """One over the square root."""
    x = wide(t, x)
    node = t.record(_rsqrt, (x,))
    out = t.elementwise(x, tag=tag)
    t.keep(node, out)
    return attach(out, node)


def _rsqrt(t: Tape, saved: Saved, grads: Grads) -> Found:
    (result,) = saved
    assert result is not None
    cube, half = t.elementwise(result), t.elementwise(first(grads))
    return (t.elementwise(half, cube),)


def of_input(t: Tape, x: Tensor, tag: Tag | None = None) -> Tensor:
    """A function whose gradient needs its input: SiLU, GELU, ReLU's square root…; one kernel each way."""
    node = t.record(_from_saved, (x,), x)
    return attach(t.elementwise(x, tag=tag), node)


def softplus(t: Tape, x: Tensor, tag: Tag | None = None) -> Tensor:
    """log(1 + exp(x)), whose gradient lies as the one that comes; on meta as x."""
    node = t.record(_softplus, (x,), x)
    return attach(t.elementwise(x, tag=tag), node)


def _softplus(t: Tape, saved: Saved, grads: Grads) -> Found:
    (x,) = saved
    assert x is not None
    return (t.elementwise(x, first(grads)) if t.on_meta else t.elementwise(first(grads), x),)


def of_output(t: Tape, x: Tensor, tag: Tag | None = None) -> Tensor:
    """A function whose gradient needs its output: tanh, sigmoid, ReLU; one kernel each way."""
    node = t.record(_from_saved, (x,))
    out = t.elementwise(x, tag=tag)
    t.keep(node, out)
    return attach(out, node)


def _from_saved(t: Tape, saved: Saved, grads: Grads) -> Found:
    (x,) = saved
    assert x is not None
    return (t.elementwise(first(grads), x),)


def clip(t: Tape, x: Tensor, tag: Tag | None = None) -> Tensor:
    """`clamp_`, in place: what it was is kept as a copy."""
    node = t.record(_clipped, (x,))
    if node is not None:
        t.keep(node, t.like(x, tag=tag))
    return attach(x.as_(x.shape, x.strides), node)


def _clipped(t: Tape, saved: Saved, grads: Grads) -> Found:
    (x,) = saved
    assert x is not None
    held = t.new((), x.dtype), t.like(x, "bool"), t.like(x, "bool")
    out = t.elementwise(first(grads), held[1])
    del held
    return (out,)


def clamp(t: Tape, x: Tensor, both: bool, tag: Tag | None = None) -> Tensor:
    """Cut off at a largest number, or at `both` ends: a copy; its input is kept."""
    node = t.record(partial(_clamped, both), (x,), x)
    return attach(t.elementwise(x, tag=tag), node)


def _clamped(both: bool, t: Tape, saved: Saved, grads: Grads) -> Found:
    (x,) = saved
    assert x is not None
    zero = t.new((), first(grads).dtype)
    inside = t.elementwise(x, dtype="bool")
    other = t.elementwise(x, dtype="bool") if both else None
    out = t.elementwise(first(grads), inside)
    del zero, inside, other
    return (out,)


def dropout(t: Tape, x: Tensor, p: float, tag: Tag | None = None) -> Tensor:
    """Dropout with one boolean a value, which is kept; nothing where p is 0."""
    if not p:
        return x
    node = t.record(_dropped, (x,))
    out = t.like(x, tag=tag)
    kept = t.like(x, "bool")
    t.keep(node, kept)
    return attach(out, node)


def _dropped(t: Tape, saved: Saved, grads: Grads) -> Found:
    return (t.elementwise(first(grads)),)


def softmax(t: Tape, x: Tensor, dtype: str | None = None, tag: Tag | None = None) -> Tensor:
    """Softmax over the last dimension, in fp32 if asked (or under autocast), for which CUDA casts bf16, not fp16."""
    if dtype is None:
        x = wide(t, x)
    fused = dtype == "fp32" and x.dtype == "fp16" and not t.on_meta
    if dtype is not None and not fused:
        x = to(t, x, dtype, tag)
    node = t.record(partial(_softmax, x.dtype), (x,))
    out = t.new(x.shape, dtype or x.dtype, None, tag)
    t.keep(node, out)
    return attach(out, node)


def _softmax(dtype: str, t: Tape, saved: Saved, grads: Grads) -> Found:
    grad = first(grads)
    out = t.new(grad.shape, dtype)
    t.moment(grad.nbytes)
    return (out,)


# -- products --------------------------------------------------------------------------------------------------------


def low(t: Tape, x: Tensor) -> Tensor:
    """What autocast makes of a product's argument: a weight in fp32 is cast once, and kept until autocast ends."""
    if t.autocast is None or x.dtype == t.autocast:
        return x
    if x.node is not None and x.dtype == "fp32" and x.is_leaf:
        kept = t.casts.get(x.node)
        if kept is None:
            kept = t.casts[x.node] = to(t, x, t.autocast)
        return kept
    return to(t, x, t.autocast)


def wide(t: Tape, x: Tensor) -> Tensor:
    """What autocast makes of the argument of a function that must be accurate."""
    return to(t, x, "fp32") if t.autocast is not None and x.dtype == t.autocast else x


def linear(
    t: Tape, x: Tensor, weight: Tensor, bias: Tensor | None = None, tag: Tag | None = None, shared: bool = False
) -> Tensor:
    """x · weightᵀ + bias over the last dimension. The input is kept for the weight's gradient, the weight for the
    input's. `shared`: of a bias that every tensor parallel rank adds, each makes its part."""
    bias = None if bias is None else low(t, bias)
    weight = low(t, weight)
    x = low(t, x)
    if bias is not None and len(x.shape) == 3 and not is_contiguous(x.shape, x.strides):
        return _plus_bias(t, linear(t, x, weight, None, tag), bias, tag)
    outputs, inputs = weight.shape
    shape = x.shape
    turned = _turned(t, weight) if bias is None else None
    flat = x if len(shape) == 2 else reshape(t, x, -1, inputs)
    turned = turned or _turned(t, weight)
    operands = (flat, turned) if bias is None else (flat, turned, bias)
    gradient = _linear if bias is None else _biased
    if flat.strides[0] == 1 and not is_contiguous(flat.shape, flat.strides):
        gradient = partial(_by_columns, gradient)
    node = t.record(gradient, operands, flat if weight.node else None, weight if flat.node else None)
    t.multiplies(biased=bias is not None)
    part = t.new(bias.shape, bias.dtype, None, tag) if shared and bias is not None else None
    out = attach(t.new((flat.shape[0], outputs), x.dtype, None, tag), node)
    del part
    return out if len(shape) == 2 else reshape(t, out, *shape[:-1], outputs)


def _plus_bias(t: Tape, x: Tensor, bias: Tensor, tag: Tag | None) -> Tensor:
    """`add_` after a product whose input does not lie row after row; on meta a copy."""
    node = t.record(_added, (x, bias))
    return attach(t.elementwise(x, bias, tag=tag) if t.on_meta else x.as_(x.shape, x.strides), node)


def _turned(t: Tape, weight: Tensor) -> Tensor:
    """The transposed weight: its node decides when the gradient arrives."""
    return attach(weight.alias(), t.record(_viewed, (weight,)))


def _viewed(t: Tape, saved: Saved, grads: Grads) -> Found:
    grad = first(grads)
    return (grad.as_(grad.shape, grad.strides),)


def _linear(t: Tape, saved: Saved, grads: Grads) -> Found:
    grad, (x, weight) = first(grads), saved
    t.multiplies()
    of_weight = None if x is None else t.new((grad.shape[1], x.shape[1]), grad.dtype)
    return _of_input(t, grad, weight), of_weight


def _biased(t: Tape, saved: Saved, grads: Grads) -> Found:
    grad, (x, weight) = first(grads), saved
    t.multiplies()
    of_input = _of_input(t, grad, weight)
    return of_input, None if x is None else t.new((grad.shape[1], x.shape[1]), grad.dtype), grad


def _by_columns(gradient: Gradient, t: Tape, saved: Saved, grads: Grads) -> Found:
    """The gradient of an input that lies column after column lies so, too."""
    of_input, *others = gradient(t, saved, grads)
    return [None if of_input is None else of_input.as_(of_input.shape, (1, of_input.shape[0])), *others]


def _of_input(t: Tape, grad: Tensor, weight: Tensor | None) -> Tensor | None:
    return None if weight is None else t.new((grad.shape[0], weight.shape[1]), grad.dtype)


def conv1d(t: Tape, x: Tensor, weight: Tensor, bias: Tensor, tag: Tag | None = None, shared: bool = False) -> Tensor:
    """GPT-2's linear layer, whose weight lies as (inputs, outputs). `shared` as in `linear`."""
    inputs, outputs = weight.shape
    flat = reshape(t, x, -1, inputs)
    weight = low(t, weight)
    flat = low(t, flat)
    bias = low(t, bias)
    node = t.record(_conv1d, (flat, weight, bias), flat if weight.node else None, weight if flat.node else None)
    t.multiplies(biased=True)
    part = t.new(bias.shape, bias.dtype, None, tag) if shared else None
    out = attach(t.new((flat.shape[0], outputs), flat.dtype, None, tag), node)
    del part
    return reshape(t, out, *x.shape[:-1], outputs)


def _conv1d(t: Tape, saved: Saved, grads: Grads) -> Found:
    grad, (x, weight) = first(grads), saved
    t.multiplies()
    of_input = None if weight is None else t.new((grad.shape[0], weight.shape[0]), grad.dtype)
    return of_input, None if x is None else t.new((x.shape[1], grad.shape[1]), grad.dtype), grad


def convolution(t: Tape, x: Tensor, weight: Tensor, bias: Tensor | None, tag: Tag | None = None) -> Tensor:
    """A depthwise convolution of x (b, d, s), padded at both ends by what its weight (d, 1, k) reaches beyond."""
    bias = None if bias is None else low(t, bias)
    weight = weight if t.autocast is None else to(t, weight, t.autocast)  # a view, which autocast doesn't keep
    x = low(t, x)
    node = t.record(partial(_convolved, bias is not None), there(x, weight, bias), x, weight)
    b, d, s = x.shape
    return attach(t.new((b, d, s + weight.shape[2] - 1), x.dtype, None, tag), node)


def _convolved(biased: bool, t: Tape, saved: Saved, grads: Grads) -> Found:
    x, weight = there(*saved)
    found = [t.new(x.shape, x.dtype), t.new(weight.shape, weight.dtype)]
    return [*found, t.new(weight.shape[:1], weight.dtype)] if biased else found


def tanh_gelu(t: Tape, x: Tensor, tag: Tag | None = None) -> Tensor:
    """BLOOM's GELU, both ways written in Python: x · 0.5 · (1 + tanh(0.8·x·(1 + 0.04·x·x)))."""
    node = t.record(_tanh_gelu, (x,))
    halved = t.elementwise(x, tag=tag)
    tanh = _tanh(t, x, tag)
    shifted = t.elementwise(tanh, tag=tag)
    del tanh
    out = t.elementwise(halved, shifted, tag=tag)
    del halved, shifted
    t.keep(node, x)
    return attach(out, node)


def _tanh(t: Tape, x: Tensor, tag: Tag | None = None) -> Tensor:
    """tanh(0.8·x·(1 + 0.04·x·x))"""
    scaled = t.elementwise(x, tag=tag)
    last = t.elementwise(x, tag=tag)
    last = t.elementwise(last, x, tag=tag)
    last = t.elementwise(last, tag=tag)
    last = t.elementwise(scaled, last, tag=tag)
    del scaled
    return t.elementwise(last, tag=tag)


def _tanh_gelu(t: Tape, saved: Saved, grads: Grads) -> Found:
    (x,) = saved
    assert x is not None
    tanh = _tanh(t, x)
    halved = t.elementwise(x)
    left = t.elementwise(tanh)
    left = t.elementwise(left)
    right = t.elementwise(x)
    right = t.elementwise(right)
    right = t.elementwise(right)
    slope = t.elementwise(left, right)
    del left, right
    slope = t.elementwise(halved, slope)
    del halved
    shifted = t.elementwise(tanh)
    shifted = t.elementwise(shifted)
    factor = t.elementwise(slope, shifted)
    del slope, shifted
    return (t.elementwise(factor, first(grads)),)


def product(t: Tape, a: Tensor, b: Tensor, tag: Tag | None = None) -> Tensor:
    """`mm`: the gradient of a transposed matrix lies as it does."""
    b = low(t, b)
    a = low(t, a)
    node = t.record(partial(_product, b.strides[0] == 1), (a, b), a if b.node else None, b if a.node else None)
    t.multiplies()
    return attach(t.new((a.shape[0], b.shape[1]), a.dtype, None, tag), node)


def _product(turned: bool, t: Tape, saved: Saved, grads: Grads) -> Found:
    grad, (a, b) = first(grads), saved
    t.multiplies()
    of_b = None
    if a is not None:
        of_b = t.new((a.shape[1], grad.shape[1]), grad.dtype, (1, a.shape[1]) if turned else None)
    return None if b is None else t.new((grad.shape[0], b.shape[0]), grad.dtype), of_b


def matmul(t: Tape, a: Tensor, b: Tensor, tag: Tag | None = None) -> Tensor:
    """A batch of products over the last two dimensions; operands that don't lie matrix after matrix are copied."""
    b = low(t, b)
    a = low(t, a)
    batch = a.shape[:-2]
    a = reshape(t, a, -1, *a.shape[-2:])
    b = reshape(t, b, -1, *b.shape[-2:])
    node = t.record(_batched, (a, b), a if b.node else None, b if a.node else None)
    t.multiplies()
    out = attach(t.new((a.shape[0], a.shape[1], b.shape[2]), a.dtype, None, tag), node)
    return reshape(t, out, *batch, *out.shape[1:])


def batched_product(t: Tape, a: Tensor, b: Tensor, tag: Tag | None = None) -> Tensor:
    """`bmm`."""
    b = low(t, b)
    a = low(t, a)
    node = t.record(_batched, (a, b), a if b.node else None, b if a.node else None)
    t.multiplies()
    return attach(t.new((a.shape[0], a.shape[1], b.shape[2]), a.dtype, None, tag), node)


def scaled_product(t: Tape, onto: Tensor, a: Tensor, b: Tensor, tag: Tag | None = None, scales: bool = True) -> Tensor:
    """`baddbmm` times a number onto what needs no gradient: unless that is 1, a copy scales each of its gradients."""
    b = low(t, b)
    a = low(t, a)
    onto = low(t, onto)
    node = t.record(partial(_scaled, scales), (a, b), a if b.node else None, b if a.node else None)
    t.multiplies()
    return attach(t.new((a.shape[0], a.shape[1], b.shape[2]), a.dtype, None, tag), node)


def _scaled(scales: bool, t: Tape, saved: Saved, grads: Grads) -> Found:
    grad, (a, b) = first(grads), saved
    t.multiplies()
    of_a = None if b is None else t.new((b.shape[0], grad.shape[1], b.shape[1]), grad.dtype)
    of_a = t.elementwise(of_a) if scales and of_a is not None else of_a
    of_b = None if a is None else t.new((a.shape[0], a.shape[2], grad.shape[2]), grad.dtype)
    return of_a, t.elementwise(of_b) if scales and of_b is not None else of_b


def _batched(t: Tape, saved: Saved, grads: Grads) -> Found:
    grad, (a, b) = first(grads), saved
    t.multiplies()
    of_b = None if a is None else t.new((a.shape[0], a.shape[2], grad.shape[2]), grad.dtype)
    return None if b is None else t.new((b.shape[0], grad.shape[1], b.shape[1]), grad.dtype), of_b


def embedding(t: Tape, ids: Tensor, weight: Tensor, tag: Tag | None = None) -> Tensor:
    """Rows of a table. Its gradient is as large as the table, and many tokens are sorted for it."""
    node = t.record(partial(of_rows, weight.shape), (weight,), ids)
    return attach(t.new((*ids.shape, weight.shape[1]), weight.dtype, None, tag), node)


def of_rows(shape: Shape, t: Tape, saved: Saved, grads: Grads) -> Found:
    """The gradient of a table of which rows were taken."""
    (ids,) = saved
    assert ids is not None
    out = t.new(shape, first(grads).dtype)
    if scratch := embedding_scratch_bytes(ids.numel, shape[1], shape[0]):
        t.moment(*scratch)
    return (out,)


def layer_norm(t: Tape, x: Tensor, weight: Tensor | None, bias: Tensor | None, tag: Tag | None = None) -> Tensor:
    """Layer normalization as one kernel, which keeps its input, mean and deviation."""
    x = wide(t, x)
    given = [p for p in (weight, bias) if p is not None]
    wanted = tuple([p.node is not None for p in (x, *given)])
    node = t.record(partial(_layer_normed, wanted), (x, *given), x, *given)
    out = t.new(x.shape, x.dtype, None, tag)
    sizes = (*x.shape[:-1], 1)
    kept = t.new(sizes, "fp32", None, tag), t.new(sizes, "fp32", None, tag)
    t.keep(node, *kept)
    return attach(out, node)


def _layer_normed(wanted: tuple[bool, ...], t: Tape, saved: Saved, grads: Grads) -> Found:
    of = [x for x in saved[:-2] if x is not None]
    return [t.new(x.shape, x.dtype) if wants else None for x, wants in zip(of, wanted, strict=True)]


def cross_entropy(t: Tape, scores: Tensor, labels: Tensor, tag: Tag | None = None) -> Tensor:
    """Mean cross entropy of (rows, classes): log-probabilities are kept, and their gradient stands beside the next."""
    rows = t.record(partial(_log_softmax, scores.dtype), (scores,))
    log = t.new(scores.shape, scores.dtype, None, tag)
    t.keep(rows, log)
    attach(log, rows)
    if t.autocast is not None and log.dtype != "fp32":
        log = to(t, log, "fp32")
    node = t.record(_nll, (log,), log, labels)
    loss, weight = t.new((), log.dtype, None, tag), t.new((), log.dtype, None, tag)
    t.keep(node, weight)
    return attach(loss, node)


def _nll(t: Tape, saved: Saved, grads: Grads) -> Found:
    log = saved[0]
    assert log is not None
    return (t.new(log.shape, log.dtype),)


def _log_softmax(dtype: str, t: Tape, saved: Saved, grads: Grads) -> Found:
    return (t.new(first(grads).shape, dtype),)
