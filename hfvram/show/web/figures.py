"""An answer as HTML: the verdict, the peaks, a bar of what is live beside the GPU, what would make it fit.

Whatever came from a visitor or from the Hub is escaped where it is put in.
"""

import shlex
from collections.abc import Sequence
from html import escape
from typing import Final

from hfvram.answer.curve import Point
from hfvram.answer.estimate import Estimate, Item
from hfvram.answer.question import settled
from hfvram.errors import HfvramError
from hfvram.show.layout import size
from hfvram.show.text import asked as request_in_words
from hfvram.show.text import judged, place_rows, placed, pool, process, rank_rows, shape
from hfvram.show.web.asked import Asked, from_line
from hfvram.show.web.run import Waiting
from hfvram.units import GiB, short_count

COLOURS: Final = {
    "weights": "#3b6fd4",
    "buffers": "#8fb1f0",
    "gradients": "#d9822b",
    "optimizer": "#8e5bd0",
    "cache": "#2f9e63",
    "activations": "#17a2b8",
    "workspace": "#c9a227",
    "inputs": "#d05b8e",
    "rounding": "#9aa0a6",
    "": "#6b7280",
}
"""Of each category; of what the device holds beside it, the allocator's reserve, context and kernels."""
BESIDE: Final = "reserved, context and kernels"


DRAWING: Final = '<p id="progress" role="status">Drawing …</p>'
CANCELLED: Final = '<p id="progress" role="status">Cancelled.</p>'


def answer(e: Estimate, asked: Asked) -> str:
    """The whole answer."""
    parts = (verdict(e), peaks(e), ways(e, asked), bars(e), table(e), parts_of(e), facts(e), notices(e), link(asked))
    return f'<article class="answer">{"".join(parts)}</article>'


def failure(error: HfvramError) -> str:
    """Why there is no answer: a sentence."""
    return f'<p id="error" role="alert">{escape(error.message)}</p>'


def notice(message: str) -> str:
    """What went wrong beside an answer."""
    return f'<p id="progress" role="status">{escape(message)}</p>'


def progress(step: Waiting, asked: Asked) -> str:
    """What a visitor waits for."""
    by_code = settled(asked.request)[0].method == "simulate"
    what = "running the model's own code, without weights" if by_code else "working it out"
    what = "others come first" if step.queued else what
    return f'<p id="progress" role="status">{escape(asked.model[:80])}: {what}, {step.seconds:.0f} s …</p>'


def figure(count: int) -> str:
    """Bytes in GiB, of which as many digits are shown as tell small models apart.

    >>> figure(93405585408), figure(193 << 20), figure(33 << 20)
    ('86.99 GiB', '0.188 GiB', '0.0322 GiB')
    """
    return f"{count / GiB:.{2 if count >= GiB else 3 if count >= GiB / 10 else 4}f} GiB"


def verdict(e: Estimate) -> str:
    """Whether it fits, and the limits."""
    if not e.fit:
        return '<p id="verdict" class="open">No GPU is named: choose one to see whether it fits.</p>'
    first, *limits = judged(e)
    more = "".join(f"<p>{escape(_capital(x))}.</p>" for x in limits)
    return f'<p id="verdict" class="{"fits" if e.fit.fits else "not"}">{escape(_capital(first))}</p>{more}'


def peaks(e: Estimate) -> str:
    """The three peaks, the device's first, and where measured errors put it."""
    tiles = (
        ("On the device", "device", e.device_bytes, "with CUDA context and kernels, as nvidia-smi shows it"),
        ("Peak reserved", "peak-reserved", e.peak_reserved_bytes, "held by PyTorch's caching allocator"),
        ("Peak allocated", "peak-allocated", e.peak_allocated_bytes, "in live blocks"),
    )
    shown = "".join(
        f'<div><dt>{name}</dt><dd><strong id="{id_}" data-bytes="{count}">{figure(count)}</strong>'
        f"<small>{note}</small></dd></div>"
        for name, id_, count, note in tiles
    )
    low, high = size(e.interval.low_bytes), size(e.interval.high_bytes)
    per = f"Per GPU, the fullest of {e.request.gpus:,}. " if (e.request.gpus or 1) > 1 else ""
    where = "".join(f"<p>{size(count)} {place}, {process(e)}.</p>" for place, count in placed(e))
    return (
        f'<dl class="peaks">{shown}</dl>'
        f"<p>{per}On the device {low} to {high}: {escape(e.interval.basis)}.</p>{where}{_pool(e)}"
    )


