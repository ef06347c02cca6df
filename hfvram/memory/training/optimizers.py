"""Optimizers: the states that each keeps of a parameter, and what its step makes beside them and for how long.

Each function is a step's code without the numbers. Source: PyTorch 2.11, torch/optim/*.py and native/cuda/
FusedAdamWKernel.cu; transformers 5.17, optimization.py `Adafactor`; bitsandbytes 0.49, optim/optimizer.py; galore_torch
1.0; apollo_torch 1.0. Held against those (`memory/exact/optimizers.py`) event by event.
"""

from collections.abc import Callable, Iterator
from typing import Final

from hfvram.memory import bitsandbytes
from hfvram.memory.bitsandbytes import PAGED_STATE, SMALL_STATE, STATE_BLOCK
from hfvram.memory.timeline import Standing, Tag, Timeline
from hfvram.memory.training.blocks import unknown
from hfvram.memory.training.states import Leaf
from hfvram.memory.training.tape import Tape
from hfvram.memory.training.tensors import ITEM_BYTES, Shape, Tensor

ADAMW: Final = "PyTorch 2.11: torch/optim/adamw.py"
BNB: Final = "bitsandbytes 0.49: optim/optimizer.py init_state"
FIRST = Tag("optimizer states: first moment", "optimizer", "P·e", ADAMW, "exact")
SECOND = Tag("optimizer states: second moment", "optimizer", "P·e", ADAMW, "exact")
COUNT = Tag("optimizer states: step", "optimizer", "4", ADAMW, "exact")
SUMS = Tag("optimizer states: sum of squares", "optimizer", "P·e", "PyTorch 2.11: torch/optim/adagrad.py", "exact")
ROWS = Tag("optimizer states: factors", "optimizer", "", "transformers 5.17: optimization.py Adafactor", "exact")
BLOCKWISE = Tag("optimizer states in 8 bits", "optimizer", "P", BNB, "exact")
WIDE = Tag("optimizer states in fp32", "optimizer", "P·4", BNB, "exact")
SCALES = Tag("optimizer states: block scales", "optimizer", "", BNB, "exact")
BASIS = Tag("optimizer states: projection", "optimizer", "", "galore_torch 1.0; apollo_torch 1.0", "derived")
TEMPORARY = Tag("temporaries of the optimizer step", "optimizer", "", ADAMW)


Kept = dict[Leaf, list[Tensor]]
Step = Callable[[Tape, list[Leaf], Kept], None]


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


class Optimizer:
    """An optimizer and the states that it has made so far."""

    def __init__(self, name: str, t: Tape, leaves: list[Leaf]) -> None:
        if name not in STEPS:
            raise unknown(f"--optimizer {name}")
        self.name = name
        self.kept: Kept = {}
        if name == "adagrad":  # made with the optimizer itself
            self.kept = {leaf: [made] for leaf, made in each(t, leaves, lambda x: _state(t, x, SUMS)).items()}

    def step(self, t: Tape, leaves: list[Leaf]) -> None:
        """Update every leaf."""
        STEPS[self.name](t, leaves, self.kept)

    def step_of(self, t: Tape, leaf: Leaf) -> None:
        """Update one leaf alone."""
        kept = {leaf: self.kept[leaf]} if leaf in self.kept else {}
        STEPS[self.name](t, [leaf], kept)
        self.kept |= kept

    def state_bytes(self, leaves: list[Leaf]) -> int:
        """What its states of these leaves come to, without keeping any."""
        t = Tape(Timeline(Standing(())))
        found = Optimizer(self.name, t, leaves)
        found.step(t, leaves)
        return sum(kept_bytes(found.kept, x) + managed_bytes(self.name, x.tensor.numel) for x in leaves)


def _state(t: Tape, leaf: Leaf, tag: Tag) -> Tensor:
    return t.new(leaf.tensor.shape, leaf.tensor.dtype, None, tag)


def _temporary(t: Tape, leaf: Leaf) -> Tensor:
    return _state(t, leaf, TEMPORARY)


def _moments(t: Tape, leaves: list[Leaf], kept: Kept, *tags: Tag) -> None:
    for leaf in in_layers(t, leaves):
        if leaf not in kept:
            kept[leaf] = [t.new((), "fp32", None, tag) if tag is COUNT else _state(t, leaf, tag) for tag in tags]


def _adamw_fused(t: Tape, leaves: list[Leaf], kept: Kept) -> None:
    _moments(t, leaves, kept, COUNT, FIRST, SECOND)


