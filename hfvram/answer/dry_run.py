"""A dry run: what a GPU would hold while somebody's own PyTorch code runs, which runs on the meta device instead."""

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from hfvram.answer.estimate import Item, LiveTensor
from hfvram.answer.gpus import find_gpu
from hfvram.answer.items import items
from hfvram.answer.largest import largest
from hfvram.errors import HfvramError
from hfvram.memory.allocator import Peaks, replay
from hfvram.memory.device import device_bytes, kernels_bytes
from hfvram.memory.generation import MEASURED, generation
from hfvram.memory.timeline import Timeline


class DryRun:
    """Follows what is allocated inside its `with`; afterwards (and inside, so far) it says what stood at the peak.

    `report` is what `print` shows of it. Raises `missing_extra` without torch, `usage` for a GPU that is unknown.
    """

    def __init__(self, report: Callable[["DryRun"], str], gpu: str | None = None) -> None:
        try:
            from hfvram.memory.exact.run import Run
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise HfvramError("missing_extra", "dry_run needs torch: pip install 'hfvram[exact]'") from error
        self._gpu = find_gpu(gpu or "H100")[0]
        self._run = Run(gpu=generation(self._gpu.capability))
        self._report = report
        self._stack = ExitStack()
        self._watch: Any = None
        self._peaks: tuple[int, Peaks] | None = None

    def __enter__(self) -> Self:
        from hfvram.memory.exact.cuda import Device
        from hfvram.memory.exact.dry_run import dry_run

        if self._watch is not None:
            raise HfvramError("usage", "a dry run is over once its `with` is left: hfvram.dry_run() makes a new one")
        major, minor = map(int, (self._gpu.capability or MEASURED).split("."))
        maker = "NVIDIA " if self._gpu.vendor == "nvidia" else ""
        device = Device(maker + self._gpu.name, self._gpu.memory_bytes, (major, minor))
        self._watch = self._stack.enter_context(dry_run(self._run, device))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)

    def mark(self, phase: str) -> None:
        """Name what follows: `peak_phase` is then "phase: backward", or the phase alone before a model is called."""
        self._watch.mark(phase)

    def start_over(self) -> None:
        """Give back what is unused and let the peaks start anew, as `empty_cache` and `reset_peak_memory_stats` do."""
        self._run.stands()

    @property
    def timeline(self) -> Timeline:
        """Every allocation and free, in order."""
        return self._run.timeline

    @property
    def peak_allocated_bytes(self) -> int:
        """The most bytes in live blocks: `torch.cuda.max_memory_allocated()`."""
        return self._peak().allocated_bytes

    @property
    def peak_reserved_bytes(self) -> int:
        """The most bytes that the caching allocator holds: `torch.cuda.max_memory_reserved()`."""
        return self._peak().reserved_bytes

    @property
    def device_bytes(self) -> int:
        """What the process takes of the GPU, with CUDA's context and loaded kernels."""
        trained = self._watch is not None and self._watch.trained
        return device_bytes(self.peak_reserved_bytes, kernels_bytes("train" if trained else "inference", sharded=False))

    @property
    def peak_phase(self) -> str:
        """When the peak stands: forward, backward, optimizer step; after the name that `mark` gave."""
        return self.timeline.phase_at(self._peak().event)

    def at_peak(self, n: int = 10, alike: bool = False) -> tuple[LiveTensor, ...]:
        """The largest tensors at the peak; as one, those that differ only in the numbers of their paths, if `alike`."""
        return largest(self.timeline, self._peak(), n, alike)

    def items(self) -> tuple[Item, ...]:
        """All that is live at the peak, by what and where it is; it adds up to `peak_allocated_bytes`."""
        return items(self.timeline, self._peak())

    def by_category(self) -> dict[str, int]:
        """The same by category alone, the largest first."""
        sums: dict[str, int] = {}
        for item in self.items():
            sums[item.category] = sums.get(item.category, 0) + item.bytes
        return dict(sorted(sums.items(), key=lambda pair: -pair[1]))

    def __str__(self) -> str:
        return self._report(self)

    def _peak(self) -> Peaks:
        events = len(self.timeline.events)
        if self._peaks is None or self._peaks[0] != events:
            self._peaks = events, replay(self.timeline)
        return self._peaks[1]