def _pool(e: Estimate) -> str:
    """A serving engine's pool."""
    if not e.serving:
        return ""
    return _rows("The engine's pool", pool(e.serving, e.request.ctx or 1), "wide words")


def ways(e: Estimate, asked: Asked) -> str:
    """What would make it fit, each a link that asks for it; GPUs that would run it, if that was asked."""
    gpus = "".join(
        f"<tr><td>{_way(asked, change)}</td><td>{size(r.capacity_bytes)}{' each' * (r.gpus > 1)}</td></tr>"
        for r, change in ((r, f"--gpu {shlex.quote(r.gpu)} {r.options}".strip()) for r in e.recommended)
    )
    smallest = f"<table><caption>The smallest GPUs that run it</caption><tbody>{gpus}</tbody></table>" if gpus else ""
    if not e.fit or e.fit.fits:
        return smallest
    if not e.fit.ways:
        return f"<p>No single change, and no pair of changes, makes it fit.</p>{smallest}"
    rows = "".join(f"<tr><td>{_way(asked, w.change)}</td><td>{size(w.device_bytes)}</td></tr>" for w in e.fit.ways)
    return f"<table><caption>It fits with</caption><tbody>{rows}</tbody></table>{smallest}"


def _way(asked: Asked, change: str) -> str:
    """A change as a link, where the page has its options: an engine's own flags it has not."""
    shown = f"<code>{escape(change)}</code>"
    try:
        changed = Asked(asked.model, {**asked.options, **from_line(change)})
    except HfvramError:
        return shown
    return f'<a href="?{escape(changed.query)}">{shown}</a>'


def bars(e: Estimate) -> str:
    """What the device holds, item by item, above the GPU's memory, to one scale."""
    beside = e.device_bytes - e.peak_allocated_bytes
    blocks = [_block(i.bytes, COLOURS[i.category], f"{i.name}: {size(i.bytes)}") for i in _largest_first(e)]
    blocks.append(_block(beside, COLOURS[""], f"{BESIDE}: {size(beside)}"))
    said = f"On the device: {size(e.device_bytes)}"
    lines = [(said, blocks, 0)]
    if e.fit:
        capacity = e.fit.capacity_bytes
        there = f"{e.fit.gpu}: {size(capacity)} for a process"
        said += f", {there}"
        more = max(0, capacity - e.device_bytes)
        lines = [(lines[0][0], blocks, more)]
        whole = [_block(capacity, "var(--gpu)", f"{e.fit.gpu}: {size(capacity)}")]
        lines.append((there, whole, max(0, e.device_bytes - capacity)))
    drawn = "".join(
        f'<div class="label">{escape(name)}</div>'
        f'<div class="bar">{"".join(parts)}<span style="flex-grow:{rest}"></span></div>'
        for name, parts, rest in lines
    )
    return (
        f'<figure class="bars" role="img" aria-label="{escape(said)}; the table below has the items">{drawn}</figure>'
    )


def _block(count: int, colour: str, title: str) -> str:
    return f'<span title="{escape(title)}" style="flex-grow:{count};background:{colour}"></span>' if count > 0 else ""


def _largest_first(e: Estimate) -> list[Item]:
    """The items with those of a category together, in the order of the categories' largest."""
    first: dict[str, int] = {}
    for i, item in enumerate(e.items):
        first.setdefault(item.category, i)
    return sorted(e.items, key=lambda item: first[item.category])