def _adamw_foreach(t: Tape, leaves: list[Leaf], kept: Kept) -> None:
    """All denominators at once: one more copy of the parameters."""
    _moments(t, leaves, kept, FIRST, SECOND)
    forget(t, each(t, leaves, lambda x: _temporary(t, x)))


def _adamw_loop(t: Tape, leaves: list[Leaf], kept: Kept) -> None:
    """One denominator after the other, and its root beside it."""
    _moments(t, leaves, kept, FIRST, SECOND)
    denominator = None
    for leaf in in_layers(t, leaves):
        root = _temporary(t, leaf)
        quotient = _temporary(t, leaf)
        del root
        denominator = quotient
        del quotient
    del denominator


def _sgd(t: Tape, leaves: list[Leaf], kept: Kept) -> None:
    """In place."""


def _sgd_momentum(t: Tape, leaves: list[Leaf], kept: Kept) -> None:
    _moments(t, leaves, kept, FIRST)


def _adagrad(t: Tape, leaves: list[Leaf], kept: Kept) -> None:
    """Roots and scaled gradients of all parameters at once."""
    roots = each(t, leaves, lambda x: _temporary(t, x))
    scaled = each(t, leaves, lambda x: _temporary(t, x))
    forget(t, roots)
    forget(t, scaled)


def _rmsprop(t: Tape, leaves: list[Leaf], kept: Kept) -> None:
    _moments(t, leaves, kept, SECOND)
    forget(t, each(t, leaves, lambda x: _temporary(t, x)))


def _adafactor(t: Tape, leaves: list[Leaf], kept: Kept) -> None:
    """In fp32: the gradient, the weight, its update and their squares; what one parameter made last stays until the
    next one makes its own."""
    grad = weight = update = None
    for leaf in in_layers(t, leaves):
        shape, half = leaf.tensor.shape, leaf.tensor.half
        grad = None
        if half:
            grad = _wide(t, shape)
        if leaf not in kept:
            if len(shape) >= 2:
                factors = [shape[:-1], (*shape[:-2], shape[-1])]
                kept[leaf] = [t.new(factor, "fp32", None, ROWS) for factor in factors]
            else:
                kept[leaf] = [t.new(shape, "fp32", None, ROWS)]
        weight = None
        if half:
            weight = _wide(t, shape)
        norm = _wide(t, ())
        kept[leaf][min(len(shape), 2) :] = [t.new((), "fp32", None, ROWS)]  # the weight's root mean square
        del norm
        squares = _wide(t, shape)
        update = _wide(t, shape)
        del squares
        if len(shape) >= 2:
            rows, columns = shape[:-1], (*shape[:-2], shape[-1])
            for factor in (rows, columns):
                mean = _wide(t, factor)
                del mean
            total = _wide(t, (*shape[:-2], 1) if len(shape) > 2 else ())
            row = _wide(t, rows)
            del total
            column = _wide(t, columns)
            update = _wide(t, shape)
            del row, column
        else:
            update = _wide(t, shape)
        norm = _wide(t, ())
        mean = _wide(t, ())
        del norm
        limit = _wide(t, ())
        del mean, limit
        negative = _wide(t, shape)
        del negative
    del grad, weight, update


def _wide(t: Tape, shape: Shape) -> Tensor:
    return t.new(shape, "fp32", None, TEMPORARY)


