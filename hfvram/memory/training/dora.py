"""Adapters that are more than two products beside a linear layer: DoRA's magnitudes, and LoRA around an embedding.

Source: PEFT 0.21, tuners/lora/dora.py `DoraLinearLayer.forward`, tuners/lora/variants.py, tuners/lora/layer.py
`Embedding.forward`.
"""

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training.tape import Tape
from hfvram.memory.training.tensors import Storage, Tensor

PEFT = "PEFT 0.21: tuners/lora/dora.py DoraLinearLayer.forward"
UNIT = Tag("DoRA, unit matrix", "activations", "h·h·4", PEFT)
MERGED = Tag("DoRA, weights with what the adapter adds", "activations", "h·h·4", PEFT)
MAGNITUDE = Tag("DoRA, magnitudes", "activations", "h·4", PEFT)
SCALED = Tag("DoRA, scaled output", "activations", "b·s·h·4", PEFT)
LOOKED_UP = Tag("LoRA, of an embedding", "activations", "b·s·h·4", "PEFT 0.21: tuners/lora/layer.py Embedding.forward")


Parts = tuple[Tensor, Tensor, Tensor]
"""A, B and the magnitudes."""


def dora(t: Tape, x: Tensor, result: Tensor, weight: Tensor, parts: Parts, bias: Tensor | None, p: float) -> Tensor:
    """The layer's result and (m/‖W + s·BA‖ - 1)·base + m/‖W + s·BA‖·B(A(x))·s: the base is the result without its bias,
    or with dropout computed anew."""
    x = op.dropout(t, x, p, UNIT)
    return op.add(t, result, _more(t, x, None if p else result, weight, parts, bias), SCALED)


def _more(t: Tape, x: Tensor, base: Tensor | None, weight: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """What is added. The product BA comes of a unit matrix; its norm is a constant of the step."""
    a, b, magnitude = parts
    inputs = a.shape[1]
    unit = t.new((inputs, inputs), a.dtype, None, UNIT)
    product = op.transpose(t, op.linear(t, op.linear(t, unit, a, None, MERGED), b, None, MERGED), 0, 1)
    del unit
    product = op.to(t, product, x.dtype, MERGED)
    weight = op.to(t, weight, x.dtype, MERGED)
    norm = _norm(t, weight, product)
    ratio = op.reshape(t, op.mul(t, magnitude, norm, MAGNITUDE), 1, -1)
    low = op.linear(t, op.linear(t, x, a, None, SCALED), b, None, SCALED)
    if base is None:
        base = op.linear(t, x, weight, None, SCALED)
    elif bias is not None:
        base = op.subtract(t, base, bias, SCALED)
    scaled = op.mul(t, op.shift(t, ratio, MAGNITUDE), base, SCALED)
    return op.add(t, scaled, op.scale(t, op.mul(t, ratio, low, SCALED), SCALED), SCALED)


def _norm(t: Tape, weight: Tensor, product: Tensor) -> Tensor:
    """‖W + s·BA‖ of each row, without gradients."""
    scaled = t.elementwise(product, tag=MERGED)
    merged = t.elementwise(weight, scaled, tag=MERGED)
    del scaled
    return t.new((merged.shape[0],), merged.dtype, None, MAGNITUDE)


def look_up(t: Tape, ids: Tensor, place: list[Tensor], a: Tensor, b: Tensor, scales: str | None) -> Tensor:
    """Rows of Aᵀ times Bᵀ, scaled; once more, by a buffer of dtype `scales`, where the embedding scales its
    output. Added to what is taken out of `place`."""
    table, turned = op.transpose(t, a, 0, 1), op.transpose(t, b, 0, 1)
    rows = op.embedding(t, ids, table, LOOKED_UP)
    flat = op.reshape(t, rows, -1, rows.shape[-1])
    out = op.scale(t, op.reshape(t, op.product(t, flat, turned, LOOKED_UP), *ids.shape, -1), LOOKED_UP)
    del flat
    if scales is not None:
        own = scales == out.dtype
        number = Tensor(Storage(), (), (), scales) if own else t.new((), out.dtype, None, LOOKED_UP)
        out = op.mul(t, out, number, LOOKED_UP)
        del number
    dtype = place[0].dtype
    result = op.add(t, place[0], out, LOOKED_UP)
    place.clear()
    return op.to(t, result, dtype, LOOKED_UP)
