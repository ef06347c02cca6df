"""Pictures of answers, drawn by matplotlib: what is live at the peak, memory over the context, a training step."""

import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from typing import Any, Final, TypeAlias

from hfvram.answer.course import Course
from hfvram.answer.curve import Point
from hfvram.answer.estimate import Estimate
from hfvram.answer.parts import ORDER, parts
from hfvram.errors import HfvramError, printable
from hfvram.show.layout import shortened, size
from hfvram.show.text import asked
from hfvram.units import GiB, short_tokens

Axes: TypeAlias = Any
Figure: TypeAlias = Any
"""matplotlib's, which is imported where something is drawn."""

FORMATS: Final = ("png", "svg", "html")
# Okabe and Ito's colours, which can be told apart by colour-blind people, and greys for what is nobody's
COLOURS: Final = {
    "weights": "#0072B2",
    "buffers": "#56B4E9",
    "cache": "#009E73",
    "gradients": "#D55E00",
    "optimizer": "#CC79A7",
    "activations": "#E69F00",
    "inputs": "#5A5A5A",
    "workspace": "#B8A200",
    "rounding": "#7F7F7F",
    "allocator": "#B4B4B4",
    "CUDA": "#D6D6D6",
}
WORDS: Final = {
    "allocator": "held free by the allocator",
    "CUDA": "CUDA context and kernels",
    "optimizer": "optimizer states",
}
DARK: Final = ("weights", "cache", "gradients", "optimizer", "inputs", "rounding")
"""Colours on which white can be read."""
VISIBLE: Final = 0.004
BOX: Final = {"facecolor": "white", "alpha": 0.9, "edgecolor": "none", "pad": 1.0}
CAPACITY: Final = "#B00020"
_RANDOM = re.compile(r'\bid="([a-z][0-9a-f]{10})"')
WIDTH: Final = 10.0
"""Inches; 100 dots each."""


@dataclass(frozen=True, slots=True)
class Picture:
    """What is drawn: one answer with its curve and course, where it has them, or several answers side by side."""

    labels: tuple[str, ...]
    estimates: tuple[Estimate, ...]
    curve: tuple[Point, ...] = ()
    course: Course | None = None


def check(file: str) -> str:
    """The format that a file's name asks for. Raises `usage` for another one, `missing_extra` without matplotlib."""
    suffix = os.path.splitext(file)[1].removeprefix(".").lower()
    if suffix not in FORMATS:
        valid = ", ".join(f".{name}" for name in FORMATS)
        raise HfvramError("usage", f"--plot {printable(file, 100)}: the name ends in none of {valid}")
    if find_spec("matplotlib") is None:
        raise HfvramError("missing_extra", "--plot needs matplotlib: pip install 'hfvram[plot]'")
    return suffix


def plot(picture: Picture, file: str) -> None:
    """Draw a picture into a file. Raises `io`, and as `check`."""
    data = drawn(picture, check(file))
    try:
        with open(file, "wb") as f:
            f.write(data)
    except (OSError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        raise HfvramError("io", f"{printable(file, 200)} can't be written: {why}") from None


def drawn(picture: Picture, kind: str) -> bytes:
    """The picture's bytes: the same for the same picture."""
    import logging
    import warnings

    import matplotlib
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    style = {"font.size": 10, "svg.hashsalt": "hfvram", "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that the font lacks is drawn as a box
        panels = [n for n, there in (("curve", picture.curve), ("course", picture.course)) if there]
        heights = [1.0 + 0.42 * len(picture.estimates), *(3.4 for _ in panels)]
        figure = Figure(figsize=(WIDTH, 1.2 + sum(heights)), layout="constrained")
        axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        _heading(figure, picture)
        _breakdown(axes[0], picture)
        for axis, name in zip(axes[1:], panels, strict=True):
            if name == "curve":
                _curve(axis, picture.curve, picture.estimates[0])
            elif picture.course:
                _course(axis, picture.course, picture.estimates[0])
        _legend(figure, picture)
        return _saved(figure, kind, _described(picture))


def _saved(figure: Figure, kind: str, description: str) -> bytes:
    out = io.BytesIO()
    if kind == "png":
        figure.savefig(out, format="png", dpi=100, metadata={"Software": "hfvram", "Description": description})
        return out.getvalue()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": "hfvram", "Description": description})
    text = out.getvalue().decode()
    for n, name in enumerate(dict.fromkeys(_RANDOM.findall(text))):  # some are of addresses in memory
        text = text.replace(name, f"{name[0]}{n:010}")
    if kind == "svg":
        return text.encode()
    svg = text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)
    head = f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(description)}</title>\n'
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    look = "<style>body{margin:1rem}svg{width:100%;max-width:1100px;height:auto}</style>\n"
    return f"{head}{view}{look}<body>\n{svg}</body>\n</html>\n".encode()


