"""Autograd of sizes: operators leave nodes, nodes keep what their gradients need, and a backward pass runs them.

What is kept, what order nodes run in, when gradients are added in place and when a node lets go of what it saved is
PyTorch's. Source: PyTorch 2.11, torch/csrc/autograd/engine.cpp, input_buffer.cpp, functions/accumulate_grad.h;
torch/utils/checkpoint.py (non-reentrant, early stop).
"""

import sys
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

from hfvram.memory.cuda_kernels import CUBLAS, CUBLASLT, CUBLASLT_BYTES
from hfvram.memory.generation import HOPPER, Generation
from hfvram.memory.timeline import Tag, Timeline
from hfvram.memory.training.tensors import (
    FLOATING,
    ITEM_BYTES,
    Shape,
    Storage,
    Tensor,
    broadcast,
    contiguous,
    is_contiguous,
    is_dense,
    layout,
)

if TYPE_CHECKING:
    from hfvram.memory.training.data_parallel import Units

ENGINE = "PyTorch 2.11: torch/csrc/autograd/engine.cpp"
GRADIENTS = Tag("gradients", "gradients", "P·e", "PyTorch 2.11: functions/accumulate_grad.h", "exact")
FLOWING = Tag("gradients of activations", "activations", "", ENGINE)
OTHER = Tag("other activations", "activations", "", "PyTorch 2.11: ATen")
SCRATCH = Tag("kernel scratch", "activations", "", "PyTorch 2.11: native/cuda")
LAST: Final = 1 << 62

Saved = tuple[Tensor | None, ...]
Gradient = Callable[["Tape", Saved, list[Tensor | None]], Sequence[Tensor | None]]
"""What a node does: from what it saved and the gradients of its outputs to those of its inputs."""


Ring = tuple[int, int]


class Node:
    """One operator's backward. `edges` are (node, which of its outputs, shape, dtype) for each input, None where no
    gradient is wanted; `saved` are tensors or, with a `frame`, their places in what a checkpoint computes again."""

    __slots__ = (
        "__weakref__",
        "before",
        "distributed",
        "edges",
        "frame",
        "gradient",
        "outputs",
        "saved",
        "segment",
        "sequence",
    )

    def __init__(self, gradient: Gradient | None, edges: tuple[Any, ...], sequence: int, segment: int | None) -> None:
        self.gradient = gradient
        self.edges = edges
        self.sequence = sequence
        self.segment = segment
        self.distributed = False
        self.outputs = 1
        self.saved: tuple[Any, ...] = ()
        self.frame: Frame | None = None
        self.before: Callable[[], None] | None = None
        """What runs before it, as a hook on its output."""

    def wants(self, i: int) -> bool:
        """Whether input i needs a gradient."""
        return self.edges[i] is not None


class Parameter(Node):
    """A leaf: where its gradient ends up. The first one is taken as it is if nobody else holds it."""

    __slots__ = ("dtype", "grad", "shape")

    def __init__(self, shape: Shape, dtype: str) -> None:
        super().__init__(None, (), LAST, None)
        self.shape = shape
        self.dtype = dtype
        self.grad: Tensor | None = None


class Input(Parameter):
    """An activation that is made to need a gradient: it stays with the graph, and so does that gradient."""

    __slots__ = ("held",)

    def __init__(self, x: Tensor) -> None:
        super().__init__(x.shape, x.dtype)
        self.held = x.alias()


class _Enough(Exception):
    """Everything that the backward pass needs has been computed again."""


class Frame:
    """A checkpointed stretch: what runs it again, how many tensors it would have saved, and what was recomputed."""

    __slots__ = ("autocast", "count", "holders", "run", "saved")

    def __init__(self, run: Callable[[], Any], autocast: str | None) -> None:
        self.run = run
        self.autocast = autocast
        self.count = 0
        self.holders: list[ref[Node]] = []
        """Whose each saved tensor is: of nodes that are gone nothing is kept."""
        self.saved: list[Any] | None = None


