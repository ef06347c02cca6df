"""What tensor parallel ranks tell each other in the middle of the graph, and what that takes.

A functional collective copies what it is given and returns another tensor of it: both stand for a moment.
Source: PyTorch 2.13, torch/distributed/_functional_collectives.py, torch/distributed/tensor/_redistribute.py;
transformers 5.17, distributed/tensor_parallel.py. Held event by event against that code.
"""

from collections.abc import Callable
from functools import partial
from typing import Final

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training.operators import Found, Grads, attach, first
from hfvram.memory.training.sequence_parallel import again_gathered, part_of_sequence, scattered
from hfvram.memory.training.tape import Saved, Tape
from hfvram.memory.training.tensors import Shape, Tensor
from hfvram.model.layers import Split

FUNCTIONAL: Final = "PyTorch 2.13: distributed/_functional_collectives.py"
REDUCED = Tag("tensor parallel, summed over ranks", "activations", "b·s·h·e", FUNCTIONAL)
MASKED = Tag("tensor parallel, tokens of other ranks", "activations", "b·s·8", FUNCTIONAL)
GATHERED = Tag("tensor parallel, gathered from ranks", "activations", "", FUNCTIONAL)


Product = Callable[..., Tensor]


def product(
    t: Tape, run: Product, x: Tensor, weight: Tensor, bias: Tensor | None, split: Split | None, tag: Tag | None
) -> Tensor:
    """A linear layer, and what goes between ranks before and after it where each has a part of it."""
    if split is None:
        return run(t, x, weight, bias, tag)
    if split.how in ("columns", "columns, gathered"):
        if t.scatters and t.regathers:
            return again_gathered(t, x, weight, bias, tag, turned=run is op.conv1d)
        out = run(t, x if t.scatters else copied(t, x), weight, bias, tag)
        return gathered(t, out, split.ranks) if split.how == "columns, gathered" else out
    if split.how == "rows of parts":
        x = own_part(t, x, split.ranks)
    out = run(t, x, weight, bias, tag, True)
    return scattered(t, out) if t.scatters else reduced(t, out)


def embedding(
    t: Tape, ids: Tensor, table: Tensor, split: Split | None, vocabulary: int, tag: Tag, entire: bool
) -> Tensor:
    """Vectors of the tokens that this rank has, zeros for the others, summed over ranks.

    A tied table (`vocabulary` tokens, of which this rank has a part) gets a gradient of all tokens, then its part. With
    sequence parallelism each goes on with a part of the sequence, unless it is needed `entire`: positions come first.
    """
    if split is None:
        out = op.embedding(t, ids, table, tag)
        return out if entire else part_of_sequence(t, out)
    mask = _elsewhere(t, ids)
    copy = t.new(ids.shape, "int64", None, MASKED)
    places = t.new(ids.shape, "int64", None, MASKED)
    del copy
    t.moment(8)
    whole = (max(vocabulary, table.shape[0]), table.shape[1])
    node = t.record(partial(_of_table, whole, table.shape), (table,), ids)
    out = attach(t.new((*ids.shape, table.shape[1]), table.dtype, None, tag), node)
    del places
    t.moment(2)
    del mask
    return reduced(t, out) if entire or t.sp == 1 else scattered(t, out)


def _elsewhere(t: Tape, ids: Tensor) -> Tensor:
    """Which tokens are other ranks'."""
    below = t.new(ids.shape, "bool", None, MASKED)
    above = t.new(ids.shape, "bool", None, MASKED)
    mask = t.new(ids.shape, "bool", None, MASKED)
    del below, above
    return mask


def _of_table(whole: Shape, part: Shape, t: Tape, saved: Saved, grads: Grads) -> Found:
    found = op.of_rows(whole, t, saved, grads)
    (all_tokens,) = found
    assert all_tokens is not None
    if part == whole:
        return found
    own = t.new(part, all_tokens.dtype)
    own.base = all_tokens  # until it has been added to the head's gradient
    return (own,)


def copied(t: Tape, x: Tensor) -> Tensor:
    """The same on every rank; its gradient is the sum of theirs."""
    node = t.record(_summed, (x,))
    return attach(x.as_(x.shape, x.strides), node)


def _summed(t: Tape, saved: Saved, grads: Grads) -> Found:
    return (_sum(t, first(grads)),)


def reduced(t: Tape, x: Tensor) -> Tensor:
    """The sum over ranks; its gradient is the same on each."""
    node = t.record(_passed, (x,))
    return attach(_sum(t, x), node)


def _passed(t: Tape, saved: Saved, grads: Grads) -> Found:
    grad = first(grads)
    return (grad.as_(grad.shape, grad.strides),)


def _sum(t: Tape, x: Tensor) -> Tensor:
    buffer = t.new(x.shape, x.dtype, None, REDUCED)
    out = t.new(x.shape, x.dtype, None, REDUCED)
    del buffer
    return out


def gathered(t: Tape, x: Tensor, ranks: int) -> Tensor:
    """The parts of all ranks side by side; its gradient is this rank's part."""
    node = t.record(partial(_cut, ranks), (x,))
    return attach(_whole(t, x, ranks), node)


def _whole(t: Tape, x: Tensor, ranks: int) -> Tensor:
    shape = (*x.shape[:-1], x.shape[-1] * ranks)
    buffer = t.new((ranks, *x.shape), x.dtype, None, GATHERED)
    parts = t.new((ranks, *x.shape), x.dtype, None, GATHERED)
    out = t.new(shape, x.dtype, None, GATHERED)
    del buffer, parts
    return out


def _cut(ranks: int, t: Tape, saved: Saved, grads: Grads) -> Found:
    grad = first(grads)
    return (t.new(_part(grad.shape, ranks), grad.dtype),)


def _part(shape: Shape, ranks: int) -> Shape:
    return (*shape[:-1], shape[-1] // ranks)


def own_part(t: Tape, x: Tensor, ranks: int) -> Tensor:
    """This rank's part of what all have; its gradient is gathered."""
    node = t.record(partial(_assembled, ranks), (x,))
    return attach(t.new(_part(x.shape, ranks), x.dtype, None, GATHERED), node)


def _assembled(ranks: int, t: Tape, saved: Saved, grads: Grads) -> Found:
    return (_whole(t, first(grads), ranks),)
