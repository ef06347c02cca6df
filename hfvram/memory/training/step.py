"""Gradient clipping: what the norms of all gradients take.

Source: PyTorch 2.11, torch/nn/utils/clip_grad.py.
"""

from hfvram.memory.timeline import Tag
from hfvram.memory.training.optimizers import each, forget
from hfvram.memory.training.states import Leaf
from hfvram.memory.training.tape import Tape

CLIP = Tag("gradient clipping", "activations", "", "PyTorch 2.11: torch/nn/utils/clip_grad.py")


def clip(t: Tape, leaves: list[Leaf], tensors: int) -> None:
    """`clip_grad_norm_`: a norm of each gradient, in its dtype and in fp32, and the norm of those, which are as
    many as the model has `tensors`."""
    norms = each(t, leaves, lambda x: t.new((), x.node.dtype, None, CLIP))  # type: ignore[union-attr]
    halves = [x for x in leaves if _half(x)]
    wide = each(t, halves, lambda x: t.new((), "fp32", None, CLIP)) if halves else {}
    stacked = t.new((tensors,), "fp32", None, CLIP)
    forget(t, wide)
    total = t.new((), "fp32", None, CLIP)
    del stacked
    shifted = t.new((), "fp32", None, CLIP)
    inverse = t.new((), "fp32", None, CLIP)
    scaled = t.new((), "fp32", None, CLIP)
    del inverse, shifted
    factor = t.new((), "fp32", None, CLIP)
    del scaled
    forget(t, norms)
    del total, factor


def _half(leaf: Leaf) -> bool:
    return leaf.tensor.half
