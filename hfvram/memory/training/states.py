"""A model's parameters as a training run holds them: leaves of the graph, taken by layers in the order of their code,
and gone through by clipping and optimizers in the order of `model.parameters()`."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from itertools import islice
from typing import Final

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training.blocks import unknown
from hfvram.memory.training.collectives import product
from hfvram.memory.training.dora import dora
from hfvram.memory.training.kinds import WITH_TOWERS, NormOrder, kind_of
from hfvram.memory.training.packed import Packed
from hfvram.memory.training.packed import product as packed_product
from hfvram.memory.training.tape import Parameter, Tape
from hfvram.memory.training.tensors import Storage, Tensor, contiguous
from hfvram.model.architecture import Architecture, Stack
from hfvram.model.layers import Layer, Param, Split

PEFT = "PEFT 0.21: tuners/lora/layer.py Linear.forward"
LORA_IN = Tag("LoRA, inputs in the adapter's dtype", "activations", "", PEFT)
LORA_INNER = Tag("LoRA, inner product", "activations", "", PEFT)
LORA_OUT = Tag("LoRA, output", "activations", "", PEFT)


class Leaf:
    """A parameter: what it is, its tensor, and the repeated layer that it belongs to, if any."""

    __slots__ = ("inner", "lora", "node", "original", "packed", "param", "segment", "tensor")

    def __init__(self, param: Param, dtype: str, trained: bool, segment: int | None) -> None:
        self.param = param
        self.inner = param.kind in ("linear", "linear_subclass") and len(param.shape) == 2
        """A linear layer's weight, the head's left out: what low-rank optimizers and Muon treat."""
        self.segment = segment
        self.node = Parameter(param.shape, dtype) if trained else None
        self.tensor = Tensor(Storage(), param.shape, contiguous(param.shape), dtype, self.node)
        self.packed: Packed | None = None
        self.lora: Lora | None = None
        """The adapter around the layer of this weight."""
        self.original = self.tensor
        """What is tied to it."""

    def with_adapter(self) -> "Iterator[Leaf]":
        """Itself, and what PEFT puts beside it."""
        yield self
        if self.lora is not None:
            yield from self.lora.leaves


class Lora:
    """LoRA around a layer: A (r, inputs), B (outputs, r), DoRA's magnitudes (outputs), and their dropout; or around a
    parameter (`wrapped.py`), of so many experts."""

    __slots__ = ("dropout", "experts", "leaves", "scales")

    def __init__(self, leaves: "tuple[Leaf, ...]", dropout: float, experts: int = 1, scales: bool = True) -> None:
        self.leaves = leaves
        self.dropout = dropout
        self.experts = experts
        self.scales = scales
        """Whether α÷r is not 1."""


def project(
    t: Tape, x: Tensor, leaf: Leaf, bias: Tensor | None = None, tag: Tag | None = None, transposed: bool = False
) -> Tensor:
    """A linear layer over x, and the adapter that PEFT puts around it.

    result + B(A(dropout(x)))·scaling, or what DoRA adds, in the adapter's dtype and back. Source: PEFT 0.21,
    tuners/lora/layer.py `Linear.forward`.
    """
    result = _base(t, x, leaf, bias, tag, transposed)
    if leaf.lora is None:
        return result
    dtype, p, (a, b, *magnitude) = result.dtype, leaf.lora.dropout, [part.tensor for part in leaf.lora.leaves]
    x = op.to(t, x, a.dtype, LORA_IN)
    if magnitude:
        weight = op.transpose(t, leaf.tensor, 0, 1) if transposed else leaf.tensor
        result = dora(t, x, result, weight, (a, b, magnitude[0]), bias, p)
    else:
        split = leaf.param.split
        result = op.add(t, result, op.scale(t, _low_rank(t, x, a, b, p, split), LORA_OUT), LORA_OUT)
    return op.to(t, result, dtype, tag)


def _low_rank(t: Tape, x: Tensor, a: Tensor, b: Tensor, p: float, split: Split | None) -> Tensor:
    """B(A(dropout(x))): over tensor parallel ranks A has the rows of a layer of rows, B the columns of one of columns.

    Source: PEFT 0.21, tuners/lora/model.py `add_lora_tp_hooks_dtensor`.
    """
    rows, columns = (split if split and split.how == how else None for how in ("rows", "columns"))
    inner = product(t, op.linear, op.dropout(t, x, p, LORA_IN), a, None, rows, LORA_INNER)
    return product(t, op.linear, inner, b, None, columns, LORA_OUT)


def _base(t: Tape, x: Tensor, leaf: Leaf, bias: Tensor | None, tag: Tag | None, transposed: bool) -> Tensor:
    if leaf.packed is not None:
        return packed_product(t, x, leaf.packed, leaf.tensor, bias, tag)
    run = op.conv1d if transposed and bias is not None else op.linear
    return product(t, run, x, leaf.tensor, bias, leaf.param.split, tag)


class Weights:
    """The leaves of one part of a layer, handed out in order: norms, and all others. A fresh one for each pass."""

    __slots__ = ("norms", "rest", "transposed")

    def __init__(self, leaves: Sequence[Leaf], transposed: bool = False) -> None:
        self.transposed = transposed
        """Linear weights lie as (inputs, outputs): `Conv1D`."""
        self.norms = [leaf.tensor for leaf in reversed(leaves) if leaf.param.kind == "norm"]
        self.rest = [leaf for leaf in reversed(leaves) if leaf.param.kind != "norm"]

    def params(self) -> list[Param]:
        """What is left that is no norm's."""
        return [leaf.param for leaf in self.rest]

    def norm(self, tensors: int = 1) -> tuple[Tensor, ...]:
        """The next norm's weight, or its weight and its bias."""
        return tuple([self.norms.pop() for _ in range(tensors)])

    def take(self) -> Tensor:
        """The next parameter that is no norm's."""
        leaf = self.rest.pop()
        if leaf.lora or leaf.packed:
            raise unknown(f"an adapter or a quantization of {leaf.param.name}, which is no layer of its own,")
        return leaf.tensor

    def bias(self) -> Tensor | None:
        """The next parameter if it is a bias."""
        return self.take() if self.rest and self.rest[-1].param.kind == "bias" else None

    def linear(self, t: Tape, x: Tensor, tag: Tag | None = None) -> Tensor:
        """The next linear layer over x: its weight and, where it has one, its bias."""
        kinds = [leaf.param.kind for leaf in self.rest[-2:]]
        if not kinds or kinds[-1] not in ("linear", "linear_subclass", "head"):
            raise unknown("a layer whose parameters stand in another order than its code takes them")
        leaf = self.rest.pop()
        bias = self.take() if kinds[0] == "bias" else None
        shape, split = leaf.tensor.shape, leaf.param.split
        width = x.shape[-1] // (split.ranks if split and split.how == "rows of parts" else 1)
        turned = bias is not None and self.transposed and shape == (width, bias.shape[0])
        if shape[0 if turned else 1] != width:
            raise unknown("a layer whose parameters stand in another order than its code takes them")
        return project(t, x, leaf, bias, tag, turned)


