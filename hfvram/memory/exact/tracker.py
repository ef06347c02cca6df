"""Follows every storage of a run on the meta device from birth to death, and writes it into a `Timeline`."""

import sys
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, repeat
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hfvram.memory.cuda_kernels import CUBLAS, CUBLASLT, CUBLASLT_BYTES
from hfvram.memory.exact.accumulation import ADD, alone, in_place
from hfvram.memory.exact.answers import ANSWERS
from hfvram.memory.exact.data_dependent import NOTES, forget, scalar
from hfvram.memory.exact.meta_kernels import MetaKernels
from hfvram.memory.exact.scratch import MATRIX_PRODUCTS, scratch_bytes
from hfvram.memory.generation import HOPPER
from hfvram.memory.timeline import Category, Tag, Timeline, starred

aten = torch.ops.aten
OWN = "the model's own code"
IN_BACKWARD = "gradients of activations"


class Tracker(TorchDispatchMode):  # type: ignore[misc]
    """A dispatch mode that sees one device's storages: meta's, or for proof another's.

    `category` is what new storages are; `module` names what runs; `stream` is whose pool serves. From autograd's node
    number `nodes[i]` on, nodes are of the module `nodes_of[i]`: so the backward pass knows whose gradients it makes.

    What meta tensors can't tell is assumed (`data_dependent`), of an input that is `unpadded` or not.
    """

    def __init__(self, timeline: Timeline, device: str = "meta") -> None:
        super().__init__()
        alone()
        self.timeline = timeline
        self.device = device
        self.category: Category = "activations"
        self.module = ""
        self.stream = 0
        self.backward = False
        self.unpadded = True
        self.operator: Any = None
        self.nodes: list[int] = []
        self.nodes_of: list[str] = []
        self.told: dict[int, bool] = {}
        self.assumed: dict[int, float] = {}
        self.live: dict[int, tuple[int, Any]] = {}
        self.workspaces: set[object] = set()
        self.cublas_bytes = HOPPER.cublas_bytes
        self.kernels = MetaKernels()
        self._tags: dict[tuple[str, Category], Tag] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if types and any(t.__name__ == "DTensor" for t in types):
            return NotImplemented  # a DTensor runs its operators on its local tensors, and those are seen
        self.operator = operator = func._overloadpacket
        if operator is aten._local_scalar_dense:
            return scalar(self, args[0]) if args[0].device.type == "meta" else func(*args)
        if operator is aten.equal:
            return True
        if self.backward and func is ADD and in_place(args[0], args[1], sys._getframe(0)):
            return args[0]
        if operator is aten.copy_ and args[0].device.type != "meta" and args[1].device.type == "meta":
            return args[0]  # nothing can be read from meta: what was there stays (DDP's order of buckets)
        if operator in MATRIX_PRODUCTS:
            self.workspace("backward" if self.backward else "forward", operator is aten.addmm and args[0].dim() == 1)
        out = NotImplemented
        if (answer := ANSWERS.get(operator)) is not None and args[0].device.type == "meta":
            out = answer(self, func, args, kwargs or {})
        if out is NotImplemented:
            out = self.kernels(func, args, kwargs or {})
        self.see(out)
        if self.assumed and self.kernels.kinds.get(func) == "in place":
            forget(self, args[0])
        if (note := NOTES.get(operator)) is not None:
            note(self, args, out)
        if scratch := scratch_bytes(operator, args):
            self.timeline.moment(self.tag("kernel scratch"), *scratch)
        return out

    def see(self, out: Any) -> None:
        """Register the storages of an operator's outputs."""
        if isinstance(out, torch.Tensor):
            self.add(out)
        elif isinstance(out, (tuple, list)):
            for item in out:
                self.see(item)

    def add(self, tensor: Any) -> int | None:
        """A tensor whose storage stands from now on; its handle, None where it is on another device."""
        tensor = getattr(tensor, "_local_tensor", tensor)
        if tensor.device.type != self.device:
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        if (known := self.live.get(key)) is not None:
            return known[0]
        handle = self._stands(key, storage, storage.nbytes())
        path = self._passed_back() if self.backward and not self.module else self.module
        self.timeline.made[handle] = path, self.operator, tensor.shape, tensor.dtype
        return handle

    def _stands(self, key: int, storage: Any, nbytes: int) -> int:
        handle = self.timeline.alloc(nbytes, self.tag(self.module))
        if self.stream:
            self.timeline.streams[handle] = self.stream
        self.live[key] = handle, weakref.ref(storage, self._death(key, handle))
        return handle

    def _death(self, key: int, handle: int) -> Callable[[Any], None]:
        def died(_: Any) -> None:
            if (known := self.live.get(key)) is not None and known[0] == handle:
                del self.live[key]
                self.timeline.free(handle)

        return died

    def handle_of(self, tensor: Any) -> int | None:
        """The handle of a tensor's storage, None where it is not followed."""
        known = self.live.get(tensor.untyped_storage()._cdata)
        return None if known is None else known[0]

    @contextmanager
    def making(self, category: Category, module: str | None = None) -> Iterator[None]:
        """What is new inside is of this category, and of this module where one is named."""
        before = self.category, self.module
        self.category, self.module = category, self.module if module is None else module
        try:
            yield
        finally:
            self.category, self.module = before

    def entered(self, module: str) -> str:
        """What runs from now on is this module's; which module's it was so far."""
        before, self.module = self.module, module
        if torch.is_grad_enabled():
            self.nodes.append(torch.autograd._get_sequence_nr())
            self.nodes_of.append(module)
        return before

    def _passed_back(self) -> str:
        """The module of which autograd computes gradients just now."""
        node = torch._C._current_autograd_node()
        at = bisect_right(self.nodes, node._sequence_nr()) if node is not None else 0
        return self.nodes_of[at - 1] if at else ""

    def resized(self, tensor: Any, nbytes: int) -> None:
        """A storage was emptied or filled again by `resize_`, which no dispatch mode sees (FSDP)."""
        key = tensor.untyped_storage()._cdata
        if (known := self.live.get(key)) is not None:
            self.timeline.free(known[0])
            if not nbytes:
                del self.live[key]
                return
            handle = self._stands(key, tensor.untyped_storage(), nbytes)
            self.timeline.made[handle] = self.module, self.operator, tensor.shape, tensor.dtype
        elif nbytes:
            self.add(tensor)

    def start_over(self, tensors: Iterable[Any]) -> None:
        """Count these tensors and the inputs that stand already, as if nothing else had ever been built."""
        timeline = self.timeline
        inputs = [(ref(), timeline.made[h]) for h, ref in self.live.values() if timeline.tags[h].category == "inputs"]
        for written in (timeline.events, timeline.sizes, timeline.tags, timeline.marks, timeline.restarts):
            written.clear()
        for noted in (self.live, self.told, self.assumed, timeline.streams, timeline.made):
            noted.clear()
        with self.making("weights"):
            for tensor in tensors:
                self.add(tensor)
        with self.making("inputs"):
            for storage, made in inputs:
                if storage is not None:
                    timeline.made[self._stands(storage._cdata, storage, storage.nbytes())] = made

    def workspace(self, thread: str, biased: bool) -> None:
        """The workspaces of matrix products, which stay once a thread has one."""
        if thread not in self.workspaces:
            self.workspaces.add(thread)
            self.timeline.alloc(self.cublas_bytes, CUBLAS)
        if biased and (thread, "Lt") not in self.workspaces:
            self.workspaces.add((thread, "Lt"))
            self.timeline.alloc(CUBLASLT_BYTES, CUBLASLT)

    def tag(self, name: str) -> Tag:
        """What a module makes in the current category."""
        name = name or (IN_BACKWARD if self.backward else "outside of any module")
        key = name, self.category
        if key not in self._tags:
            self._tags[key] = Tag(starred(name), self.category, "", OWN, "exact")
        return self._tags[key]

    def retag(self, tensors: Iterable[Any], category: Category, name: str, paths: Iterable[str] = ()) -> None:
        """Say what these tensors turned out to be, and of which parameters or modules."""
        tag, timeline = Tag(name, category, "", OWN, "exact"), self.timeline
        for tensor, path in zip(tensors, chain(paths, repeat("")), strict=False):
            tensor = getattr(tensor, "_local_tensor", tensor)
            if (handle := self.handle_of(tensor)) is not None:
                timeline.tags[handle] = tag
                if path:
                    timeline.made[handle] = path, *timeline.made[handle][1:]