def _described(picture: Picture) -> str:
    named = zip(picture.labels, picture.estimates, strict=True)
    told = "; ".join(f"{label}: {size(e.device_bytes)} on the device" for label, e in named)
    return printable(f"GPU memory. {told}", 2000)


def _heading(figure: Figure, picture: Picture) -> None:
    e = picture.estimates[0]
    if len(picture.estimates) == 1:
        title = f"{_text(e.model.id, 80)}\n{_text(', '.join(asked(e)), 110)}"
    else:
        title = f"GPU memory of {len(picture.estimates)} requests"
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")


def _breakdown(axis: Axes, picture: Picture) -> None:
    """A bar for each answer, up to what it takes on the device, and the capacity of the GPUs that were named."""
    whole = max(max(e.device_bytes, e.fit.capacity_bytes if e.fit else 0) for e in picture.estimates) or 1
    for row, e in enumerate(picture.estimates):
        left = 0
        for name, count in parts(e):
            axis.barh(row, count / GiB, left=left / GiB, height=0.66, color=COLOURS[name])
            if count > 0.08 * whole:
                look = {"color": "white" if name in DARK else "black", "ha": "center", "va": "center", "fontsize": 9}
                axis.text((left + count / 2) / GiB, row, size(count), **look)
            left += count
        fits = f", {'fits' if e.fit.fits else 'does not fit'}" if e.fit else ""
        axis.text((left + 0.008 * whole) / GiB, row, f"{size(e.device_bytes)}{fits}", va="center", fontsize=9, bbox=BOX)
    for gpu, capacity in dict.fromkeys((e.fit.gpu, e.fit.capacity_bytes) for e in picture.estimates if e.fit):
        axis.axvline(capacity / GiB, color=CAPACITY, linestyle="--", linewidth=1.4)
        where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "bottom", "ha": "center"}
        words = f"{_text(gpu, 30)}, {size(capacity)}"
        axis.annotate(words, (capacity / GiB, 1), (0, 2), color=CAPACITY, fontsize=9, **where)
    several = len(picture.labels) > 1
    axis.set_yticks(range(len(picture.labels)), [_text(x, 44) for x in picture.labels] if several else [""])
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.25 * whole / GiB)
    axis.set_xlabel("GiB on the device at the peak")


def _legend(figure: Figure, picture: Picture) -> None:
    """The colours of all parts that can be seen."""
    from matplotlib.patches import Patch

    told = [(parts(e), e.device_bytes) for e in picture.estimates] + [(p.parts, p.device_bytes) for p in picture.curve]
    seen = {name for found, whole in told for name, count in found if count > VISIBLE * whole}
    for category, row in (
        zip(picture.course.categories, picture.course.live_bytes, strict=True) if picture.course else ()
    ):
        seen |= {category} if max(row) > VISIBLE * picture.estimates[0].device_bytes else set()
    patches = [Patch(color=COLOURS[name], label=WORDS.get(name, name)) for name in ORDER if name in seen]
    figure.legend(handles=patches, loc="outside lower left", ncols=6, frameon=False, fontsize=9)


