"""What happens around a model's parts where several GPUs train it on data of their own; alone, nothing.

A model is a root and its layers. `Units` is told when each is entered and left in the forward pass, when a gradient has
arrived, and when a backward pass is over; it says what clipping and the optimizer go through.
"""

from collections.abc import Iterable

from hfvram.memory.mesh import mesh_of
from hfvram.memory.timeline import Timeline
from hfvram.memory.training.optimizers import Optimizer, in_layers, kept_bytes, managed_bytes
from hfvram.memory.training.states import Blocks, Leaf, States
from hfvram.memory.training.step import clip
from hfvram.memory.training.stretch import TEMPLATE, copies
from hfvram.memory.training.tape import Parameter, Tape
from hfvram.memory.training.tensors import Tensor
from hfvram.request import Request


class Units:
    """One GPU: parameters stand whole, and gradients stay where they are."""

    def __init__(self, t: Tape, states: States) -> None:
        self.tape = t
        self.states = states
        self.leaves: list[Leaf] = states.trained()
        """What clipping and the optimizer go through, in the order of `model.parameters()`."""
        self.last = True
        """Whether gradients are reduced after this pass: of accumulated ones after the last alone."""

    def enter_model(self) -> None:
        """The forward pass begins."""

    def enter(self, blocks: Blocks, hidden: Tensor) -> Tensor:
        """A layer is about to run over this input."""
        return hidden

    def leave(self, blocks: Blocks, hidden: Tensor) -> Tensor:
        """A layer has run."""
        return hidden

    def enter_part(self, leaves: list[Leaf], hidden: Tensor) -> Tensor:
        """A mixer within a layer is about to run over this input."""
        return hidden

    def leave_part(self, leaves: list[Leaf], hidden: Tensor) -> Tensor:
        """A mixer within a layer has run."""
        return hidden

    def leave_model(self, outputs: Iterable[Tensor]) -> None:
        """The forward pass is over."""

    def arrived(self, parameter: Parameter) -> None:
        """A parameter's gradient is there."""

    def end_backward(self) -> None:
        """The backward pass is over."""

    def clip(self, tensors: int) -> None:
        """Gradients are clipped; the model has that many `tensors`."""
        clip(self.tape, self.leaves, tensors)

    def step(self, optimizer: Optimizer) -> None:
        """The optimizer updates what this GPU updates."""
        optimizer.step(self.tape, self.leaves)

    def forget_gradients(self) -> None:
        """The optimizer's `zero_grad`, in the order of its parameters."""
        for leaf in in_layers(self.tape, self.leaves):
            leaf.node.grad = None  # type: ignore[union-attr]

    def count(self, optimizer: Optimizer, groups: int) -> None:
        """Gradients and states in raw sizes, and the parameters that they are of, in all layers."""
        t = self.tape.timeline
        for leaf in self.states.trained():
            t.trainable_parameters += (copies(groups) if leaf.segment == TEMPLATE else 1) * leaf.tensor.numel
        for leaf in self.leaves:
            times = copies(groups) if leaf.segment == TEMPLATE else 1
            managed = managed_bytes(optimizer.name, leaf.tensor.numel)
            t.gradients_bytes += times * leaf.tensor.nbytes
            t.managed_bytes += times * managed
            t.optimizer_bytes += times * (kept_bytes(optimizer.kept, leaf) + managed)


def units(t: Tape, states: States, request: Request, groups: int, hidden: int) -> Units:
    """What the request asks for; `groups` of repeated layers there are in truth (`stretch.plan`), of size `hidden`."""
    if request.fsdp:
        from hfvram.memory.training.fsdp import Fsdp

        return Fsdp(t, states, request)
    if request.zero:
        from hfvram.memory.training.zero import Zero

        return Zero(t, states, request, groups, hidden)
    if mesh_of(request).data * request.ep * request.cp > 1:
        from hfvram.memory.training.ddp import Ddp

        return Ddp(t, states, request, groups)
    return Units(t, states)


def on_stream(timeline: Timeline, stream: int, handle: int) -> int:
    """An allocation comes from this CUDA stream's pool."""
    if stream:
        timeline.streams[handle] = stream
    return handle
