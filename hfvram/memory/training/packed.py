"""Products with weights that bitsandbytes packed: 4 bits (`Linear4bit`) and int8 (`Linear8bitLt`), frozen.

Source: bitsandbytes 0.50, nn/modules.py, autograd/_functions.py, functional.py, backends/cuda/ops.py; held against
`memory/exact/quantized.py` event by event.
"""

from functools import partial

from hfvram.memory.bitsandbytes import BLOCK, FEW_ROWS
from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training.operators import Found, Grads
from hfvram.memory.training.tape import Saved, Tape
from hfvram.memory.training.tensors import Shape, Tensor, contiguous

BNB = "bitsandbytes 0.50: autograd/_functions.py"
UNPACKED = Tag("weights, dequantized for a product", "activations", "", BNB)
CASTED = Tag("inputs in the computing dtype", "activations", "b·s·h·e", BNB)
ROWS = Tag("inputs in int8", "activations", "", BNB)


class Packed:
    """How a weight is packed: in which computing dtype it is unpacked, its shape as (outputs, inputs)."""

    __slots__ = ("dtype", "method", "nested", "shape")

    def __init__(self, method: str, dtype: str, nested: bool, shape: Shape) -> None:
        self.method = method
        self.dtype = dtype
        self.nested = nested
        self.shape = shape

    def scales(self, t: Tape, both: bool) -> list[Tensor]:
        """Nested scales as a product reads them: unpacked, and shifted in place or beside (`both`)."""
        outputs, inputs = self.shape
        blocks = (-(-outputs * inputs // BLOCK),)
        return [t.new(blocks, "fp32", None, UNPACKED) for _ in range((1 + both) if self.nested else 0)]


def product(t: Tape, x: Tensor, packed: Packed, weight: Tensor, bias: Tensor | None, tag: Tag | None) -> Tensor:
    """x · weightᵀ + bias of a packed weight."""
    if packed.method == "int8":
        return _product8(t, x, packed, weight, bias, tag)
    own = x.dtype
    x = op.to(t, x, packed.dtype, CASTED)
    bias = None if bias is None else op.to(t, bias, packed.dtype)
    return op.to(t, _product4(t, x, packed, bias, tag), own, tag)


def _product4(t: Tape, x: Tensor, packed: Packed, bias: Tensor | None, tag: Tag | None) -> Tensor:
    node = t.record(partial(_back4, packed), (x,))
    outputs, inputs = packed.shape
    if x.numel <= FEW_ROWS * inputs:
        return op.attach(t.new((*x.shape[:-1], outputs), x.dtype, None, tag), node)
    grad, t.grad = t.grad, False
    scales = packed.scales(t, both=True)
    out = op.linear(t, x, t.new(packed.shape, x.dtype, None, UNPACKED), bias, tag)
    del scales
    t.grad = grad
    return op.attach(out, node)


def _back4(packed: Packed, t: Tape, saved: Saved, grads: Grads) -> Found:
    grad = op.first(grads)
    scales = packed.scales(t, both=False)
    weight = t.new(packed.shape, packed.dtype, None, UNPACKED)
    del scales
    weight = op.to(t, weight, grad.dtype)
    return (_onto_inputs(t, grad, weight),)


def _onto_inputs(t: Tape, grad: Tensor, weight: Tensor) -> Tensor:
    """grad · weight over the last dimension."""
    rows = op.reshape(t, grad, -1, grad.shape[-1])
    t.multiplies()
    return t.new((*grad.shape[:-1], weight.shape[1]), rows.dtype)


def _product8(t: Tape, x: Tensor, packed: Packed, weight: Tensor, bias: Tensor | None, tag: Tag | None) -> Tensor:
    node = t.record(partial(_back8, packed, x.dtype), (x,))
    grad, t.grad = t.grad, False
    outputs, inputs = packed.shape
    rows = op.reshape(t, x, -1, inputs)
    count = rows.shape[0]
    half = op.to(t, rows, "fp16", ROWS)
    scales = t.new((count,), "fp32", None, ROWS)
    quantized = t.new((count, inputs), "int8", None, ROWS)
    del half
    summed = t.new((count, outputs), "int32", None, tag)
    out = op.to(t, t.new((count, outputs), "fp16", None, tag), x.dtype, tag)
    del scales, quantized, summed
    out = op.reshape(t, out, *x.shape[:-1], outputs)
    t.grad = grad
    t.keep(node, weight, weight)  # the weight and its scales
    return op.attach(out, node)


def _back8(packed: Packed, dtype: str, t: Tape, saved: Saved, grads: Grads) -> Found:
    grad = op.first(grads)
    rows = op.dense(t, op.reshape(t, grad, -1, grad.shape[-1]))
    weight = t.new(packed.shape, dtype, None, UNPACKED)
    t.moment(packed.shape[0] * 4)
    out = _onto_inputs(t, op.to(t, rows, dtype), weight)
    shape = (*grad.shape[:-1], packed.shape[1])
    return (out.as_(shape, contiguous(shape)),)
