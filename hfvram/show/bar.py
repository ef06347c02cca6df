"""The peak as a stacked bar of the terminal's width, in colours, or in letters where there are none."""

from itertools import groupby

from hfvram.answer.estimate import Estimate
from hfvram.answer.parts import parts
from hfvram.errors import printable
from hfvram.show.layout import Paint, plain, size

COLOURS = {
    "weights": "blue",
    "buffers": "bright_blue",
    "cache": "green",
    "gradients": "yellow",
    "optimizer": "magenta",
    "activations": "cyan",
    "inputs": "bright_magenta",
    "workspace": "bright_yellow",
    "rounding": "bright_white",
    "allocator": "bright_black",
    "CUDA": "white",
    "free": "bright_black",
    "limit": "red",
}
LETTERS = {
    "weights": "W",
    "buffers": "B",
    "cache": "C",
    "gradients": "G",
    "optimizer": "O",
    "activations": "A",
    "inputs": "I",
    "workspace": "S",
    "rounding": "r",
    "allocator": "-",
    "CUDA": "x",
}
FREE, LIMIT = "free", "limit"


def bar(e: Estimate, width: int, paint: Paint) -> list[str]:
    """The bar, and what its colours or letters are; up to the capacity where a GPU is named, which is marked where the
    answer is more than that."""
    capacity = e.fit.capacity_bytes if e.fit else 0
    whole = max(e.device_bytes, capacity) or 1
    coloured = paint is not plain
    signs = dict.fromkeys(LETTERS, "█") | {FREE: "░", LIMIT: "┃"} if coloured else LETTERS | {FREE: ".", LIMIT: "|"}
    names: list[str] = []
    used = 0
    for name, count in parts(e):
        used += count
        names += [name] * (round(used * width / whole) - len(names))
    names += [FREE] * (width - len(names))
    told = dict(zip(names, names, strict=True))
    if e.fit and capacity < e.device_bytes:
        names[min(round(capacity * width / whole), width - 1)] = LIMIT
        told[LIMIT] = f"{printable(e.fit.gpu, 40)}, {size(capacity)}"
    runs = ((name, len(list(cells))) for name, cells in groupby(names))
    drawn = "".join(paint(signs[name] * count, COLOURS[name]) for name, count in runs)
    return [drawn, *_legend([(name, signs[name], words) for name, words in told.items()], width, paint)]


def _legend(told: list[tuple[str, str, str]], width: int, paint: Paint) -> list[str]:
    """Signs and what they are, side by side in lines of at most that width."""
    lines, length = [""], 0
    for name, sign, words in told:
        needed = len(sign) + 1 + len(words)
        if length and length + 3 + needed > width:
            lines, length = [*lines, ""], 0
        gap = "   " if length else ""
        lines[-1] += f"{gap}{paint(sign, COLOURS[name])} {words}"
        length += len(gap) + needed
    return lines