class Tape:
    """What runs: the timeline, the graph's counters, the precision and the threads' workspaces.

    `tag` is what new tensors are; operators take one of their own where that says more. `on_meta` does as
    PyTorch does on the meta device where kernels differ from CUDA's: for comparisons.
    """

    def __init__(self, timeline: Timeline, gpu: Generation = HOPPER, on_meta: bool = False) -> None:
        self.timeline = timeline
        self.gpu = gpu
        self.on_meta = on_meta
        self.tag = OTHER
        self.grad = True
        self.sequence = 0
        self.segment: int | None = None
        self.segments: list[tuple[int, int, int | None]] = []
        """(events before, handles before, layer): what follows belongs to this layer."""
        self.frame: Frame | None = None
        self.redone: Frame | None = None
        self.thread = "forward"
        self.workspaces: set[tuple[str, str]] = set()
        self.autocast: str | None = None
        self.casts: dict[Node, Tensor] = {}
        self.held: list[Tensor] = []
        """What the model's output holds beside logits."""
        self.gradients = GRADIENTS
        self.moved: dict[int, tuple[int | None, int]] = {}
        """Inputs of layers that are moved to CPU memory: the layer's number, bytes."""
        self.units: Units | None = None
        """What is told of layers and gradients, where several GPUs train."""
        self.ring: Ring = (1, 0)
        """How many ranks share a sequence (`--cp`), and which of them this is."""
        self.given: tuple[Tensor, Tensor] | None = None
        """Positions and shifted labels of this rank's part."""
        self.sp = 1
        """Parts that a sequence is in around the blocks that tensor parallel ranks share."""
        self.scatters = self.regathers = False
        """Whether products of rows give a part of the sequence, and those of columns are given one."""
        self.distributed = False
        """Whether what runs makes tensors of a subclass (DTensor), whose gradients are never added in place."""
        self.gathered_bytes = 0
        """Of the buffer into which they gather it."""

    # -- allocating --------------------------------------------------------------------------------------------------

    def new(self, shape: Shape, dtype: str, strides: Shape | None = None, tag: Tag | None = None) -> Tensor:
        """A new tensor, contiguous unless `strides` say otherwise."""
        size = ITEM_BYTES[dtype]
        for n in shape:
            size *= n
        timeline = self.timeline
        handle = timeline.alloc(size, (tag or self.tag) if self.thread == "forward" or self.redone else FLOWING)
        return Tensor(Storage(timeline.events, handle), shape, strides or contiguous(shape), dtype)

    def like(self, x: Tensor, dtype: str | None = None, tag: Tag | None = None) -> Tensor:
        """A new tensor that lies as `x` does (`empty_like`)."""
        strides = x.strides if is_dense(x.shape, x.strides) else layout(x.shape, (x.shape, x.strides))
        return self.new(x.shape, dtype or x.dtype, strides, tag)

    def moment(self, *sizes: int) -> None:
        """What a kernel holds while it runs."""
        self.timeline.moment(SCRATCH, *sizes)

    def multiplies(self, biased: bool = False) -> None:
        """The workspaces of matrix products, which stay once a thread has one."""
        if (self.thread, "cuBLAS") not in self.workspaces:
            self.workspaces.add((self.thread, "cuBLAS"))
            self.timeline.alloc(self.gpu.cublas_bytes, CUBLAS)
        if biased and (self.thread, "Lt") not in self.workspaces:
            self.workspaces.add((self.thread, "Lt"))
            self.timeline.alloc(CUBLASLT_BYTES, CUBLASLT)

    def enter(self, segment: int | None) -> None:
        """What follows belongs to this layer (of those that repeat), or to none."""
        self.segment = segment
        self.segments.append((len(self.timeline.events), len(self.timeline.sizes), segment))

    def mark(self, phase: str) -> None:
        """A phase begins."""
        self.timeline.mark(phase)
        self.enter(None)

    # -- recording ---------------------------------------------------------------------------------------------------

    def record(self, gradient: Gradient, inputs: Sequence[Tensor], *saved: Tensor | None) -> Node | None:
        """The node of an operator that is about to run, with what it saves of its inputs; None without gradients."""
        if not self.grad:
            return None
        edges = tuple(None if x.node is None else (x.node, x.index, x.shape, x.dtype) for x in inputs)
        if not any(edges):
            return None
        self.sequence += 1
        node = Node(gradient, edges, self.sequence, self.segment)
        node.distributed = self.distributed
        self._save(node, saved)
        return node

    def keep(self, node: Node | None, *saved: Tensor | None) -> None:
        """What a node saves of its outputs, after it ran."""
        if node is not None:
            self._save(node, saved)

    def _save(self, node: Node, saved: Saved) -> None:
        if self.redone is not None:
            frame, found = self.redone, self.redone.saved
            assert found is not None
            for x in saved:
                if x is not None:
                    found.append(None if frame.holders[len(found)]() is None else x.alias())
                    node.saved = (*node.saved, x.alias())
                    if len(found) == frame.count:
                        raise _Enough
        elif self.frame is not None:
            frame = self.frame
            for x in saved:
                place = None
                if x is not None:
                    place, node.frame = frame.count, frame
                    frame.count += 1
                    frame.holders.append(ref(node))
                node.saved = (*node.saved, place)
        else:
            node.saved = (*node.saved, *[None if x is None else x.alias() for x in saved])

    def _unpacked(self, node: Node) -> Saved:
        saved, frame = node.saved, node.frame
        node.saved = ()
        if frame is None:
            return saved
        if frame.saved is None:
            self._recompute(frame)
        found = frame.saved
        assert found is not None
        out = []
        for place in saved:
            out.append(None if place is None else found[place])
            if place is not None:
                found[place] = None
        return tuple(out)

    def _recompute(self, frame: Frame) -> None:
        frame.saved = []
        before = self.grad, self.autocast, self.tag, self.casts
        self.redone, self.grad, self.autocast, self.casts = frame, True, frame.autocast, {}
        try:
            frame.run()
        except _Enough:
            pass
        finally:
            self.redone = None
            self.grad, self.autocast, self.tag, self.casts = before

    def checkpoint(self, run: Callable[[], Tensor]) -> Tensor:
        """Run a stretch that saves nothing but what `run` itself holds, and is run again when its gradients come."""
        if self.redone is not None or not self.grad:
            return run()
        frame = Frame(run, self.autocast)
        self.frame = frame
        try:
            return run()
        finally:
            self.frame = None

    # -- the backward pass -------------------------------------------------------------------------------------------

    def backward(self, root: Tensor, given: Tag | None = None) -> None:
        """Run the graph of a scalar, the latest node first, and add up its parameters' gradients; or that of a tensor
        whose gradient is `given` by another GPU."""
        assert root.node is not None
        waiting = _dependencies(root.node)
        if given is not None:
            one = self.new(root.shape, root.dtype, None, given)
        self.thread, self.grad = "backward", False
        if given is None:
            one = self.new(root.shape, root.dtype)
        buffers: dict[Node, list[Tensor | None]] = {root.node: [one]}
        ready: list[tuple[int, int, Node]] = [(0, 0, root.node)]
        while ready:
            node = heappop(ready)[2]
            if isinstance(node, Parameter):
                self._accumulate(node, buffers.pop(node))
                continue
            if node.segment != self.segment:
                self.enter(node.segment)
            self._run(node, buffers, waiting, ready)
        if self.units is not None:
            self.enter(None)
            self.units.end_backward()
        self.thread, self.grad = "forward", True

    def _run(
        self,
        node: Node,
        buffers: dict[Node, list[Tensor | None]],
        waiting: dict[Node, int],
        ready: list[tuple[int, int, Node]],
    ) -> None:
        grads = buffers.pop(node)
        found: list[Tensor | None]
        assert node.gradient is not None
        if node.before is not None:
            node.before()
        recomputed = node.frame is not None
        saved = self._unpacked(node)
        arrived = any(grad is not None for grad in grads)
        found = list(node.gradient(self, saved, grads)) if arrived else [None] * len(node.edges)
        if recomputed:  # nothing else holds what was computed again
            saved = ()
        for i, edge in enumerate(node.edges):
            grad = found[i] if edge else None
            if edge and grad is not None:
                if grad.shape != edge[2]:
                    found[i] = grad = self.sum_to(grad, edge[2])
                if grad.dtype != edge[3]:
                    found[i] = self.like(grad, edge[3])
        del grad, grads, saved
        node.frame = None  # the last node of a checkpoint lets go of its input here
        for i, edge in enumerate(node.edges):
            if edge is None:
                continue
            after, index, *_ = edge
            grad, found[i] = found[i], None
            if grad is not None:
                slots = buffers.get(after)
                if slots is None:
                    slots = buffers[after] = [None] * after.outputs
                old = slots[index]
                if old is None:
                    slots[index] = grad
                else:
                    slots[index] = None
                    found[i] = grad  # what is added to another gradient stays to the end of this node
                    # One reference each: this name and the call's argument; and the tensor's.
                    alone = sys.getrefcount(old) == 2 and sys.getrefcount(old.storage) == 2
                    if alone and not after.distributed and is_dense(old.shape, old.strides):
                        slots[index] = old
                    else:
                        slots[index] = self.elementwise(old, grad)
                old = None
            grad = None
            waiting[after] -= 1
            if not waiting[after]:
                buffers.setdefault(after, [None] * after.outputs)
                heappush(ready, (-after.sequence, id(after), after))

    def _accumulate(self, parameter: Parameter, grads: list[Tensor | None]) -> None:
        grad = grads.pop()
        if grad is None:
            return
        if parameter.grad is None:  # else it is added in place
            if not (sys.getrefcount(grad) == 2 and is_contiguous(grad.shape, grad.strides)):
                grad = self.new(parameter.shape, parameter.dtype)
            parameter.grad = grad
            if not isinstance(parameter, Input):
                self.timeline.tags[grad.storage.handle] = self.gradients
        del grad
        if self.units is not None and not isinstance(parameter, Input):
            self.units.arrived(parameter)

    # -- what gradients are made with --------------------------------------------------------------------------------

    def sum_to(self, grad: Tensor, shape: Shape) -> Tensor:
        """Add up what was broadcast (`at::sum_to`): without dimensions that came first, a view of the sum."""
        added = len(grad.shape) - len(shape)
        out = self.new((*(1,) * added, *shape), grad.dtype)
        return out.as_(shape, out.strides[added:]) if added else out

    def elementwise(self, *operands: Tensor, dtype: str | None = None, tag: Tag | None = None) -> Tensor:
        """The result of an element-wise operator, without gradients."""
        first = operands[0]
        shape = first.shape
        if len(operands) > 1:
            shape = broadcast(*(x.shape for x in operands))
        strides = layout(shape, *((x.shape, x.strides) for x in operands))
        return self.new(shape, dtype or promoted(*operands), strides, tag)


def promoted(*operands: Tensor) -> str:
    """The dtype of a result: the widest floating one; tensors of no dimension count less."""
    dims = [x.dtype for x in operands if x.shape] or [x.dtype for x in operands]
    floats = [d for d in dims if d in FLOATING]
    if not floats:
        return max(dims, key=ITEM_BYTES.__getitem__)
    return "fp32" if "fp32" in floats or len(set(floats)) > 1 else floats[0]


def _dependencies(root: Node) -> dict[Node, int]:
    """How many gradients each node waits for."""
    waiting: dict[Node, int] = {root: 0}
    stack = [root]
    while stack:
        for edge in stack.pop().edges:
            if edge is not None:
                if edge[0] in waiting:
                    waiting[edge[0]] += 1
                else:
                    waiting[edge[0]] = 1
                    stack.append(edge[0])
    return waiting
