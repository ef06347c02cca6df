"""Gradient clipping and optimizer steps: what each parameter has beside its gradient, and for how long.

Source: PyTorch 2.11, torch/nn/utils/clip_grad.py, torch/optim/adamw.py, native/cuda/FusedAdamWKernel.cu.
"""

from collections.abc import Callable, Iterator
from typing import Final

from hfvram.memory.timeline import Tag
from hfvram.memory.training.blocks import unknown
from hfvram.memory.training.states import Leaf
from hfvram.memory.training.tape import Tape
from hfvram.memory.training.tensors import ITEM_BYTES, Tensor
from hfvram.model.layers import Param

CLIP = Tag("gradient clipping", "activations", "4", "PyTorch 2.11: torch/nn/utils/clip_grad.py")
ADAMW = "PyTorch 2.11: torch/optim/adamw.py"
FIRST = Tag("optimizer states: exp_avg", "optimizer", "P·e", ADAMW, "exact")
SECOND = Tag("optimizer states: exp_avg_sq", "optimizer", "P·e", ADAMW, "exact")
COUNT = Tag("optimizer states: step", "optimizer", "4", ADAMW, "exact")

Kept = dict[Leaf, list[Tensor]]


def in_layers(t: Tape, leaves: list[Leaf]) -> Iterator[Leaf]:
    """The leaves in order, what is allocated meanwhile belonging to the layer of each."""
    t.enter(None)
    for leaf in leaves:
        if leaf.segment != t.segment:
            t.enter(leaf.segment)
        yield leaf
    t.enter(None)


def each(t: Tape, leaves: list[Leaf], make: Callable[[Leaf], Tensor]) -> dict[Leaf, Tensor]:
    """One tensor for each leaf."""
    return {leaf: make(leaf) for leaf in in_layers(t, leaves)}


def forget(t: Tape, made: dict[Leaf, Tensor]) -> None:
    """Let go of them in order."""
    for leaf in in_layers(t, list(made)):
        del made[leaf]


def clip(t: Tape, leaves: list[Leaf], tensors: int) -> None:
    """`clip_grad_norm_`: a norm of each gradient, in its dtype and in fp32, and the norm of those, which are as
    many as the model has `tensors`."""
    norms = each(t, leaves, lambda x: t.new((), x.node.dtype, None, CLIP))  # type: ignore[union-attr]
    wide = each(t, leaves, lambda x: t.new((), "fp32", None, CLIP)) if any(_half(x) for x in leaves) else {}
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


class Optimizer:
    """An optimizer and the states that it made in its first step."""

    def __init__(self, name: str) -> None:
        if name not in STEPS:
            raise unknown(f"--optimizer {name}")
        self.name = name
        self.kept: Kept = {}

    def step(self, t: Tape, leaves: list[Leaf]) -> None:
        """Update every leaf."""
        STEPS[self.name](t, leaves, self.kept)


def _adamw_fused(t: Tape, leaves: list[Leaf], kept: Kept) -> None:
    for leaf in in_layers(t, leaves):
        if leaf not in kept:
            shape, dtype = leaf.tensor.shape, leaf.tensor.dtype
            count = t.new((), "fp32", None, COUNT)
            kept[leaf] = [count, t.new(shape, dtype, None, FIRST), t.new(shape, dtype, None, SECOND)]


STEPS: Final[dict[str, Callable[[Tape, list[Leaf], Kept], None]]] = {"adamw_torch_fused": _adamw_fused}


def state_bytes(name: str, param: Param, dtype: str) -> tuple[int, int]:
    """What an optimizer keeps of a parameter in raw sizes: on the device, and in managed memory."""
    return 2 * param.numel * ITEM_BYTES[dtype] + 4, 0
