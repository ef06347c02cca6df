"""Mamba's selective scan with gradients in plain PyTorch, where its kernels are not installed: every token keeps its
state.

b sequences of s tokens, d channels, state N, rank r of Δ. Source: transformers 5.17, models/mamba/modeling_mamba.py
`mamba_selective_scan`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Final

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training.selective_scan import DECAY, SELECTED
from hfvram.memory.training.tape import Saved, Tape
from hfvram.memory.training.tensors import ITEM_BYTES, Shape, Tensor, contiguous

SCAN: Final = "transformers 5.17: mamba_selective_scan"
DISCRETE = Tag("state space, decays and inputs of every token", "activations", "b·s·d·N·4", SCAN)
STATES = Tag("state space, states of every token", "activations", "b·s·d·N·(4+e)", SCAN)
SCANNED = Tag("state space, output of the scan", "activations", "b·s·d·e", SCAN)
EACH: Final = 32
"""Up to so many tokens each one is written."""
ENDS: Final = 4
"""Of more, so many at either end are: those between them allocate alike, and are written as one."""
BLOCK: Final = 512


def scan(
    t: Tape,
    hidden: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    z: Tensor,
    bias: Tensor,
) -> Tensor:
    """Over hidden (b, d, s): decays and inputs of all tokens at once, then a loop over them."""
    n, d, s = hidden.shape
    state = a.shape[1]
    dt = op.add(t, dt, op.reshape(t, op.to(t, bias, dt.dtype, DECAY), d, 1), SELECTED)
    dt = op.of_input(t, op.wide(t, dt), SELECTED)
    decays = op.of_output(
        t, op.mul(t, op.reshape(t, a, 1, d, 1, state), op.reshape(t, dt, n, d, s, 1), DISCRETE), DISCRETE
    )
    wide_b = op.to(t, op.reshape(t, b, n, 1, s, state), "fp32", SELECTED)
    discrete = op.mul(t, op.reshape(t, dt, n, d, s, 1), wide_b, DISCRETE)
    del wide_b
    inputs = op.mul(t, discrete, op.to(t, op.reshape(t, hidden, n, d, s, 1), "fp32", DISCRETE), DISCRETE)
    last = t.new((n, d, state), hidden.dtype, None, STATES)
    outs: list[Tensor] = []
    for count in written(s):
        if count > 1:
            last, column = _tokens(t, count, (decays, inputs, c, last), hidden.dtype)
        else:
            last = op.add(t, op.mul(t, op.select(t, decays, 2), last, STATES), op.select(t, inputs, 2), STATES)
            column = _column(t, op.to(t, last, hidden.dtype, STATES), op.select(t, c, 1))
        outs.append(column)
    out = _stacked(t, outs, (n, d, s))
    out = op.add(t, out, op.mul(t, hidden, op.reshape(t, skip, 1, d, 1), SCANNED), SCANNED)
    return op.mul(t, out, op.of_input(t, z, SCANNED), SCANNED)


def written(s: int) -> list[int]:
    """How many tokens each step of the loop stands for.

    >>> written(3), written(100)
    ([1, 1, 1], [1, 1, 1, 1, 92, 1, 1, 1, 1])
    """
    return [1] * s if s <= EACH else [*[1] * ENDS, s - 2 * ENDS, *[1] * ENDS]


def _column(t: Tape, low: Tensor, c: Tensor) -> Tensor:
    return op.select(t, op.matmul(t, low, op.reshape(t, c, *c.shape, 1), SCANNED), 2)


def _tokens(t: Tape, count: int, given: Sequence[Tensor], dtype: str) -> tuple[Tensor, Tensor]:
    """The last state of many tokens, and their columns: what each keeps is joined, and given back at once."""
    _, inputs, c, last = given
    n, d, _ = last.shape
    node = t.record(partial(_token_again, c.shape, c.dtype, inputs.shape), given)
    if node is not None:
        node.outputs = 2
    kept = _block(t, count, last.nbytes, STATES)
    low = None if dtype == "fp32" else _block(t, count, last.nbytes // 2, STATES)
    out = _block(t, count, n * d * ITEM_BYTES[dtype], SCANNED)
    t.keep(node, kept, low)
    after = op.attach(Tensor(kept.storage, last.shape, last.strides, "fp32"), node, 0)
    return after, op.attach(Tensor(out.storage, (n, d, count), contiguous((n, d, count)), dtype), node, 1)


def _block(t: Tape, count: int, nbytes: int, tag: Tag) -> Tensor:
    """So many tensors, each rounded up as the allocator rounds it."""
    return t.new((count * -(-nbytes // BLOCK) * BLOCK,), "uint8", None, tag)


def _token_again(c: Shape, low: str, whole: Shape, t: Tape, saved: Saved, grads: op.Grads) -> op.Found:
    """One token's gradients; those of all tokens stand already, and are added to in place."""
    state, out = grads
    assert out is not None
    n, d = out.shape[:2]
    dtype, width = out.dtype, whole[-1]
    column = t.new((n, d, 1), dtype)
    of_c, narrow = t.new((n, width, 1), dtype), t.new((n, d, width), dtype)
    del column
    placed = t.new(c, low)
    del of_c, placed
    wide = narrow if dtype == "fp32" else t.new(narrow.shape, "fp32")
    del narrow
    placed = t.new(whole, "fp32")
    del placed
    of_last, of_decay = t.like(wide), t.like(wide)
    del wide
    placed = t.new(whole, "fp32")
    del placed, of_decay, state
    return None, None, None, of_last


def _stacked(t: Tape, outs: list[Tensor], shape: Shape) -> Tensor:
    node = t.record(partial(_unstacked, [x.shape for x in outs]), outs)
    return op.attach(t.new(shape, outs[0].dtype, None, SCANNED), node)


def _unstacked(shapes: list[Shape], t: Tape, saved: Saved, grads: op.Grads) -> op.Found:
    grad = op.first(grads)
    return [grad.as_(shape, (*grad.strides[:2], 1)[: len(shape)]) for shape in shapes]
