"""Anyone's own PyTorch code on meta, as a GPU runs it: what it builds, calls and steps is found by global hooks."""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.modules import module as hooks
from torch.nn.parameter import is_lazy
from torch.optim import optimizer as torch_optimizer
from torch.utils._device import _device_constructors

from hfvram.errors import HfvramError
from hfvram.memory.exact.autocast import Autocast
from hfvram.memory.exact.cuda import Device, one_gpu
from hfvram.memory.exact.kernels import CudaBehaviour
from hfvram.memory.exact.labels import name_gradients, name_states, name_tensors
from hfvram.memory.exact.optimizers import fused_on_meta
from hfvram.memory.exact.run import Run

CONSTRUCTORS = _device_constructors()
READS = (torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy)
_one_at_a_time = threading.Lock()


class UserCode(CudaBehaviour):
    """CUDA's behaviour, and its device: what is asked for on CUDA, or on no device in particular, is on meta.

    A generator is on the device that it says. What is read back (`.cpu()`, `.tolist()`) is zeros.
    """

    def __init__(self, watch: "Watch") -> None:
        super().__init__(watch.run.autocast, watch.run.gpu)
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = _here(kwargs["device"])
        if func in CONSTRUCTORS:
            if kwargs.pop("pin_memory", False) and kwargs.get("device") is None:
                kwargs["device"] = "cpu"  # only host memory is pinned
            if kwargs.get("device") is None and kwargs.get("generator") is None and not self.watch.stepping:
                kwargs["device"] = "meta"
            with self.watch.made_outside():
                return func(*args, **kwargs)
        if func is torch.Tensor.cuda:
            func, args, kwargs = torch.Tensor.to, (args[0], "meta"), {}
        if func is torch.Tensor.to:
            args = (args[0], *(_here(a) if type(a) in (str, int, torch.device) else a for a in args[1:]))
            if not args[0].is_meta:
                with self.watch.made_outside():
                    return func(*args, **kwargs)
            if torch.device("cpu") in (*args[1:], kwargs.get("device")):
                dtype = next((a for a in (*args[1:], kwargs.get("dtype")) if isinstance(a, torch.dtype)), None)
                return _zeros(args[0], dtype)
        if func in READS and args[0].is_meta:
            zeros = _zeros(args[0])
            return zeros if func is torch.Tensor.cpu else func(zeros)
        return super().__torch_function__(func, types, args, kwargs)


def _here(device: Any) -> torch.device:
    """CUDA's devices are meta."""
    asked = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device("meta") if asked.type == "cuda" else asked


def _zeros(tensor: Any, dtype: Any = None) -> Any:
    """Zeros of the same shape in host memory, of which only one is there."""
    return torch.zeros((), dtype=dtype or tensor.dtype, device="cpu").expand(tensor.shape)


