"""FSDP2: parameters sharded by rows, gathered layer by layer on a stream of their own, gradients reduced on another.

Units are the decoder's layers (and Mamba's mixers within them) and, as the root, all that is left, as accelerate wraps
them. Source: PyTorch 2.11,
torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py, _fsdp_collectives.py, _fsdp_state.py, _fsdp_param.py. Held
event by event against that code (`memory/exact/sharded.py`).
"""

from collections.abc import Iterable
from typing import Final

from hfvram.errors import HfvramError
from hfvram.memory.mesh import mesh_of
from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training.blocks import HIDDEN, unknown
from hfvram.memory.training.data_parallel import Units, on_stream
from hfvram.memory.training.optimizers import Optimizer
from hfvram.memory.training.states import Blocks, Leaf, States
from hfvram.memory.training.stretch import TEMPLATE, copies
from hfvram.memory.training.tape import GRADIENTS, Saved, Tape
from hfvram.memory.training.tensors import FLOATING, ITEM_BYTES, Storage, Tensor, contiguous
from hfvram.memory.weights import sharded
from hfvram.model.layers import Layer, Mamba1
from hfvram.request import Request

PARAM_GROUP: Final = "PyTorch 2.11: _fully_shard/_fsdp_param_group.py"
COLLECTIVES: Final = "PyTorch 2.11: _fully_shard/_fsdp_collectives.py"
GATHERED = Tag("parameters gathered by FSDP", "workspace", "", PARAM_GROUP)
GATHERING = Tag("all-gather of FSDP", "workspace", "", f"{COLLECTIVES} foreach_all_gather")
WHOLE = Tag("gradients before FSDP's reduce-scatter", "gradients", "", PARAM_GROUP)
REDUCED = Tag("gradients in FSDP's reduce-scatter", "gradients", "", f"{COLLECTIVES} foreach_reduce")

OFFLOAD: Final = "PyTorch 2.11: _fully_shard/_fsdp_api.py CPUOffloadPolicy"
SHARDS = Tag("parameters, one part of n, pinned", "weights", "", OFFLOAD, "exact")
SENT = Tag("gradients, one part of n, pinned", "gradients", "", OFFLOAD, "exact")
STATES = Tag("optimizer states", "optimizer", "", OFFLOAD, "exact")

COPY_IN, REDUCE_SCATTER, ALL_REDUCE = 1, 3, 4
"""Streams, in the order in which `FSDPCommContext` makes them; what is gathered lies in the pool of the first."""
GPUS_A_NODE: Final = 8


