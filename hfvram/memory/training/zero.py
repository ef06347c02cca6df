"""DeepSpeed's ZeRO: flat partitions with fp32 masters, buckets of gradients, parameters gathered as modules need them.

Buckets have DeepSpeed's own sizes, which hold where a configuration says nothing (accelerate without a file), or those
of `--zero-bucket` (`deepspeed.buckets`). A model trains in one dtype,
without autocast. Two simplifications keep layers alike. Of ZeRO-1 and 2 the GPU leads whose part is reduced first,
while all activations stand, and a full bucket is reduced with the first gradient. Of ZeRO-3 a layer's parameters are
gathered as far as its widest module and the prefetch reach, and whole where they are computed again.

Source: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py, stage3.py, partition_parameters.py,
partitioned_param_coordinator.py, config.py, offload_config.py; runtime/comm/coalesced_collectives.py.
"""

from collections.abc import Iterable, Iterator
from typing import Final

from hfvram.errors import HfvramError
from hfvram.memory.mesh import mesh_of
from hfvram.memory.timeline import Elsewhere, Tag, Timeline
from hfvram.memory.training.data_parallel import Units, on_stream
from hfvram.memory.training.deepspeed import (
    PARAM_BUFFER_ELEMENTS,
    PARAM_BUFFERS,
    REUSE_ELEMENTS,
    SUB_GROUP_ELEMENTS,
    SWAP_BUFFERS,
    buckets,
)
from hfvram.memory.training.optimizers import STEPS, Optimizer, kept_bytes
from hfvram.memory.training.states import Blocks, Leaf, States
from hfvram.memory.training.stretch import TEMPLATE, copies
from hfvram.memory.training.tape import Parameter, Saved, Tape
from hfvram.memory.training.tensors import ITEM_BYTES, Tensor
from hfvram.model.layers import Param
from hfvram.request import Request

STAGE_2: Final = "DeepSpeed 0.19.8: zero/stage_1_and_2.py"
STAGE_3: Final = "DeepSpeed 0.19.8: zero/stage3.py"
COORDINATOR: Final = "DeepSpeed 0.19.8: zero/partitioned_param_coordinator.py, partition_parameters.py"
AHEAD: Final = "a module and 5e7 elements ahead, a layer computed again whole, what comes again within 1e9"
MASTERS = Tag("master weights in fp32, one part of n", "optimizer", "P÷n·4", STAGE_2, "exact")
BUCKET = Tag(
    "DeepSpeed's reduce bucket",
    "workspace",
    "its elements·e",
    f"{STAGE_2} setup_buckets; config.py reduce_bucket_size",
)
REDUCING = Tag(
    "gradients in DeepSpeed's reduction", "workspace", "a full bucket, or all gradients", f"{STAGE_2} allreduce_bucket"
)
PARTITION = Tag("gradients, one part of n", "gradients", "P÷n·e", f"{STAGE_2} copy_grads_in_partition")
WIDE = Tag("gradients of the optimizer step in fp32", "gradients", "P÷n·4", f"{STAGE_2} step")
NORM = Tag(
    "gradient norm in fp64",
    "activations",
    "8 B for each element of the largest gradient",
    f"{STAGE_2} get_grad_norm_direct",
)
GATHERED = Tag("parameters gathered by DeepSpeed", "workspace", AHEAD, COORDINATOR)
PERSISTENT = Tag("small parameters that stay whole", "weights", "", f"{STAGE_3} persistent_parameters")
COPYING = Tag("gradient on its way to CPU memory", "workspace", "the largest parameter's", STAGE_2)
STATES = Tag("optimizer states", "optimizer", "", "torch.optim, DeepSpeedCPUAdam", "exact")
SENT = Tag("gradients in fp32, for the optimizer on CPU", "gradients", "P÷n·4", STAGE_2, "exact")
PARAMETERS = Tag("parameters, one part of n", "weights", "", COORDINATOR, "exact")
PINNED = Tag("pinned buffers for NVMe", "workspace", "", "DeepSpeed 0.19.8: offload_config.py buffer_count", "derived")

ON_CPU: Final = ("adamw_torch_fused", "adamw_torch", "adamw_torch_loop", "adagrad", "lion", "lion_32bit")
"""Optimizers that DeepSpeed has for the CPU (ops/adam, adagrad, lion), which offloading needs."""
OWN: Final = ("galore_adamw", "apollo_adamw", "muon")
"""Optimizers that look at matrices, which a flat partition no longer has."""
ALL_GATHER, REDUCE = 1, 2
"""Streams of ZeRO-3, whose `overlap_comm` is on by default; of ZeRO-1 and 2 it is off."""