def table(e: Estimate) -> str:
    """What is live at the peak: small items are there when they are asked for."""
    peak = e.peak_allocated_bytes
    rows = [(i, _row(i.category, i.name, i.bytes, i.formula)) for i in _largest_first(e)]
    beside = _row("", BESIDE, e.device_bytes - peak, "of the allocator, CUDA, and loaded libraries")
    large = "".join(row for i, row in rows if i.bytes * 1000 >= peak)
    small = [row for i, row in rows if i.bytes * 1000 < peak]
    more = ""
    if small:
        inner = f"<table><tbody>{''.join(small)}</tbody></table>"
        more = f"<details><summary>{len(small)} smaller items</summary>{inner}</details>"
    phase = f" ({escape(e.peak_phase)})" if e.peak_phase else ""
    return f"<table><caption>Live at the peak{phase}</caption><tbody>{large}{beside}</tbody></table>{more}"


def parts_of(e: Estimate) -> str:
    """A pipeline's components, the kinds of GPUs where they differ, and where a placed model's modules are."""
    components = [
        (name, short_count(part.model.parameters), size(part.weights_bytes), size(part.peak_allocated_bytes))
        for name, part in e.components
    ]
    heading = ("component", "parameters", "weights", "peak")
    return (
        (_rows("Components", [heading, *components]) if components else "")
        + (_rows("Per kind of GPU", rank_rows(e)) if len(e.ranks) > 1 else "")
        + (_rows("Where the modules are", place_rows(e), "wide words") if e.placement else "")
    )


def _rows(caption: str, rows: Sequence[Sequence[str]], kind: str = "wide") -> str:
    """A table that may be wider than a phone: it then scrolls in its own box."""
    cells = "".join(
        f"<tr><th scope=row>{escape(row[0])}</th>{''.join(f'<td>{escape(x)}</td>' for x in row[1:])}</tr>"
        for row in rows
    )
    inner = f"<table><caption>{escape(caption)}</caption><tbody>{cells}</tbody></table>"
    return f'<div class="{kind}" tabindex="0">{inner}</div>'


def _row(category: str, name: str, count: int, note: str) -> str:
    swatch = f'<span class="swatch" style="background:{COLOURS[category]}"></span>'
    return f"<tr><th scope=row>{swatch}{escape(name)}</th><td>{size(count)}</td><td>{escape(note)}</td></tr>"


def facts(e: Estimate) -> str:
    """The model, and what was asked of it."""
    m = e.model
    active = f" ({short_count(m.active_parameters)} active)" if m.active_parameters != m.parameters else ""
    commit = f" @ {m.commit[:12]}" if m.commit else ""
    lines = (
        f"<strong>{escape(m.id)}</strong>{escape(commit)}, {escape(m.architecture)}, source: {escape(m.source)}",
        f"{m.parameters:,} parameters{active}, {escape(m.dtype)}, from {escape(m.parameters_from)}",
        escape(", ".join(shape(m))),
        escape(", ".join(request_in_words(e))),
        f"rule of thumb: {size(e.guide.bytes)}, {escape(e.guide.formula)}",
    )
    return f'<p class="facts">{"<br>".join(lines)}</p>'


def notices(e: Estimate) -> str:
    """What is worth knowing about it."""
    said = "".join(f"<li>{escape(w)}</li>" for w in e.warnings)
    return f'<ul class="notices">{said}</ul>' if said else ""


def link(asked: Asked) -> str:
    """The address that asks the same."""
    return f'<p><a id="link" href="?{escape(asked.query)}">Link to this question</a></p>'


def curve_table(points: tuple[Point, ...]) -> str:
    """The curve in words, for those who can't see it."""
    rows = "".join(f"<tr><th scope=row>{p.ctx:,}</th><td>{size(p.device_bytes)}</td></tr>" for p in points)
    head = "<thead><tr><th scope=col>context</th><th scope=col>on the device</th></tr></thead>"
    inner = f"<table>{head}<tbody>{rows}</tbody></table>"
    return f"<details><summary>Memory over context as a table</summary>{inner}</details>"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
