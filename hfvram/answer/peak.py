"""What a timeline comes to, whichever engine wrote it: the peaks, what stands at them, and the sums beside them."""

from dataclasses import dataclass

from hfvram.answer.estimate import Item, LiveTensor, Offloaded, PhasePeak
from hfvram.answer.items import items, offloaded
from hfvram.answer.largest import largest
from hfvram.memory.allocator import replay
from hfvram.memory.timeline import Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class AtPeak:
    """What stands at the peak, and the peaks."""

    items: tuple[Item, ...]
    phase: str = ""
    allocated_bytes: int
    reserved_bytes: int
    cache_bytes: int
    gradients_bytes: int = 0
    optimizer_bytes: int = 0
    managed_bytes: int = 0
    trainable_parameters: int = 0
    largest_tensors: tuple[LiveTensor, ...] = ()
    offloaded: tuple[Offloaded, ...] = ()
    phases: tuple[PhasePeak, ...] = ()


def at_peak(timeline: Timeline, expandable_segments: bool) -> AtPeak:
    """Replay a timeline, and say what stands where it takes the most."""
    peaks = replay(timeline, expandable_segments)
    return AtPeak(
        items=items(timeline, peaks),
        phase=timeline.phase_at(peaks.event),
        allocated_bytes=peaks.allocated_bytes,
        reserved_bytes=peaks.reserved_bytes,
        cache_bytes=timeline.cache_bytes,
        gradients_bytes=timeline.gradients_bytes,
        optimizer_bytes=timeline.optimizer_bytes,
        managed_bytes=timeline.managed_bytes,
        trainable_parameters=timeline.trainable_parameters,
        largest_tensors=largest(timeline, peaks),
        offloaded=offloaded(timeline),
        phases=phases(timeline) if timeline.trainable_parameters else (),
    )


def phases(timeline: Timeline) -> tuple[PhasePeak, ...]:
    """The peaks of each phase."""
    found = timeline.phases().items()
    return tuple(PhasePeak(name=name, live_bytes=live, activations_bytes=most) for name, (live, most) in found)