def replicas_and_shards(request: Request) -> tuple[int, int]:
    """How often each parameter is held, and in how many parts: `hybrid_shard` shards within a node of eight GPUs and
    replicates over nodes. Ranks that share a sequence hold parts, too (accelerate's `dp_shard_cp`). Raises `usage`.

    >>> [replicas_and_shards(Request(gpus=n, fsdp="hybrid_shard")) for n in (4, 16)]
    [(1, 4), (2, 8)]
    >>> replicas_and_shards(Request(gpus=16, cp=4, fsdp="full_shard"))
    (1, 16)
    """
    found = mesh_of(request)
    held, over = found.model // found.cp, found.data * found.cp
    if request.fsdp != "hybrid_shard":
        return 1, over
    node = max(1, GPUS_A_NODE // held)
    if over > node and over % node:
        raise HfvramError(
            "usage",
            f"--gpus {found.gpus}: --fsdp hybrid_shard shards within nodes of {GPUS_A_NODE}, "
            f"valid are up to {node * held} and its multiples",
        )
    return max(1, over // node), min(over, node)


def within(layer: Layer) -> bool:
    """Whether its mixer is a unit within the layer's, which then holds the norm alone: `MambaBlock` and `MambaMixer`,
    which transformers never splits over devices either."""
    return layer.feed_forward is None and any(isinstance(m, Mamba1) for m in layer.mixers)


class Unit:
    """Parameters that are gathered and reduced together."""

    __slots__ = ("accumulated", "done", "gathered", "leaves", "output", "places", "reduced", "shards", "whole")

    def __init__(self, leaves: list[Leaf], shards: list[Leaf]) -> None:
        self.leaves = leaves
        self.shards = shards
        self.whole = False
        """Whether its gathered parameters stand, as `gathered`."""
        self.gathered: list[int] = []
        self.output: int | None = None
        """An all-gather that is under way."""
        self.places: list[int] = []
        """Where in the order of the forward pass it ran."""
        self.done = False
        """Whether this backward pass has reduced it."""
        self.reduced: Tensor | None = None
        """What is all-reduced between replicas, held to the end of the backward pass."""
        self.accumulated: dict[Leaf, Tensor] = {}
        """Gradients of earlier batches in the dtype of the reduction."""


class Fsdp(Units):
    """`fully_shard` over each layer and over the whole, resharding after forward unless `shard_grad_op` is asked."""

    def __init__(self, t: Tape, states: States, request: Request) -> None:
        super().__init__(t, states)
        _, self.ranks = replicas_and_shards(request)
        self.hybrid = request.fsdp == "hybrid_shard"
        self.reshards = request.fsdp != "shard_grad_op"
        self.away = "params" in request.offload
        """`CPUOffloadPolicy`: shards, gradients and the optimizer are the CPU's."""
        self.low = None if request.mixed_precision == "no" else request.mixed_precision
        self.wide = "fp32" if self.low else None
        """The dtype that gradients are reduced in, where it is not their own."""
        self.cast: dict[Leaf, bool] = {}
        self.root = self._unit(list(states.every([*states.before, *states.after, *states.head])))
        self.units: dict[int, Unit] = {}
        for blocks, (layer, _) in zip(states.layers, states.written, strict=True):
            inner = [part for part in blocks.mixers if within(layer)]
            apart = {id(leaf) for part in inner for leaf in part}
            self.units[id(blocks)] = self._unit(list(states.every([x for x in blocks if id(x) not in apart])))
            self.units |= {id(part): self._unit(list(states.every(part))) for part in inner}
        shards = {leaf: shard for u in self._all() for leaf, shard in zip(u.leaves, u.shards, strict=True)}
        self.leaves = [shards[leaf] for leaf in states.trained()]
        self.order: list[Unit] = []
        self.held: int | None = None
        """The output of the last all-gather of the forward pass, freed once the next one's has been copied."""
        self.input: int | None = None
        """The input of the last reduce-scatter, freed before the next one's is made."""
        t.gradients = WHOLE

    def _all(self) -> list[Unit]:
        return [self.root, *self.units.values()]

    def _unit(self, leaves: list[Leaf]) -> Unit:
        shards = []
        for leaf in leaves:
            dtype = leaf.tensor.dtype
            shards.append(Leaf(sharded(leaf.param, self.ranks), dtype, leaf.node is not None, leaf.segment))
            self.cast[leaf] = self.low is not None and self.low != dtype
            if self.low:
                leaf.tensor.dtype = self.low
                if leaf.node:
                    leaf.node.dtype = self.low
        if len({x.tensor.dtype for x in shards if x.node}) > 1:
            raise unknown("--fsdp over trained parameters of several dtypes")
        return Unit(leaves, shards)

    # -- the forward pass --------------------------------------------------------------------------------------------

    def enter_model(self) -> None:
        self._unshard(self.root)
        self._wait(self.root, forward=True)

    def enter(self, blocks: Blocks, hidden: Tensor) -> Tensor:
        return self._entered(self.units[id(blocks)], hidden)

    def enter_part(self, leaves: list[Leaf], hidden: Tensor) -> Tensor:
        unit = self.units.get(id(leaves))
        return hidden if unit is None else self._entered(unit, hidden)

    def _entered(self, unit: Unit, hidden: Tensor) -> Tensor:
        if self.low and hidden.dtype in FLOATING:  # `cast_forward_inputs`: of a residual stream in fp32
            hidden = op.to(self.tape, hidden, self.low, HIDDEN)
        if self.tape.redone is not None:  # what is computed again finds its parameters gathered
            return hidden
        self._unshard(unit)
        self._wait(unit, forward=True)
        unit.done = False

        def after(t: Tape, saved: Saved, grads: list[Tensor | None]) -> list[Tensor | None]:
            self._reduce(unit)
            return [grads.pop()]

        node = self.tape.record(after, [hidden])
        if node is None:
            return hidden
        return Tensor(hidden.storage, hidden.shape, hidden.strides, hidden.dtype, node)

    def leave(self, blocks: Blocks, hidden: Tensor) -> Tensor:
        if self.tape.redone is None:
            self._left(self.units[id(blocks)], [hidden])
        return hidden

    def leave_part(self, leaves: list[Leaf], hidden: Tensor) -> Tensor:
        if self.tape.redone is None and id(leaves) in self.units:
            self._left(self.units[id(leaves)], [hidden])
        return hidden

    def leave_model(self, outputs: Iterable[Tensor]) -> None:
        self._left(self.root, outputs)
        self.root.done = False
        self._free(self.held)
        self.held = None

    def _left(self, unit: Unit, outputs: Iterable[Tensor]) -> None:
        if self.reshards:
            self._reshard(unit)
        unit.places.append(len(self.order))
        self.order.append(unit)
        for x in outputs:
            if x.node is not None:
                x.node.before = lambda: self._before_backward(unit)

    def _unshard(self, unit: Unit) -> None:
        """Start the all-gather: the input where it must be cast, and the whole."""
        if unit.whole or unit.output is not None:
            return
        flat = [self.low or leaf.tensor.dtype for leaf in unit.leaves if self.cast[leaf]]
        total = sum(self._gathered_bytes(leaf) for leaf in unit.leaves)
        own = sum(self._gathered_bytes(leaf) for leaf in unit.leaves if self.cast[leaf]) // self.ranks
        if self.away:
            copied = [self._from_cpu(leaf, shard) for leaf, shard in zip(unit.leaves, unit.shards, strict=True)]
        else:
            copied = [self._alloc(own, GATHERING, COPY_IN)] if flat else []
        unit.output = self._alloc(total, GATHERING, COPY_IN)
        self.tape.timeline.free(*copied)

    def _from_cpu(self, leaf: Leaf, shard: Leaf) -> int:
        """A shard on the GPU, cast where it must be."""
        copied = self._alloc(shard.tensor.nbytes, GATHERING, COPY_IN)
        if not self.cast[leaf]:
            return copied
        cast = self._alloc(self._gathered_bytes(leaf) // self.ranks, GATHERING, COPY_IN)
        self._free(copied)
        return cast

    def _wait(self, unit: Unit, forward: bool) -> None:
        """Its parameters are copied out of the all-gather."""
        if unit.output is None:
            return
        unit.gathered = [self._alloc(self._gathered_bytes(leaf), GATHERED) for leaf in unit.leaves]
        unit.whole = True
        if forward:
            self._free(self.held)
            self.held = unit.output
        else:
            self._free(unit.output)
        unit.output = None

    def _reshard(self, unit: Unit) -> None:
        self.tape.timeline.free(*unit.gathered)
        unit.gathered, unit.whole = [], False

    def _gathered_bytes(self, leaf: Leaf) -> int:
        """Of a parameter with its padding."""
        numel = sharded(leaf.param, self.ranks).numel * self.ranks
        return numel * ITEM_BYTES[leaf.tensor.dtype]

    # -- the backward pass -------------------------------------------------------------------------------------------

    def _before_backward(self, unit: Unit) -> None:
        """Gather it again, and begin with the one before it."""
        self._unshard(unit)
        self._wait(unit, forward=False)
        if unit.places and (place := unit.places.pop()) > 0:
            self._unshard(self.order[place - 1])

    def _reduce(self, unit: Unit) -> None:
        """Its gradients are there: reshard, and reduce them unless more are to come."""
        unit.done = True
        for leaf in unit.accumulated:
            leaf.node.grad = None  # type: ignore[union-attr]
        if not self.last:
            self._reshard(unit)
            for leaf in unit.leaves:
                grad = leaf.node.grad if leaf.node else None
                if self.wide and leaf.node and grad is not None and grad.dtype != self.wide:
                    size = grad.numel * ITEM_BYTES[self.wide]
                    unit.accumulated[leaf] = self._tensor(grad, self.wide, self._alloc(size, WHOLE))
                    leaf.node.grad = None
                del grad
            return
        pairs = zip(unit.leaves, unit.shards, strict=True)
        found = [(x, shard) for x, shard in pairs if x.node and (x in unit.accumulated or x.node.grad is not None)]
        self._reshard(unit)
        self._free(self.input)
        self.input = None
        if not found:
            return
        own = found[0][1].tensor.dtype
        dtype = self.wide or found[0][0].tensor.dtype
        numel = sum(shard.tensor.numel for _, shard in found)
        self.input = self._alloc(numel * self.ranks * ITEM_BYTES[dtype], REDUCED)
        grad = None  # the last one is a loop's variable there, and stays to the end
        for leaf, _ in found:
            grad = unit.accumulated.pop(leaf, None) or leaf.node.grad  # type: ignore[union-attr]
            leaf.node.grad = None  # type: ignore[union-attr]
        if self.ranks == 1:
            grad = None
        tag = GRADIENTS if dtype == own else REDUCED
        output = self._flat(numel, dtype, tag, REDUCE_SCATTER)
        if self.hybrid:
            unit.reduced = output
        if dtype != own:
            output = self._flat(numel, own, GRADIENTS, ALL_REDUCE if self.hybrid else REDUCE_SCATTER)
        for _, shard in [] if self.away else found:
            x = shard.tensor
            shard.node.grad = Tensor(output.storage, x.shape, x.strides, own)  # type: ignore[union-attr]
        del output, grad

    def end_backward(self) -> None:
        for unit in self._all():
            if not unit.done:
                self._reduce(unit)
            unit.reduced = None
            unit.places.clear()
        self.order.clear()
        self._free(self.input)
        self.input = None

    def clip(self, tensors: int) -> None:
        if not self.away:
            super().clip(tensors)

    def step(self, optimizer: Optimizer) -> None:
        if not self.away:
            super().step(optimizer)

    def count(self, optimizer: Optimizer, groups: int) -> None:
        super().count(optimizer, groups)
        if not self.away:
            return
        t = self.tape.timeline
        for leaf in (x for unit in self._all() for x in unit.shards):
            times = copies(groups) if leaf.segment == TEMPLATE else 1
            t.elsewhere.append(("cpu", SHARDS, times * leaf.tensor.nbytes))
            if leaf.node:
                states = times * optimizer.state_bytes([leaf])
                t.optimizer_bytes += states
                t.elsewhere += [("cpu", SENT, times * leaf.tensor.nbytes), ("cpu", STATES, states)]

    # -- memory ------------------------------------------------------------------------------------------------------

    def _alloc(self, nbytes: int, tag: Tag, stream: int = 0) -> int:
        return on_stream(self.tape.timeline, stream, self.tape.timeline.alloc(nbytes, tag))

    def _free(self, handle: int | None) -> None:
        if handle is not None:
            self.tape.timeline.free(handle)

    def _flat(self, numel: int, dtype: str, tag: Tag, stream: int) -> Tensor:
        storage = Storage(self.tape.timeline.events, self._alloc(numel * ITEM_BYTES[dtype], tag, stream))
        return Tensor(storage, (numel,), (1,), dtype)

    def _tensor(self, like: Tensor, dtype: str, handle: int) -> Tensor:
        return Tensor(Storage(self.tape.timeline.events, handle), like.shape, contiguous(like.shape), dtype)
