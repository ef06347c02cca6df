"""One run on meta: the tracker, CUDA's behaviour above it, and the names of the modules that run."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.modules import module as hooks
from torch.utils import checkpoint as torch_checkpoint

from hfvram.memory.exact.autocast import Autocast
from hfvram.memory.exact.kernels import CudaBehaviour
from hfvram.memory.exact.labels import RECOMPUTED, SAVED, label
from hfvram.memory.exact.tracker import Tracker
from hfvram.memory.generation import HOPPER, Generation
from hfvram.memory.timeline import Standing, Timeline


@dataclass(slots=True)
class Run:
    """What every part of the engine is handed."""

    timeline: Timeline = field(default_factory=lambda: Timeline(Standing(())))
    tracker: Tracker = field(init=False)
    autocast: Autocast = field(default_factory=Autocast)
    gpu: Generation = HOPPER
    """What of CUDA's choices depends on the GPU."""
    mesh: Any = None
    """The ranks, where there are several."""
    mode: Callable[["Run"], Any] = lambda run: CudaBehaviour(run.autocast, run.gpu)
    """What stands between the code that runs and PyTorch's functions."""

    def __post_init__(self) -> None:
        self.tracker = Tracker(self.timeline)
        self.tracker.cublas_bytes = self.gpu.cublas_bytes

    def stands(self) -> None:
        """The model is built (or adapted): what is unused is given back, and the peaks start anew."""
        gc.collect()
        self.timeline.restart()

    def on_cuda(self, model: Any) -> contextlib.AbstractContextManager[None]:
        """Run what follows as on a GPU, each allocation under the name of the module that makes it."""
        return self.running({id(m): name or type(m).__name__ for name, m in model.named_modules()})

    @contextlib.contextmanager
    def running(self, names: dict[int, str]) -> Iterator[None]:
        """The same, with the names of modules by their ids."""
        tracker, engine = self.tracker, torch.autograd._engine_run_backward
        overrides = torch.nn.functional.has_torch_function
        stack: list[str] = []

        def enter(module: Any, args: Any) -> None:
            stack.append(tracker.entered(names.get(id(module), tracker.module)))

        def leave(module: Any, args: Any, output: Any) -> None:
            tracker.entered(stack.pop() if stack else "")

        def backward(*args: Any, **kwargs: Any) -> Any:
            with self.backward():
                return engine(*args, **kwargs)

        def overridden(tensors: Any) -> bool:
            """Of plain tensors no: `nn.MultiheadAttention` is looked into, not handed to a mode as one function."""
            plain = (torch.Tensor, torch.nn.Parameter, type(None))
            return overrides(tensors) and not all(type(t) in plain for t in tensors)

        patched = patch.object(torch.nn.functional, "has_torch_function", overridden)
        handles = [hooks.register_module_forward_pre_hook(enter)]
        handles.append(hooks.register_module_forward_hook(leave, always_call=True))
        try:
            engine_patched = patch("torch.autograd._engine_run_backward", backward)
            with patched, engine_patched, self.mode(self), tracker, self.recomputing():
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """Autograd's pass: what stands at its start it needs, what modules make in it is recomputed."""
        tracker, module = self.tracker, self.tracker.module
        if tracker.backward:  # one pass within another, as reentrant checkpointing has it
            yield
            return
        label(tracker, (handle for handle, _ in tracker.live.values()), SAVED)
        before = len(self.timeline.sizes)
        tracker.backward, tracker.module = True, ""
        try:
            yield
        finally:
            tracker.backward, tracker.module = False, module
        label(tracker, range(before, len(self.timeline.sizes)), RECOMPUTED)

    @contextlib.contextmanager
    def recomputing(self) -> Iterator[None]:
        """What checkpointing computes again runs as on CUDA, too: the backward pass leaves function modes."""
        again, whole = torch_checkpoint._recomputation_hook, torch_checkpoint.CheckpointFunction.backward
        enter, leave = again.__enter__, again.__exit__

        def entered(hook: Any) -> Any:
            hook.mode = self.mode(self)
            hook.mode.__enter__()
            return enter(hook)

        def left(hook: Any, *error: Any) -> Any:
            hook.mode.__exit__(*error)
            return leave(hook, *error)

        def reentrant(*args: Any) -> Any:
            with self.mode(self):
                return whole(*args)

        with (
            patch.object(again, "__enter__", entered),
            patch.object(again, "__exit__", left),
            patch.object(torch_checkpoint.CheckpointFunction, "backward", staticmethod(reentrant)),
        ):
            yield
