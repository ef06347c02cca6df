"""An estimate as a few parts that add up to what is on the device: what a bar is drawn from."""

from typing import Final

from hfvram.answer.estimate import Estimate

ORDER: Final = (
    *("weights", "buffers", "cache", "gradients", "optimizer", "activations", "inputs", "workspace", "rounding"),
    *("allocator", "CUDA"),
)
"""Categories of items as they are shown, then what the allocator holds beyond them, then context and kernels."""


def parts(e: Estimate) -> tuple[tuple[str, int], ...]:
    """Parts that are more than nothing, in `ORDER`; they add up to `device_bytes`.

    The rule of thumb has neither allocator nor context. A serving engine's graphs stand outside of its allocator.
    """
    sums = dict.fromkeys(ORDER, 0)
    for item in e.items:
        sums[item.category] += item.bytes
    reserved = min(max(e.peak_reserved_bytes, e.peak_allocated_bytes), e.device_bytes)
    sums["allocator"] = reserved - e.peak_allocated_bytes
    sums["CUDA"] = e.device_bytes - reserved
    return tuple((name, count) for name, count in sums.items() if count > 0)
