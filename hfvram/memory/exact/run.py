"""One run on meta: the tracker, CUDA's behaviour above it, and the names of the modules that run."""

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.nn.modules import module as hooks

from hfvram.memory.exact.autocast import Autocast
from hfvram.memory.exact.kernels import CudaBehaviour
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

    def __post_init__(self) -> None:
        self.tracker = Tracker(self.timeline)
        self.tracker.cublas_bytes = self.gpu.cublas_bytes

    def stands(self) -> None:
        """The model is built (or adapted): what is unused is given back, and the peaks start anew."""
        gc.collect()
        self.timeline.restart()

    @contextlib.contextmanager
    def on_cuda(self, model: Any) -> Iterator[None]:
        """Run what follows as on a GPU, each allocation under the name of the module that makes it."""
        names = {id(m): name or type(m).__name__ for name, m in model.named_modules()}
        stack: list[str] = []

        def enter(module: Any, args: Any) -> None:
            stack.append(self.tracker.module)
            self.tracker.module = names.get(id(module), self.tracker.module)

        def leave(module: Any, args: Any, output: Any) -> None:
            self.tracker.module = stack.pop() if stack else ""

        handles = [hooks.register_module_forward_pre_hook(enter)]
        handles.append(hooks.register_module_forward_hook(leave, always_call=True))
        try:
            with CudaBehaviour(self.autocast, self.gpu), self.tracker:
                yield
        finally:
            for handle in handles:
                handle.remove()
