"""Figures with their unit, and text in columns: what the text renderers share."""

from collections.abc import Callable, Sequence
from textwrap import wrap

from hfvram.errors import printable
from hfvram.units import GiB, gib

Paint = Callable[[str, str], str]
"""A text and a colour's name to the text in that colour, or to itself."""


def plain(text: str, colour: str) -> str:
    """The text as it is: no terminal, or one without colours."""
    return text


def coloured(text: str, colour: str) -> str:
    """The text in a colour of the terminal, or in `bold`."""
    import click

    return click.style(text, fg=colour if colour != "bold" else None, bold=colour == "bold" or None)


def size(count: int) -> str:
    """Bytes for the eye: one decimal from a GiB on.

    >>> size(93405585408), size(1073610752), size(500 << 20)
    ('87.0 GiB', '1.0 GiB', '0.49 GiB')
    """
    return gib(count, 1 if count >= 0.95 * GiB else 2)


def columns(rows: Sequence[Sequence[str]], width: int, align: str, indent: int = 0) -> list[str]:
    """Rows as lines of at most `width`: `align` has `<` or `>` for each column, the last column is wrapped,
    control characters are made visible.

    >>> columns([("weights", "87.0 GiB", "two words of it"), ("x", "1 B", "d")], 33, "<><")
    ['weights  87.0 GiB  two words of', '                   it', 'x             1 B  d']
    """
    rows = [[printable(cell, 10_000) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(align) - 1)] if rows else []
    start = indent + sum(w + 2 for w in widths)
    lines = []
    for row in rows:
        cells = [f"{cell:{a}{w}}" for cell, a, w in zip(row, align, widths, strict=False)]
        last = wrap(row[-1], max(12, width - start), break_on_hyphens=False) or [""]
        lines.append((" " * indent + "  ".join([*cells, last[0]])).rstrip())
        lines.extend(" " * start + line for line in last[1:])
    return lines


def shortened(text: str, length: int) -> str:
    """A text cut in its middle, so that both the start and the end of a model's name can be read.

    >>> shortened("mistralai/Mixtral-8x7B-v0.1", 20)
    'mistralai/…8x7B-v0.1'
    """
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return text[: length - 1 - half] + "…" + text[len(text) - half :]
