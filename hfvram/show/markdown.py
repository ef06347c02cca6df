"""An answer as GitHub's markdown."""

from collections.abc import Sequence

from hfvram.answer.estimate import Estimate
from hfvram.errors import printable
from hfvram.show.layout import size
from hfvram.show.text import PLACES, asked, place_rows, placed, process, rank_rows, recommendation, served, shape
from hfvram.units import short_count


def markdown(estimate: Estimate) -> str:
    """A heading, the facts, a table of what is live at the peak, a table of totals, the verdict."""
    e, m = estimate, estimate.model
    active = f" ({short_count(m.active_parameters)} active)" if m.active_parameters != m.parameters else ""
    facts = [f"{m.parameters:,} parameters{active}, {m.dtype}", *shape(m)]
    peak = e.peak_allocated_bytes or 1
    live = [(i.name, size(i.bytes), f"{100 * i.bytes / peak:.1f} %", i.formula) for i in e.items]
    low, high = size(e.interval.low_bytes), size(e.interval.high_bytes)
    sums = [
        ("weights", size(e.weights_bytes), ""),
        ("cache", size(e.cache_bytes), ""),
        ("peak allocated", size(e.peak_allocated_bytes), e.peak_phase),
        ("peak reserved", size(e.peak_reserved_bytes), ""),
        ("**on the device**", f"**{size(e.device_bytes)}**", f"{low} to {high}"),
        *((place, size(count), process(e)) for place, count in placed(e)),
        ("rule of thumb", size(e.guide.bytes), e.guide.formula),
    ]
    sums[-2:-2] = served(e)
    parts = [
        f"## {cell(m.id)}",
        f"{cell(m.architecture)}: {', '.join(facts)}.\n\nMemory for {', '.join(asked(e))}:",
        table(("live at the peak", "size", "share", "formula"), live, "<>><"),
        table(("total", "size", ""), sums, "<><"),
    ]
    if e.placement:
        devices = place_rows(e)
        parts.append(table(devices[0], devices[1:], "<><"))
    if len(e.ranks) > 1:
        heading, *rows = rank_rows(e)
        parts.append(table(heading, rows, "<" + ">" * (len(heading) - 1)))
    if e.offloaded:
        away = [(i.name, PLACES[i.place], size(i.bytes), i.formula) for i in e.offloaded]
        parts.append(table(("kept elsewhere", "place", "size", "formula"), away, "<<><"))
    if f := e.fit:
        room = f"{size(abs(f.headroom_bytes))} {'to spare' if f.fits else 'too much'}"
        gpus = f"{len(e.ranks)} × {f.gpu}" if e.placement else f.gpu
        parts.append(f"**{'Fits' if f.fits else 'Does not fit'} {gpus}** ({size(f.capacity_bytes)}): {room}.")
        if f.ways:
            parts.append(table(("fits with", "size"), [(f"`{w.change}`", size(w.device_bytes)) for w in f.ways], "<>"))
    if e.recommended:
        parts.append(table(("smallest GPUs that run it", "size", ""), [*map(recommendation, e.recommended)], "<><"))
    return "\n\n".join(parts)


def table(heading: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """A table; what a cell holds cannot break out of it."""
    rule = ["---:" if a == ">" else "---" for a in align]
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in (heading, rule, *rows))


def cell(text: str) -> str:
    """A text that neither ends its cell nor starts markup."""
    return printable(text, 10_000).replace("|", "\\|").replace("<", "&lt;")