def _curve(axis: Axes, curve: Sequence[Point], e: Estimate) -> None:
    """Memory over the context, stacked, with what was asked and what fits."""
    from matplotlib.ticker import FuncFormatter

    lengths = [p.ctx for p in curve]
    rows = {name: [dict(p.parts).get(name, 0) / GiB for p in curve] for name in ORDER}
    rows = {name: row for name, row in rows.items() if any(row)}
    axis.stackplot(lengths, *rows.values(), colors=[COLOURS[name] for name in rows], linewidth=0)
    axis.plot(lengths, [p.device_bytes / GiB for p in curve], color="black", linewidth=1.4)
    axis.set_xscale("log", base=2)
    axis.set_xlim(lengths[0], lengths[-1])
    axis.set_ylim(0, 1.12 * max(curve[-1].device_bytes, e.device_bytes) / GiB)
    ticks = [n for n in lengths if n & (n - 1) == 0]
    axis.set_xticks(ticks, [short_tokens(n) for n in ticks])
    axis.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axis.minorticks_off()
    axis.set_xlabel("context, tokens (doubling)")
    axis.set_ylabel("GiB on the device")
    axis.set_title("Memory over the context", loc="left", fontsize=11)
    if e.request.ctx:
        here = (e.request.ctx, e.device_bytes / GiB)
        axis.plot(*here, "o", color="black")
        _note(axis, f"{e.request.ctx:,} tokens: {size(e.device_bytes)}", here, e.request.ctx * 8 > lengths[-1])
    if e.fit and e.fit.capacity_bytes < 1.12 * max(curve[-1].device_bytes, e.device_bytes):
        most = f", holds {e.fit.max_ctx:,} tokens" if e.fit.max_ctx else ""
        axis.axhline(e.fit.capacity_bytes / GiB, color=CAPACITY, linestyle="--", linewidth=1.4)
        where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "bbox": BOX}
        words = f"{_text(e.fit.gpu, 30)}, {size(e.fit.capacity_bytes)}{most}"
        axis.annotate(words, (0, e.fit.capacity_bytes / GiB), (4, 4), color=CAPACITY, fontsize=9, **where)


def _note(axis: Axes, words: str, here: tuple[float, float], left: bool) -> None:
    """Words at a point, to its left or to its right."""
    offset, side = ((-7, 8), "right") if left else ((7, 8), "left")
    axis.annotate(words, here, offset, textcoords="offset points", ha=side, fontsize=9, bbox=BOX)


def _course(axis: Axes, course: Course, e: Estimate) -> None:
    """What is live through a training step, with its phases, and its peak marked and named."""
    order = sorted(range(len(course.categories)), key=lambda i: ORDER.index(course.categories[i]))
    rows = {course.categories[i]: [n / GiB for n in course.live_bytes[i]] for i in order if any(course.live_bytes[i])}
    moments = range(len(course.live_bytes[0]))
    axis.stackplot(moments, *rows.values(), colors=[COLOURS[name] for name in rows], labels=list(rows), linewidth=0)
    top = e.peak_allocated_bytes / GiB
    axis.set_xlim(0, max(len(moments) - 1, 1))
    axis.set_ylim(0, 1.4 * top)
    for i, (at, name) in enumerate(course.phases):
        axis.axvline(at, color="black", linewidth=0.6, alpha=0.5)
        left = at > 0.8 * len(moments)
        where = {"xycoords": ("data", "axes fraction"), "va": "top", "ha": "right" if left else "left"}
        axis.annotate(f" {name} ", (at, 1.0 - 0.08 * (i % 2)), fontsize=9, **where)
    axis.plot([course.peak], [top], "v", color="black", markersize=7)
    most = WORDS.get(course.peak_category, course.peak_category)
    words = f"peak, in {course.peak_phase}: {size(e.peak_allocated_bytes)}, most of it {most}"
    _note(axis, words, (course.peak, top), course.peak > len(moments) / 2)
    axis.set_xticks([])
    axis.set_xlabel("allocations of one step, in order")
    axis.set_ylabel("GiB allocated")
    axis.set_title("A training step", loc="left", fontsize=11)


def _text(text: str, length: int) -> str:
    """A text for a picture: no control characters, no markup of matplotlib's, no longer than that."""
    return shortened(printable(text, 1000), length).replace("$", r"\$")
