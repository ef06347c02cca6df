"""Sequence parallelism within tensor parallelism: norms, dropouts and residuals have s÷tp tokens on each rank.

A block gathers the sequence where it begins, and its last product is reduced and scattered. PyTorch's DTensor, by which
transformers' plans are run (`memory/exact/sequence_parallel.py`), keeps what is gathered for the backward pass, and a
block whose code does more than split products gathers, sums up and takes its part again. Megatron-LM, after which types
without a plan are split (`Tape.regathers`), keeps the part and gathers again, into one buffer that stays.

Source: Korthikanti et al., arXiv 2205.05198, section 4.2; PyTorch 2.13, distributed/tensor/_redistribute.py,
distributed/_functional_collectives.py; Megatron-LM, megatron/core/tensor_parallel/layers.py
`LinearWithGradAccumulationAndAsyncCommunication`, mappings.py. DTensor's was held event by event against that code.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training.operators import Found, Grads, attach, first
from hfvram.memory.training.tape import Saved, Tape
from hfvram.memory.training.tensors import Shape, Tensor
from hfvram.model.layers import Param

FUNCTIONAL: Final = "PyTorch 2.13: distributed/_functional_collectives.py"
MEGATRON: Final = "Megatron-LM: core/tensor_parallel/layers.py"
WHOLE = Tag("sequence parallel, gathered from ranks", "activations", "b·s·h·e", FUNCTIONAL)
PART = Tag("sequence parallel, a rank's part", "activations", "b·s/tp·h·e", FUNCTIONAL)
BUFFER = Tag("sequence parallel, gathered from ranks", "workspace", "b·s·h·e", MEGATRON)


def enter(t: Tape, x: Tensor, params: Iterable[Param]) -> Tensor:
    """A block of these parameters begins: what it is given, of the whole sequence where its products don't gather.

    What does more than split products is given it whole, and sums up itself."""
    if t.sp == 1:
        return x
    matrices = [p.split.how if p.split else "whole" for p in params if len(p.shape) > 1]
    t.scatters = set(matrices) <= {"columns", "rows"}
    if t.regathers:
        return x
    t.distributed = t.scatters
    x = gathered_sequence(t, x)
    t.distributed = False
    return x


def leave(t: Tape, x: Tensor) -> Tensor:
    """A block ends: this rank's part of what it made."""
    if t.sp == 1:
        return x
    around(t)
    return x if t.scatters else part_of_sequence(t, x)


def around(t: Tape) -> None:
    """What follows runs around the blocks."""
    t.distributed = t.sp > 1 and not t.regathers


def length(t: Tape, x: Tensor) -> int:
    """Tokens of the whole sequence of what a block was given."""
    return x.shape[1] * (t.sp if t.regathers else 1)


def gathered_sequence(t: Tape, x: Tensor) -> Tensor:
    """The parts of all ranks one after the other; what comes back is summed and scattered, or just this rank's part."""
    back = _scatter if t.scatters else _own
    node = t.record(partial(_back, back), (x,))
    return attach(_gather(t, x), node)


def _back(how: Callable[[Tape, Tensor], Tensor], t: Tape, saved: Saved, grads: Grads) -> Found:
    return (how(t, first(grads)),)


def scattered(t: Tape, x: Tensor) -> Tensor:
    """This rank's part of the sum over ranks; its gradient is gathered."""
    node = t.record(partial(_back, _gather), (x,))
    return attach(_scatter(t, x), node)


def part_of_sequence(t: Tape, x: Tensor) -> Tensor:
    """This rank's part of what all have; its gradient is gathered. All of it without sequence parallelism."""
    if t.sp == 1:
        return x
    node = t.record(partial(_back, _gather), (x,))
    return attach(_own(t, x), node)


def _gather(t: Tape, x: Tensor) -> Tensor:
    whole = _shape(x, t.sp, 1)
    if t.regathers:
        return t.new(whole, x.dtype, None, WHOLE)
    buffer = t.new(whole, x.dtype, None, WHOLE)
    parts = t.new(whole, x.dtype, None, WHOLE)
    out = t.new(whole, x.dtype, None, WHOLE) if x.shape[0] > 1 else parts  # parts of one sequence lie as the whole does
    del buffer, parts
    return out


def _scatter(t: Tape, x: Tensor) -> Tensor:
    part = _shape(x, 1, t.sp)
    if t.regathers:
        return t.new(part, x.dtype, None, PART)
    chunks = t.new(x.shape, x.dtype, None, WHOLE)
    buffer = t.new(part, x.dtype, None, PART)
    out = t.new(part, x.dtype, None, PART)
    del chunks, buffer
    return out


def _own(t: Tape, x: Tensor) -> Tensor:
    return t.new(_shape(x, 1, t.sp), x.dtype, None, PART)


def _shape(x: Tensor, times: int, by: int) -> Shape:
    return (x.shape[0], x.shape[1] * times // by, *x.shape[2:])


def again_gathered(
    t: Tape, x: Tensor, weight: Tensor, bias: Tensor | None, tag: Tag | None, turned: bool = False
) -> Tensor:
    """A product of columns as Megatron-LM has it: its input is gathered into a buffer, and again for the backward.

    `turned`: the weight lies as (inputs, outputs)."""
    bias = None if bias is None else op.low(t, bias)
    weight, x = op.low(t, weight), op.low(t, x)
    node = t.record(_again, (x, weight) if bias is None else (x, weight, bias), x, weight)
    _buffer(t, x)
    t.multiplies(biased=bias is not None)
    outputs = weight.shape[1 if turned else 0]
    return attach(t.new((x.shape[0], x.shape[1] * t.sp, outputs), x.dtype, None, tag), node)


def _again(t: Tape, saved: Saved, grads: Grads) -> Found:
    grad, (x, weight) = first(grads), saved
    assert x is not None
    assert weight is not None
    _buffer(t, x)
    t.multiplies()
    whole = t.new(_shape(x, t.sp, 1), grad.dtype)
    of_x = t.new(x.shape, grad.dtype)
    of_weight = t.new(weight.shape, grad.dtype)
    del whole
    return of_x, of_weight, grad


def _buffer(t: Tape, x: Tensor) -> None:
    """The one into which all products gather: as large as the largest, and never given back."""
    nbytes = x.nbytes * t.sp
    if nbytes > t.gathered_bytes:
        t.gathered_bytes = nbytes
        t.timeline.alloc(nbytes, BUFFER)
