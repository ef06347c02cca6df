"""Memory as PyTorch's allocator and the driver report it, at the end of every phase."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Bytes at one moment; the peaks are those since the reading before."""

    allocated_bytes: int
    peak_allocated_bytes: int
    reserved_bytes: int
    peak_reserved_bytes: int
    device_bytes: int
    """Of the whole GPU: total less free, other processes included."""


@dataclass(slots=True)
class Meter:
    """Readings by the name of the phase that they end."""

    read: Callable[[], Reading]
    marks: dict[str, Reading] = field(default_factory=dict)

    def mark(self, phase: str) -> None:
        """Read memory, and start the peaks anew. A phase that comes again keeps the highest of its peaks."""
        found = self.read()
        if (before := self.marks.pop(phase, None)) is not None:
            found = replace(
                found,
                peak_allocated_bytes=max(found.peak_allocated_bytes, before.peak_allocated_bytes),
                peak_reserved_bytes=max(found.peak_reserved_bytes, before.peak_reserved_bytes),
            )
        self.marks[phase] = found

    def running_peaks(self, start: str) -> dict[str, int]:
        """The peak up to each mark after `start`."""
        peaks: dict[str, int] = {}
        highest = 0
        for name, reading in self.after(start).items():
            highest = max(highest, reading.peak_allocated_bytes)
            peaks[name] = highest
        return peaks

    def after(self, start: str) -> dict[str, Reading]:
        """The readings after this one, in order."""
        names = list(self.marks)
        return {name: self.marks[name] for name in names[names.index(start) + 1 :]}


def cuda_reading() -> Reading:
    """The GPU's memory now (`torch.cuda.memory_stats`, `mem_get_info`); peaks start anew.

    This function alone touches CUDA's counters.
    """
    import torch

    torch.cuda.synchronize()
    stats = torch.cuda.memory_stats()
    free, total = torch.cuda.mem_get_info()
    found = Reading(
        allocated_bytes=stats.get("allocated_bytes.all.current", 0),
        peak_allocated_bytes=stats.get("allocated_bytes.all.peak", 0),
        reserved_bytes=stats.get("reserved_bytes.all.current", 0),
        peak_reserved_bytes=stats.get("reserved_bytes.all.peak", 0),
        device_bytes=total - free,
    )
    torch.cuda.reset_peak_memory_stats()
    return found
