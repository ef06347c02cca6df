"""A pipeline of several components: each an estimate of its own, and their sum."""

from dataclasses import replace

from hfvram.answer.estimate import Estimate, Interval, Item, RuleOfThumb
from hfvram.memory.device import device_bytes

STANDING = ("weights", "buffers")


def total(id_: str, named: tuple[tuple[str, Estimate], ...], warnings: tuple[str, ...]) -> Estimate:
    """All components stand at once; one runs at a time, so that the widest of them decides what its run adds."""
    estimates = [e for _, e in named]
    widest_name, widest = max(named, key=lambda n: n[1].peak_allocated_bytes - _stands(n[1]))
    items = [_of(name, i) for name, e in named for i in e.items if i.category in STANDING]
    items += [_of(widest_name, i) for i in widest.items if i.category not in STANDING]
    allocated = sum(i.bytes for i in items)
    reserved = allocated + max(e.peak_reserved_bytes - e.peak_allocated_bytes for e in estimates)
    device = device_bytes(reserved)
    low, high = (
        int(sum(getattr(e.interval, end) for e in estimates) / sum(e.device_bytes for e in estimates) * device)
        for end in ("low_bytes", "high_bytes")
    )
    return replace(
        widest,
        model=replace(
            widest.model,
            id=id_,
            architecture="pipeline of " + ", ".join(name for name, _ in named),
            parameters=sum(e.model.parameters for e in estimates),
            active_parameters=sum(e.model.active_parameters for e in estimates),
        ),
        items=tuple(items),
        weights_bytes=sum(e.weights_bytes for e in estimates),
        cache_bytes=sum(e.cache_bytes for e in estimates),
        peak_allocated_bytes=allocated,
        peak_reserved_bytes=reserved,
        device_bytes=device,
        cpu_bytes=sum(e.cpu_bytes for e in estimates),
        nvme_bytes=sum(e.nvme_bytes for e in estimates),
        offloaded=tuple(replace(i, name=f"{name}: {i.name}") for name, e in named for i in e.offloaded),
        interval=Interval(low_bytes=low, high_bytes=high, basis=widest.interval.basis),
        guide=RuleOfThumb(bytes=sum(e.guide.bytes for e in estimates), formula="sum over the components"),
        components=named,
        warnings=warnings,
    )


def _stands(estimate: Estimate) -> int:
    return sum(i.bytes for i in estimate.items if i.category in STANDING)


def _of(component: str, item: Item) -> Item:
    return replace(item, name=f"{component}: {item.name}")