def _bitsandbytes(states: int, bits: int = 8, paged: bool = False) -> Step:
    """A byte for a state of a value and a scale for each 256; small tensors in fp32; large paged ones are elsewhere."""

    def step(t: Tape, leaves: list[Leaf], kept: Kept) -> None:
        if kept:
            return
        maps = [t.new((STATE_BLOCK,), "fp32", None, SCALES) for _ in range(2)] if bits == 8 else []
        for leaf in in_layers(t, leaves):
            n, shape = leaf.tensor.numel, leaf.tensor.shape
            quantized = bits == 8 and n >= SMALL_STATE
            own = [] if paged and n >= PAGED_STATE else [("uint8", BLOCKWISE) if quantized else ("fp32", WIDE)] * states
            made = [t.new(shape, dtype, None, tag) for dtype, tag in own]
            made += [t.new((-(-n // STATE_BLOCK),), "fp32", None, SCALES) for _ in range(states if quantized else 0)]
            kept[leaf] = made
        if leaves:
            kept[leaves[0]] += maps

    return step


def _low_rank(rank: int, svd: bool) -> Step:
    """GaLore and APOLLO: states of gradients that are projected along their shorter side, AdamW for the rest."""

    def step(t: Tape, leaves: list[Leaf], kept: Kept) -> None:
        for leaf in in_layers(t, leaves):
            if leaf.inner:
                _projected(t, leaf, kept, rank, svd)
        _adamw_loop(t, [leaf for leaf in leaves if not leaf.inner], kept)

    return step


def _projected(t: Tape, leaf: Leaf, kept: Kept, rank: int, svd: bool) -> None:
    (rows, columns), dtype = leaf.tensor.shape, leaf.tensor.dtype
    right, rank = rows >= columns, min(rank, rows, columns)
    small = (rows, rank) if right else (rank, columns)
    if leaf not in kept:
        if svd:
            wide = _wide(t, (rows, columns)) if leaf.tensor.half else None
            short = min(rows, columns)
            parts = [_wide(t, size) for size in ((rows, short), (short,), (short, columns))]
            del wide
        basis = t.new((rank, columns) if right else (rows, rank), dtype, None, BASIS)
        if svd:
            del parts
        kept[leaf] = [basis]
    t.multiplies()
    low = t.new(small, dtype, None, TEMPORARY)
    if len(kept[leaf]) == 1:
        kept[leaf] += [t.new(small, dtype, None, FIRST), t.new(small, dtype, None, SECOND)]
    root = t.new(small, dtype, None, TEMPORARY)
    update = t.new(small, dtype, None, TEMPORARY)
    del root
    if svd:
        full = t.new((rows, columns), dtype, None, TEMPORARY)
        scaled = t.new((rows, columns), dtype, None, TEMPORARY)
        del low, update, full, scaled
        return
    norms = [t.new((rows if right else columns,), dtype, None, TEMPORARY) for _ in range(2)]
    shifted = t.new(norms[0].shape, dtype, None, TEMPORARY)
    norms.pop()
    scale = t.new(shifted.shape, dtype, None, TEMPORARY)
    del norms, shifted
    scaled = t.new((rows, columns), dtype, None, TEMPORARY)
    del low, update, scale, scaled


def _muon(t: Tape, leaves: list[Leaf], kept: Kept) -> None:
    """A momentum for linear layers, orthogonalized in bf16 by five Newton-Schulz steps; fused AdamW for the rest."""
    inner = [leaf for leaf in leaves if leaf.inner]
    _moments(t, inner, kept, FIRST)
    last = None
    for leaf in in_layers(t, inner):
        shape = leaf.tensor.shape
        direction = _temporary(t, leaf)
        last = None
        ortho = direction if leaf.tensor.dtype == "bf16" else t.new(shape, "bf16", None, TEMPORARY)
        norm = t.new((), "bf16", None, TEMPORARY)
        clamped = t.new((), "bf16", None, TEMPORARY)
        del norm, clamped
        short = min(shape)
        gram = update = None
        for _ in range(5):
            t.multiplies()
            gram = t.new((short, short), "bf16", None, TEMPORARY)
            update = t.new((short, short), "bf16", None, TEMPORARY)
            ortho = t.new(shape, "bf16", None, TEMPORARY)
        last = ortho
        del gram, update, direction, ortho
    del last
    _adamw_fused(t, [leaf for leaf in leaves if not leaf.inner], kept)


STEPS: Final[dict[str, Step]] = {
    "adamw_torch_fused": _adamw_fused,
    "adamw_torch": _adamw_foreach,
    "adamw_torch_loop": _adamw_loop,
    "sgd": _sgd,
    "sgd_momentum": _sgd_momentum,
    "adagrad": _adagrad,
    "rmsprop": _rmsprop,
    "adafactor": _adafactor,
    **{name: _bitsandbytes(*made) for name, made in bitsandbytes.OPTIMIZERS.items()},
    "galore_adamw": _low_rank(128, svd=True),
    "apollo_adamw": _low_rank(256, svd=False),
    "muon": _muon,
}
"""transformers' names, as in `answer.supported`."""


def managed_bytes(name: str, numel: int) -> int:
    """What a paged optimizer keeps of one parameter in managed memory, which PyTorch's allocator does not serve."""
    if not name.startswith("paged_") or numel < PAGED_STATE:
        return 0
    states = 3 if "ademamix" in name else 1 if "lion" in name else 2
    return states * numel * (1 if name.endswith("8bit") else 4)


def kept_bytes(kept: Kept, leaf: Leaf) -> int:
    """What is kept of one leaf, in raw sizes."""
    return sum(x.numel * ITEM_BYTES[x.dtype] for x in kept.get(leaf, ()))
