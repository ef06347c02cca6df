"""FSDP2's own code on meta: parameters gathered layer by layer, gradients reduced, each on a stream with its own pool.

`fully_shard` runs over a process group that moves nothing. Three things stand in its way: "meta" has no
streams, parameters may not be on meta when training starts, and storages are emptied and filled by `resize_`, which no
dispatch mode sees. Each is replaced while `fsdp_on_meta` stands, and put back.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed import device_mesh
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from hfvram.memory.exact.build import DTYPES
from hfvram.memory.exact.tracker import Tracker
from hfvram.request import Request

FSDP = "torch.distributed.fsdp._fully_shard."
GATHERED = "parameters gathered by FSDP"
REDUCED = "gradients in FSDP's reduce-scatter"
WHOLE = "gradients before FSDP's reduce-scatter"
VALIDATE = "_validate_no_meta_params"


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
            with tracker.making("workspace", GATHERED):
                tracker.resized(tensor, nbytes)

    def free_storage(tensor: Any) -> None:
        if tensor.untyped_storage().size():
            tensor.untyped_storage().resize_(0)
            tracker.resized(tensor, 0)

    def gathering(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with tracker.making("workspace", GATHERED):
                return function(*args, **kwargs)

        return run

    group = sys.modules[FSDP + "_fsdp_param_group"]
    reduce = group.foreach_reduce

    def reduced(parameters: Any, gradients: Any, *args: Any, **kwargs: Any) -> Any:
        tracker.retag(gradients, "gradients", WHOLE)
        with tracker.making("gradients", REDUCED):
            return reduce(parameters, gradients, *args, **kwargs)

    stand_ins: dict[str, Callable[..., Any]] = {
        "_get_device_handle": lambda kind="cuda": device if kind == "meta" else handle(kind),
        "_get_device_from_mesh": lambda mesh: torch.device("meta"),
        "alloc_storage": alloc_storage,
        "free_storage": free_storage,
    }
    gathers = {name: gathering(getattr(group, name)) for name in ("foreach_all_gather", "foreach_all_gather_copy_out")}
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith(FSDP):
                for function in stand_ins.keys() & vars(module).keys():
                    stack.enter_context(patch.object(module, function, stand_ins[function]))
        stack.enter_context(patch.multiple(group, foreach_reduce=reduced, **gathers))
        stack.enter_context(patch.object(group.FSDPParamGroup, VALIDATE, lambda self: None, create=True))
        yield


def shard(model: Any, request: Request, mesh: DeviceMesh) -> None:
    """Apply `fully_shard` to each layer and to the whole, as accelerate does; adapters are in the model already.

    `--mixed-precision` is FSDP2's own policy: parameters gathered in half precision, gradients reduced in fp32.
    """
    names = ("replica", "shard") if request.fsdp == "hybrid_shard" else ("shard",)
    options: dict[str, Any] = {"mesh": mesh[names], "reshard_after_forward": request.fsdp != "shard_grad_op"}
    if request.mixed_precision != "no":
        low = DTYPES[request.mixed_precision]
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
