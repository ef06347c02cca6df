"""How every byte comes about: each item's formula with its numbers, where the formula is from, how sure it is."""

from collections.abc import Iterable

from hfvram.answer.estimate import Estimate, Item, LiveTensor, Offloaded
from hfvram.show.layout import Paint, columns, plain, size
from hfvram.show.text import PLACES, headline, placed, placement, process, ranks, totals

CERTAINTY = {"exact": "exact", "derived": "derived from code", "calibrated": "calibrated", "guess": "a guess"}


def explain(estimate: Estimate, width: int, paint: Paint = plain) -> str:
    """All items, in full; the sum is the peak, to the byte."""
    e = estimate
    lines = [*headline(e, width, paint), "", paint(f"Live at the peak ({e.peak_phase})", "bold")]
    for item in e.items:
        lines += explained(item, width, paint)
    lines += ["", f"sum = peak allocated: {e.peak_allocated_bytes:,} B"]
    for place, count in placed(e):
        lines += ["", paint(f"{place[0].upper()}{place[1:]}, {process(e)}", "bold")]
        for away in e.offloaded:
            lines += explained(away, width, paint) if PLACES[away.place] == place else []
        lines += ["", f"sum {place}: {count:,} B"]
    if e.largest_tensors:
        lines += ["", paint("Largest tensors at the peak", "bold"), *largest(e.largest_tensors, width)]
    if e.phases:
        peaks = [("phase", "live", "activations", "")]
        peaks += [(p.name, size(p.live_bytes), size(p.activations_bytes), "") for p in e.phases]
        lines += ["", paint("At most in each phase, without rounding", "bold"), *columns(peaks, width, "<>><")]
    lines += ["", *totals(e, width, paint)]
    lines += ["", *placement(e, width)] if e.placement else []
    lines += ["", *ranks(e, width)] if len(e.ranks) > 1 else []
    lines += [line for w in e.warnings for line in columns([("note:", w)], width, "<<")]
    return "\n".join(lines)


def explained(item: Item | Offloaded, width: int, paint: Paint) -> list[str]:
    """An item: its bytes, how sure they are, its formula with numbers, and where that is from."""
    rows = [("=", item.formula)] * bool(item.formula) + [("source:", item.source)] * bool(item.source)
    lines = [line for row in rows for line in columns([row], width, "<<", indent=2)]
    head = f"{paint(item.name, 'bold')}: {item.bytes:,} B ({size(item.bytes)}), {CERTAINTY[item.certainty]}"
    return ["", head, *lines]


def largest(tensors: Iterable[LiveTensor], width: int) -> list[str]:
    """Tensors, two lines each: size, path and what it is; then its shape, and how many are like it."""
    rows = []
    for t in tensors:
        by = f" ({t.operator})" if t.operator else ""
        rows.append((size(t.bytes), f"{t.path}: {t.what}{by}" if t.path else t.what + by))
        like = f", and {t.count - 1:,} like it" if t.count > 1 else ""
        shape = f"{' × '.join(f'{n:,}' for n in t.shape) or '1'} {t.dtype} = " if t.dtype else ""
        rows.append(("", f"{shape}{t.bytes:,} B{like}"))
    return columns(rows, width, "><")
