"""FSDP2's own code on meta: parameters gathered layer by layer, gradients reduced, each on a stream with its own pool.

`fully_shard` runs over a process group that moves nothing. Three things stand in its way: "meta" has no
streams, parameters may not be on meta when training starts, and storages are emptied and filled by `resize_`, which no
dispatch mode sees. Each is replaced while `fsdp_on_meta` stands, and put back.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed import device_mesh
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from hfvram.memory.exact.tracker import Tracker
from hfvram.memory.timeline import Category
from hfvram.request import Request

FSDP = "torch.distributed.fsdp._fully_shard."
GATHERED = "parameters gathered by FSDP"
REDUCED = "gradients in FSDP's reduce-scatter"
WHOLE = "gradients before FSDP's reduce-scatter"


class CudaStream:
    """A CUDA stream by its number: what is allocated on it comes from a pool of its own, as on a GPU."""

    def __init__(self, number: int) -> None:
        self.number = number

    def record_event(self, event: Any = None) -> "CudaEvent":
        return event or CudaEvent()

    def wait_event(self, event: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...


class CudaEvent:
    """Nothing runs, so nothing is waited for."""

    def record(self, stream: Any = None) -> "CudaEvent":
        return self

    def synchronize(self) -> None: ...


class Device:
    """What FSDP asks of `torch.cuda`; the tracker always knows the current stream."""

    Event = CudaEvent

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.streams = 0

    def Stream(self, *args: Any, **kwargs: Any) -> CudaStream:
        self.streams += 1
        return CudaStream(self.streams)

    def current_stream(self) -> CudaStream:
        return CudaStream(self.tracker.stream)

    @contextlib.contextmanager
    def stream(self, stream: CudaStream) -> Iterator[None]:
        before, self.tracker.stream = self.tracker.stream, stream.number
        try:
            yield
        finally:
            self.tracker.stream = before


@contextlib.contextmanager
def fsdp_on_meta(tracker: Tracker) -> Iterator[None]:
    """FSDP2 ready for parameters on meta, its allocations noted under the stream that asks for them."""
    device = Device(tracker)
    handle = device_mesh._get_device_handle

    def alloc_storage(tensor: Any) -> None:
        if tensor.untyped_storage().size() != (nbytes := tensor.numel() * tensor.itemsize):
            tensor.untyped_storage().resize_(nbytes)
            with _named(tracker, "workspace", GATHERED):
                tracker.resized(tensor, nbytes)

    def free_storage(tensor: Any) -> None:
        if tensor.untyped_storage().size():
            tensor.untyped_storage().resize_(0)
            tracker.resized(tensor, 0)

    def named(function: Any, category: Category, name: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with _named(tracker, category, name):
                return function(*args, **kwargs)

        return run

    group = sys.modules[FSDP + "_fsdp_param_group"]
    reduce = group.foreach_reduce

    def reduced(parameters: Any, gradients: Any, *args: Any, **kwargs: Any) -> Any:
        tracker.retag(gradients, "gradients", WHOLE)
        with _named(tracker, "gradients", REDUCED):
            return reduce(parameters, gradients, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith(FSDP) and hasattr(module, "_get_device_handle"):
                replaced = _replaced(module, _get_device_handle=lambda t="cuda": device if t == "meta" else handle(t))
                stack.enter_context(replaced)
            if name.startswith(FSDP) and hasattr(module, "_get_device_from_mesh"):
                stack.enter_context(_replaced(module, _get_device_from_mesh=lambda mesh: torch.device("meta")))
            if name.startswith(FSDP) and hasattr(module, "alloc_storage"):
                stack.enter_context(_replaced(module, alloc_storage=alloc_storage, free_storage=free_storage))
        calls: tuple[tuple[str, Category, str], ...] = (
            ("foreach_all_gather", "workspace", GATHERED),
            ("foreach_all_gather_copy_out", "workspace", GATHERED),
        )
        stack.enter_context(_replaced(group, **{f: named(getattr(group, f), c, n) for f, c, n in calls}))
        stack.enter_context(_replaced(group, foreach_reduce=reduced))
        stack.enter_context(_replaced(group.FSDPParamGroup, _validate_no_meta_params=lambda self: None))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, **new: Any) -> Iterator[None]:
    old = {name: getattr(owner, name) for name in new if hasattr(owner, name)}
    for name in old:
        setattr(owner, name, new[name])
    try:
        yield
    finally:
        for name, value in old.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def _named(tracker: Tracker, category: Category, name: str) -> Iterator[None]:
    before = tracker.category, tracker.module
    tracker.category, tracker.module = category, name
    try:
        yield
    finally:
        tracker.category, tracker.module = before


def shard(model: Any, request: Request, mesh: DeviceMesh) -> None:
    """Apply `fully_shard` to each layer and to the whole, as accelerate does; adapters are in the model already.

    `--mixed-precision` is FSDP2's own policy: parameters gathered in half precision, gradients reduced in fp32.
    """
    names = ("replica", "shard") if request.fsdp == "hybrid_shard" else ("shard",)
    options: dict[str, Any] = {"mesh": mesh[names], "reshard_after_forward": request.fsdp != "shard_grad_op"}
    if request.mixed_precision != "no":
        low = torch.bfloat16 if request.mixed_precision == "bf16" else torch.float16
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    for layer in layers(model):
        fully_shard(layer, **options)
    fully_shard(model, **options)


def layers(model: Any) -> list[Any]:
    """The modules that are gathered one at a time, inner ones first.

    Accelerate's rule: those that transformers never splits over devices, but none that shares a tensor with others
    (tied embeddings go with the whole). Where that leaves fewer than two, the longest list of modules of one class.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    never_split = set(getattr(base, "_no_split_modules", None) or ())
    holders = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    found = []
    for module in model.modules():
        if type(module).__name__ in never_split:
            held = Counter(id(p) for m in module.modules() for p in m.parameters(recurse=False))
            if held and all(holders[p] == n for p, n in held.items()):
                found.append(module)
    if len(found) < 2:
        lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len({type(c) for c in m}) == 1]
        found = list(max(lists, key=len, default=()))
    return found[::-1]