def ceil_div(n: int, by: int) -> int:
    """Elements of one part of `by`, the last of which is padded."""
    return -(-n // by)


class Zero(Units):
    """Stages 1 to 3; `--offload optimizer` and `params` move parts to CPU memory, or on to NVMe."""

    def __init__(self, t: Tape, states: States, request: Request, groups: int, hidden: int) -> None:
        super().__init__(t, states)
        if request.optimizer in OWN:
            raise _no_optimizer(request, "--zero", [x for x in STEPS if x not in OWN])
        self.sizes = buckets(request.zero_bucket, hidden)
        self.stage, self.ranks, self.groups = request.zero or 0, mesh_of(request).data, groups
        self.checkpointing, self.accumulates = request.gradient_checkpointing, request.grad_accum > 1
        self.away: Elsewhere | None = _place(request, "optimizer")
        self.params_away: Elsewhere | None = _place(request, "params")
        if self.params_away and not self.away:
            self.away = "cpu"  # DeepSpeed's optimizer works where its masters lie
        if self.away and request.optimizer not in ON_CPU:
            raise _no_optimizer(request, "--zero --offload optimizer", ON_CPU)
        trained = list(self._counted(states.trained()))
        self.item = ITEM_BYTES[trained[0].tensor.dtype]
        self.whole = sum(x.tensor.numel for x in trained)
        self.largest = max(x.tensor.numel for x in trained)
        if self.stage == 3:
            self.part = sum(ceil_div(x.tensor.numel, self.ranks) for x in trained)
        else:
            self.part = ceil_div(self.whole, 2 * self.ranks) * 2  # DeepSpeed aligns to pairs of elements
        self.parameters = sum(ceil_div(x.tensor.numel, self.ranks) for x in self._counted(states.every()))
        self.leaves = [Leaf(Param("partition", (n,)), "fp32", True, None) for n in self._sub_groups()]
        self.begun = False
        """Whether a gradient has come in this backward pass."""
        self.bucket: int | None = None
        self.own: int | None = None
        """This GPU's gradients."""
        self.added: int | None = None
        """Those of a later batch, until they are added."""
        self.large: Parameter | None = None
        """A gradient that no bucket holds."""
        self.grad: list[int] = []
        self.open: dict[int, int] = {}
        """What is gathered of each layer."""
        self.embedding: int | None = None
        self.head: int | None = None
        self.turn: int | None = None
        """Layers at the end of the model that stay gathered until their backward pass."""
        self._stand(t.timeline)

    def _counted(self, leaves: Iterable[Leaf]) -> Iterator[Leaf]:
        """These leaves, and those of the layers that are left out."""
        for leaf in leaves:
            yield from [leaf] * (copies(self.groups) if leaf.segment == TEMPLATE else 1)

    def _sub_groups(self) -> list[int]:
        """Elements of this GPU's part that are updated at once."""
        if self.stage < 3 or self.part <= SUB_GROUP_ELEMENTS:
            return [self.part]
        full, rest = divmod(self.part, SUB_GROUP_ELEMENTS)
        return [SUB_GROUP_ELEMENTS] * full + [rest] * bool(rest)

    def _stand(self, t: Timeline) -> None:
        """What stands beside the parameters, on the GPU or elsewhere."""
        if self.away is None:
            if self.item == 2 or self.stage < 3:  # ZeRO-3 in fp32 updates its parameters themselves
                for leaf in self.leaves:
                    t.alloc(leaf.tensor.nbytes, MASTERS)
        else:
            self._elsewhere(t)
        if self.stage < 3:
            if self.away:
                t.alloc(self.largest * self.item, COPYING)
            return
        if self.params_away:
            nbytes = self.parameters * self.item
            t.elsewhere.append((self.params_away, PARAMETERS, nbytes))
            if self.params_away == "nvme":
                t.elsewhere.append(("cpu", PINNED, PARAM_BUFFERS * PARAM_BUFFER_ELEMENTS * self.item))
        small = [x.tensor for x in self._counted(self.states.every()) if x.tensor.numel <= self.sizes.persistence]
        if small and self.ranks > 1:
            t.alloc(sum(x.nbytes for x in small), PERSISTENT)
        if self.away is None:
            t.alloc(self.part * self.item, PARTITION)
        t.alloc(self.sizes.reduce * self.item, BUCKET)

    def _elsewhere(self, t: Timeline) -> None:
        """Masters, states and gradients of an optimizer that runs on the CPU: 16 to 18 bytes a parameter with Adam."""
        assert self.away is not None
        t.elsewhere.append((self.away, MASTERS, self.part * 4))
        t.elsewhere.append((self.away, SENT, self.part * 4))
        t.elsewhere.append(("cpu", PARTITION, self.part * self.item))  # as they come, and as masters go back
        if self.stage < 3:
            t.elsewhere.append(("cpu", COPYING, self.largest * self.item))
            if self.accumulates:
                t.elsewhere.append(("cpu", PARTITION, self.part * self.item))
        if self.away == "nvme":
            group = max(x.tensor.numel for x in self.leaves)
            t.elsewhere.append(("cpu", PINNED, SWAP_BUFFERS * group * 4))

    # -- parameters of ZeRO-3 ----------------------------------------------------------------------------------------

    def enter_model(self) -> None:
        if self._gathers:
            self.embedding = self._gather(self._root(self.states.before))

    def enter(self, blocks: Blocks, hidden: Tensor) -> Tensor:
        if not self._gathers or self.tape.redone is not None:
            return hidden
        self._free(self.embedding)
        self.embedding = None
        key = id(blocks)
        self.open[key] = self._gather(self._window(blocks, whole=False))
        if blocks is self.states.layers[-1]:
            self.turn = self._gather(self._stays())

        def after(t: Tape, saved: Saved, grads: list[Tensor | None]) -> list[Tensor | None]:
            self._free(self.open.pop(key, None))
            if blocks is self.states.layers[-1]:
                self._free(self.turn)
                self.turn = None
            return [grads.pop()]

        node = self.tape.record(after, [hidden])
        if node is None:
            return hidden
        return Tensor(hidden.storage, hidden.shape, hidden.strides, hidden.dtype, node)

    def leave(self, blocks: Blocks, hidden: Tensor) -> Tensor:
        if not self._gathers or self.tape.redone is not None:
            return hidden
        self._free(self.open.pop(id(blocks), None))
        if blocks is self.states.layers[-1]:
            self.head = self._gather(self._root(self.states.head or self.states.before))
        if hidden.node is not None:
            hidden.node.before = lambda: self._again(blocks)
        return hidden

    def _again(self, blocks: Blocks) -> None:
        """A layer's backward pass begins."""
        self._free(self.head)
        self.head = None
        self.open[id(blocks)] = self._gather(self._window(blocks, whole=self.checkpointing))

    @property
    def _gathers(self) -> bool:
        return self.stage == 3 and self.ranks > 1

    def _root(self, leaves: Iterable[Leaf]) -> int:
        return sum(x.tensor.numel for x in leaves if x.tensor.numel > self.sizes.persistence)

    def _window(self, blocks: Blocks, whole: bool) -> int:
        """Elements that stand of a layer at once: the module at work, and what is fetched ahead of it."""
        sizes = [x.tensor.numel for x in self.states.every(blocks) if x.tensor.numel > self.sizes.persistence]
        ahead = min(self.sizes.prefetch + max(sizes, default=0), sum(sizes))  # the last one fetched may exceed it
        return (
            sum(sizes) + min(self.sizes.prefetch, sum(sizes))
            if whole
            else min(max(sizes, default=0) + ahead, sum(sizes))
        )

    def _stays(self) -> int:
        """Elements of the layers whose parameters are used again before 1e9 others are."""
        passes = 3 if self.checkpointing else 2
        left = REUSE_ELEMENTS - 2 * self._root(self.states.head or self.states.before)
        found = 0
        sizes = list(self._layer_sizes())
        for size in reversed(sizes[:-1]):
            left -= passes * size
            if left <= 0:
                break
            found += size
        return found

    def _layer_sizes(self) -> Iterator[int]:
        for blocks in self.states.layers:
            leaves = list(self.states.every(blocks))
            times = copies(self.groups) if leaves and leaves[0].segment == TEMPLATE else 1
            yield from [self._root(leaves)] * times

    def _gather(self, elements: int) -> int:
        t = self.tape.timeline
        nbytes = elements * self.item
        ahead = min(self.sizes.prefetch, elements) * self.item
        flat = on_stream(t, ALL_GATHER, t.alloc(ahead, GATHERED))  # several in one buffer, and then each in its own
        handle = on_stream(t, ALL_GATHER, t.alloc(nbytes, GATHERED))
        t.free(flat)
        return handle

    # -- gradients ---------------------------------------------------------------------------------------------------

    def arrived(self, parameter: Parameter) -> None:
        t = self.tape.timeline
        if not self.begun:
            self.begun = True
            if self.stage < 3:
                self.bucket = t.alloc(self.sizes.reduce * self.item, BUCKET)
            if self.stage > 1:
                self._begin()
        if self.stage == 1:
            return
        self._reduce_large()
        if parameter.grad is not None:
            if parameter.grad.numel > self.sizes.reduce:
                self.large = parameter
            else:
                parameter.grad = None  # it lies in the bucket

    def _begin(self) -> None:
        """The part that this GPU keeps, and a full bucket on its way."""
        if self.stage < 3 and self.away is None:
            came = self.tape.timeline.alloc(self.part * self.item, PARTITION)
            if self.own is None:
                self.own = came
            else:
                self.added = came  # to what earlier batches left
        if self.ranks > 1:
            self._moment(min(self.sizes.reduce, self.whole) * self.item, REDUCING)

    def _reduce_large(self) -> None:
        parameter, self.large = self.large, None
        if parameter is None or parameter.grad is None:
            return
        if self.ranks > 1 and (self.stage < 3 or parameter.grad.numel % self.ranks):
            self._moment(parameter.grad.numel * self.item, REDUCING)
        parameter.grad = None

    def end_backward(self) -> None:
        self._reduce_large()
        if self._gathers:
            self._free(self._gather(self._root(self.states.before)))
        if self.stage == 1 and self.last:
            self._begin()
        self._free(self.bucket)
        self._free(self.added)
        self.bucket, self.added, self.begun = None, None, False
        if self.stage == 1 and self.last:
            for leaf in self.states.trained():
                leaf.node.grad = None  # type: ignore[union-attr]

    # -- the step ----------------------------------------------------------------------------------------------------

    def clip(self, tensors: int) -> None:
        """The norm of this GPU's gradients, one after the other in fp64."""
        if self.away is None or self.stage == 3:
            held = ceil_div(self.largest, self.ranks) if self.stage == 3 else min(self.largest, self.part)
            self.tape.timeline.moment(NORM, held * 8)

    def step(self, optimizer: Optimizer) -> None:
        t = self.tape.timeline
        if self.away:
            return
        for leaf in self.leaves:
            wide = leaf.tensor.nbytes
            joined = t.alloc(leaf.tensor.numel * self.item, PARTITION)
            if self.item == 2:
                grad = t.alloc(wide, WIDE)
                t.free(joined)
            else:
                grad = joined
            if self.own is not None:
                t.free(self.own)
                self.own = None
            optimizer.step_of(self.tape, leaf)
            t.free(grad)

    def forget_gradients(self) -> None:
        """None is left."""

    def count(self, optimizer: Optimizer, groups: int) -> None:
        t = self.tape.timeline
        t.trainable_parameters = self.whole
        t.symbols["P÷n"] = max(x.tensor.numel for x in self.leaves)
        t.gradients_bytes = self.item * (self.whole if self.stage == 1 else self.part)
        if self.away is None:
            t.optimizer_bytes = sum(kept_bytes(optimizer.kept, leaf) for leaf in self.leaves)
            t.optimizer_bytes += self.part * 4 * (self.item == 2 or self.stage < 3)
            return
        states = optimizer.state_bytes(self.leaves)
        t.elsewhere.append((self.away, STATES, states))
        t.optimizer_bytes = states + self.part * 4

    def _moment(self, nbytes: int, tag: Tag) -> None:
        t = self.tape.timeline
        t.free(on_stream(t, REDUCE if self.stage == 3 else 0, t.alloc(nbytes, tag)))

    def _free(self, handle: int | None) -> None:
        if handle is not None:
            self.tape.timeline.free(handle)


def _no_optimizer(request: Request, beside: str, valid: Iterable[str]) -> HfvramError:
    words = f"--optimizer {request.optimizer} with {beside} has no formula"
    return HfvramError("usage", f"{words}: valid are {', '.join(valid)}")


def _place(request: Request, what: str) -> Elsewhere | None:
    """Where `--offload` puts it: `optimizer` to CPU memory, `optimizer=nvme` on."""
    if f"{what}=nvme" in request.offload:
        return "nvme"
    return "cpu" if what in request.offload else None