OTHERWISE: Final[dict[NormOrder, tuple[str, ...]]] = {
    "after the feed-forward": ("feed-forward", "norms", "mixers"),
    "before the feed-forward": ("norms", "feed-forward", "mixers"),
}
"""Where the feed-forward stands before the mixer."""


class Blocks:
    """The leaves of one layer, by its parts."""

    __slots__ = ("feed_forward", "mixers", "order", "own")

    def __init__(self, layer: Layer, leaf: Callable[[Param], Leaf], order: NormOrder) -> None:
        self.order = order
        self.mixers = [[leaf(p) for p in m.params if p.kind != "buffer"] for m in layer.mixers]
        feed = layer.feed_forward.params if layer.feed_forward else ()
        self.feed_forward = [leaf(p) for p in feed if p.kind != "buffer"]
        self.own = [leaf(p) for p in layer.params if p.kind != "buffer"]

    def __iter__(self) -> Iterator[Leaf]:
        if self.order in OTHERWISE:
            parts = {"norms": [self.own], "feed-forward": [self.feed_forward], "mixers": self.mixers}
            for part in OTHERWISE[self.order]:
                for leaves in parts[part]:
                    yield from leaves
            return
        norms = iter(self.own)
        first = {"first": len(self.own), "between": len(self.own) // 2}.get(self.order, 0)
        yield from islice(norms, first)
        for mixer in self.mixers:
            yield from mixer
            if self.order == "after each":
                yield from islice(norms, len(self.own) // (len(self.mixers) + 1))
        if self.order not in ("last", "after each"):
            yield from norms
        yield from self.feed_forward
        yield from norms


class States:
    """All leaves of a model of which only some layers are written (`stretch.Written`)."""

    def __init__(
        self,
        architecture: Architecture,
        layers: Sequence[tuple[Layer, int | None]],
        make: "Callable[[Param, Layer | None, int | None], Leaf]",
        head: Sequence[Param] = (),
        stack: Stack | None = None,
        encoder: "States | None" = None,
    ) -> None:
        text, kind = stack or architecture.text, kind_of(architecture)
        self.written = list(layers)
        self.encoder = encoder
        """The leaves of the tower that runs, and is built, before this one."""
        order, self.head_first, self.final_first = kind.norms, kind.head_first, kind.final_first

        def several(params: Sequence[Param]) -> list[Leaf]:
            return [make(p, None, None) for p in params if p.kind != "buffer"]

        def blocks(layer: Layer, segment: int | None) -> Blocks:
            return Blocks(layer, lambda p: make(p, layer, segment), order)

        self.before = several(text.before)
        self.layers = [blocks(x, segment) for x, segment in layers]
        self.after = several(text.after)
        self.head = several((*architecture.head, *head)) if text.name == architecture.main else []

    def part(self, start: int, end: int, first: bool, last: bool) -> "States":
        """The same leaves, of some layers: one chunk of a pipeline's stage."""
        found = copy(self)
        found.layers, found.written = self.layers[start:end], self.written[start:end]
        tied = last and not self.head
        found.before = self.before if first or tied else []
        found.after, found.head = (self.after, self.head) if last else ([], [])
        return found

    def __iter__(self) -> Iterator[Leaf]:
        if self.head_first:
            yield from self.head
        if self.encoder is not None:
            yield from self.encoder
        yield from self.before
        if self.final_first:
            yield from self.after
        for layer in self.layers:
            yield from layer
        if not self.final_first:
            yield from self.after
        if not self.head_first:
            yield from self.head

    def every(self, leaves: "Iterable[Leaf] | None" = None) -> Iterator[Leaf]:
        """All leaves, or these, with their adapters: after a layer's bias, and after all experts of a module."""
        after: list[Leaf] = []
        before = ""
        for leaf in self if leaves is None else leaves:
            own, *adapters = leaf.with_adapter()
            kind = own.param.kind
            if kind != "bias" and not (kind == before == "experts"):
                yield from after
                after = []
            yield own
            after += adapters
            before = kind
        yield from after

    def trained(self) -> list[Leaf]:
        """The leaves that need gradients, as `model.parameters()` has them."""
        return [part for leaf in self for part in leaf.with_adapter() if part.node is not None]


def towers(architecture: Architecture) -> list[Stack]:
    """The stacks that no text reaches."""
    if architecture.model_type not in WITH_TOWERS or architecture.text_type is None:
        return []
    return [stack for stack in architecture.stacks if stack.name != architecture.main]


def single_stack(architecture: Architecture) -> Stack:
    """The model's only stack that works: others are towers that no text reaches. Raises `usage` where it has several
    or runs layers again."""
    if len(architecture.stacks) - len(towers(architecture)) != 1 or architecture.text.repeated:
        raise unknown(architecture.class_name)
    return architecture.text
