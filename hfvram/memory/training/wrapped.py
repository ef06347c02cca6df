"""Adapters around a parameter that is no layer's: each time its module runs, PEFT's `ParamWrapper` adds their product
to it, and the module computes with the sum, which is a tensor of its own.

Source: PEFT 0.21, tuners/lora/layer.py `ParamWrapper`; PyTorch 2.11, nn/utils/parametrize.py, which runs a
parametrization once as it is registered, to look at what comes out; native/cuda/Blas.cpp.
"""

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training.blocks import unknown
from hfvram.memory.training.operators import Found, Grads
from hfvram.memory.training.states import Leaf
from hfvram.memory.training.tape import Saved, Tape
from hfvram.memory.training.tensors import Tensor

WRAPPER = "PEFT 0.21: tuners/lora/layer.py ParamWrapper"
FACTORS = Tag("LoRA, adapters in the parameter's dtype", "activations", "E·r·(h + f)·e", WRAPPER)
DELTA = Tag("LoRA, product of A and B", "activations", "", WRAPPER)
SUM = Tag("parameters with their adapters' product", "activations", "E·h·f·e", WRAPPER)


class Wrapped:
    """A parameter while its module runs: itself, or with an adapter their sum, made when it is first asked for."""

    __slots__ = ("_found", "_leaf", "_parts")

    def __init__(self, t: Tape, leaf: Leaf) -> None:
        if leaf.packed or (leaf.lora and leaf.param.kind not in ("other", "experts")):
            raise unknown(f"an adapter or a quantization of {leaf.param.name}, whose module is none of PEFT's,")
        self._leaf = leaf
        self._found: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()
        if leaf.lora is not None:
            self._parts = _factors(t, leaf) if leaf.lora.experts > 1 else (_delta(t, leaf),)
            self._sum(t)

    def weight(self, t: Tape) -> Tensor:
        """What the module computes with."""
        if self._leaf.lora is None:
            return self._leaf.tensor
        if self._found is None:
            self._found = self._sum(t)
        return self._found

    def _sum(self, t: Tape) -> Tensor:
        lora = self._leaf.lora
        assert lora is not None
        if lora.experts == 1:
            return op.add(t, self._leaf.tensor, self._parts[0], SUM)
        autocast, t.autocast = t.autocast, None
        a, b = self._parts
        if not t.on_meta:
            t.moment(a.nbytes)  # its elements stand side by side in no dimension of a matrix: cuBLAS is given a copy
        out = op.scaled_product(t, self._leaf.tensor, a, b, SUM, lora.scales)
        t.autocast = autocast
        return out


def _factors(t: Tape, leaf: Leaf) -> tuple[Tensor, Tensor]:
    """B (E, outputs, r) and A (E, r, inputs) of all experts: `get_delta_factors`."""
    assert leaf.lora is not None
    experts, (a, b) = leaf.lora.experts, [part.tensor for part in leaf.lora.leaves]
    a = op.reshape(t, a, experts, -1, a.shape[-1])
    b = op.permute(t, op.reshape(t, b, b.shape[0], -1, experts), 2, 0, 1)
    dtype = leaf.tensor.dtype
    b = op.to(t, b, dtype, FACTORS)
    return b, op.to(t, a, dtype, FACTORS)


def _delta(t: Tape, leaf: Leaf) -> Tensor:
    """B·A·scaling of a matrix: `get_delta_weight`."""
    assert leaf.lora is not None
    a, b = [part.tensor for part in leaf.lora.leaves]
    product = op.scale(t, _product(t, b, a), DELTA)
    return op.to(t, product, leaf.tensor.dtype, DELTA)


def _product(t: Tape, a: Tensor, b: Tensor) -> Tensor:
    b = op.low(t, b)
    a = op.low(t, a)
    node = t.record(_multiplied, (a, b), a, b)
    t.multiplies()
    return op.attach(t.new((a.shape[0], b.shape[1]), a.dtype, None, DELTA), node)


def _multiplied(t: Tape, saved: Saved, grads: Grads) -> Found:
    grad, (a, b) = op.first(grads), op.there(*saved)
    t.multiplies()
    of_b = t.new(b.shape, grad.dtype)
    return t.new(a.shape, grad.dtype), of_b
