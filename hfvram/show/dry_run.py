"""A dry run for the eye."""

from hfvram.answer.dry_run import DryRun
from hfvram.show.explain import largest
from hfvram.show.layout import columns, size

WIDTH = 100


def report(run: DryRun) -> str:
    """What stands at the peak by category, the ten largest tensors, the three peaks."""
    peak = run.peak_allocated_bytes or 1
    shares = [(name, size(count), f"{100 * count / peak:.1f} %") for name, count in run.by_category().items()]
    totals = [
        ("peak allocated", size(run.peak_allocated_bytes), "in live blocks"),
        ("peak reserved", size(run.peak_reserved_bytes), "held by PyTorch's caching allocator"),
        ("on the device", size(run.device_bytes), "with context and kernels"),
    ]
    lines = [f"Live at the peak ({run.peak_phase})", *columns(shares, WIDTH, "<>>"), ""]
    lines += ["Largest tensors at the peak", *largest(run.at_peak(alike=True), WIDTH), ""]
    return "\n".join([*lines, *columns(totals, WIDTH, "<><")])