class Watch:
    """What runs in the user's code: modules by their paths, phases, gradients and optimizer states."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.names: dict[int, str] = {}
        self.parents: Any = weakref.WeakKeyDictionary()
        self.roots: Any = weakref.WeakSet()
        self.stepping = False
        self.trained = False
        self.said = ""
        self.phase = ""

    def mark(self, phase: str) -> None:
        """What follows belongs to this part of the user's code."""
        self.said, self.phase = phase, ""
        self.run.timeline.mark(phase)

    def now(self, phase: str) -> None:
        """What follows is this phase of training."""
        if phase != self.phase:
            self.phase = phase
            self.run.timeline.mark(f"{self.said}: {phase}" if self.said else phase)

    @contextlib.contextmanager
    def made_outside(self) -> Iterator[None]:
        """What is constructed where no module runs is an input, unless it turns out to be a parameter."""
        tracker = self.run.tracker
        if tracker.module or tracker.backward or tracker.category != "activations":
            yield
            return
        with tracker.making("inputs", "inputs"):
            yield

    def parameters(self) -> Iterator[tuple[str, Any]]:
        """Every parameter of the modules that were called, with its path."""
        for root in list(self.roots):
            yield from root.named_parameters()

    def has_child(self, module: Any, name: str, child: Any) -> None:
        if child is not None:
            self.parents[child] = weakref.ref(module)

    def has_parameter(self, module: Any, name: str, parameter: Any) -> None:
        self._has(module, name, parameter, "weights")

    def has_buffer(self, module: Any, name: str, buffer: Any) -> None:
        self._has(module, name, buffer, "buffers")

    def _has(self, module: Any, name: str, tensor: Any, category: Any) -> None:
        if tensor is not None and not is_lazy(tensor):
            kind = type(module).__name__
            self.run.tracker.retag([tensor], category, kind, [kind if name == "weight" else f"{kind}.{name}"])

    def called(self, module: Any, args: Any) -> None:
        """Names everything below the outermost module, each time it is called: modules come and go."""
        tracker = self.run.tracker
        if tracker.module or tracker.backward:
            return
        self.now("forward")
        while (parent := self.parents.get(module)) is not None and (found := parent()) is not None:
            module = found
        self.roots.add(module)
        for name, inner in module.named_modules():
            self.names[id(inner)] = name or type(inner).__name__
        if not any(map(is_lazy, module.parameters())):
            name_tensors(tracker, module)

    def backward(self, engine: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Autograd's pass, after which gradients lie in `grad`."""
        if self.run.tracker.backward:
            return engine(*args, **kwargs)
        self.now("backward")
        self.trained = True
        out = engine(*args, **kwargs)
        name_gradients(self.run.tracker, self.parameters())
        self.now("after backward")
        return out

    def steps(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """An optimizer's step begins: what it makes for itself is on the device that it says, as on a GPU."""
        self.now("optimizer step")
        name_gradients(self.run.tracker, self._all(optimizer))
        self.run.tracker.category, self.run.tracker.module = "optimizer", "temporaries of the optimizer step"
        self.stepping = True

    def stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """It is done: what it keeps are its states."""
        self.stepping = False
        self.run.tracker.category, self.run.tracker.module = "activations", ""
        name_states(self.run.tracker, self._all(optimizer), optimizer)
        self.now("after the optimizer step")

    def _all(self, optimizer: Any) -> list[tuple[str, Any]]:
        """The parameters of an optimizer, those that no module has by number."""
        known = {id(p): name for name, p in self.parameters()}
        own = (p for group in optimizer.param_groups for p in group["params"])
        return [(known.get(id(p), f"parameter {i}"), p) for i, p in enumerate(own)]


@contextlib.contextmanager
def dry_run(run: Run, device: Device) -> Iterator[Watch]:
    """Run what follows on meta as on a GPU: peaks and what stands at them are in the timeline of `run`.

    Raises `usage` inside another one: of PyTorch's globals there is one set.
    """
    if not _one_at_a_time.acquire(blocking=False):
        raise HfvramError("usage", "a dry run is under way already: leave its `with` before another one begins")
    watch = Watch(run)
    run.autocast = Autocast(torch.float16)
    run.mode = lambda _: UserCode(watch)
    with contextlib.ExitStack() as stack:
        stack.callback(_one_at_a_time.release)
        for register, hook in (
            (hooks.register_module_module_registration_hook, watch.has_child),
            (hooks.register_module_parameter_registration_hook, watch.has_parameter),
            (hooks.register_module_buffer_registration_hook, watch.has_buffer),
            (hooks.register_module_forward_pre_hook, watch.called),
            (torch_optimizer.register_optimizer_step_pre_hook, watch.steps),
            (torch_optimizer.register_optimizer_step_post_hook, watch.stepped),
        ):
            stack.callback(register(hook).remove)
        stack.enter_context(run.autocast.stands_in())
        stack.enter_context(fused_on_meta())
        stack.enter_context(_as_on_a_gpu(run, device))
        stack.enter_context(run.running(watch.names))
        backward = functools.partial(watch.backward, torch.autograd._engine_run_backward)
        stack.enter_context(patch("torch.autograd._engine_run_backward", backward))
        stack.callback(run.tracker.live.clear)  # what dies afterwards is not of the run
        yield watch


@contextlib.contextmanager
def _as_on_a_gpu(run: Run, device: Device) -> Iterator[None]:
    """Answers that PyTorch gives on a machine with one GPU; nothing is compiled."""
    foreach = torch.utils._foreach_utils._get_foreach_kernels_supported_devices

    def with_meta() -> list[str]:
        return [*foreach(), "meta"]

    with (
        patch("torch.utils._foreach_utils._get_foreach_kernels_supported_devices", with_meta),
        patch("torch.optim.optimizer._get_foreach_kernels_supported_devices", with_meta),
        patch.object(torch, "compile", lambda model=None, **_: (lambda m: m) if model is None else model),
        one_gpu(run, device),
    ):
        yield
