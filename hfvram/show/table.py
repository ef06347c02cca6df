"""Several answers beside each other: models, or the cells of a grid of options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hfvram.answer.estimate import Estimate
from hfvram.answer.ranking import ranking
from hfvram.errors import HfvramError
from hfvram.show.layout import Paint, columns, plain, shortened, size
from hfvram.show.markdown import table as markdown_table
from hfvram.units import short_count

SPARED = ("allocated", "params", "cache", "weights")
"""Columns that a narrow terminal is spared, in this order."""
LEAST_NAME = 12


@dataclass(frozen=True, slots=True)
class Row:
    """One answer or failure, and those of the options asked in which it differs from the others."""

    model: str
    differs: Mapping[str, str]
    answer: Estimate | HfvramError


def table(rows: Sequence[Row], width: int, paint: Paint = plain) -> str:
    """The rows in columns; the smallest GPU (and on it the smallest answer) that fits is marked."""
    rows, best = ranked(rows)
    heading, cells = figures(rows, best)
    align = _align(rows, heading)
    for name in ("", *SPARED):  # first all of it
        if name:
            at = heading.index(name)
            heading, align = heading[:at] + heading[at + 1 :], align[:at] + align[at + 1 :]
            cells = [r[:at] + r[at + 1 :] for r in cells]
        others = sum(2 + max(len(r[i]) for r in [heading, *cells]) for i in range(1, len(heading)))
        if others + min(LEAST_NAME, max(len(r[0]) for r in cells)) <= width:
            break
    left = max(LEAST_NAME, width - others)
    if max(len(r[0]) for r in cells) > left:
        cells = [(shortened(r[0].rpartition("/")[2], left), *r[1:]) for r in cells]
    lines = columns([(*r, "") for r in [heading, *cells]], width, align + "<")
    body = [
        paint(line, "red" if isinstance(r.answer, HfvramError) else "green" if i == best else "white")
        for i, (r, line) in enumerate(zip(rows, lines[1:], strict=True))
    ]
    return "\n".join([paint(lines[0], "bold"), *body])


def markdown(rows: Sequence[Row]) -> str:
    """The same table in markdown."""
    rows, best = ranked(rows)
    heading, cells = figures(rows, best)
    return markdown_table(heading, cells, _align(rows, heading))


def ranked(rows: Sequence[Row]) -> tuple[list[Row], int | None]:
    """The rows as they are shown, and which of them is the cheapest that fits."""
    found = ranking([row.answer for row in rows])
    return [rows[i] for i in found.order], None if found.cheapest is None else 0


def figures(rows: Sequence[Row], best: int | None) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heading and cells, each row of them of equal length."""
    heading: tuple[str, ...] = ("model", *(n.replace("_", " ") for n in rows[0].differs))
    cells: list[tuple[str, ...]] = []
    for i, row in enumerate(rows):
        e = row.answer
        start = (row.model if isinstance(e, HfvramError) else e.model.id, *row.differs.values())
        if isinstance(e, HfvramError):
            cells.append((*start, "", "", "", "", "", e.kind.replace("_", " ")))
            continue
        sizes = (e.weights_bytes, e.cache_bytes, e.peak_allocated_bytes, e.device_bytes)
        verdict = ("cheapest" if i == best else "yes" if e.fit.fits else "no") if e.fit else ""
        cells.append((*start, short_count(e.model.parameters), *map(size, sizes), verdict))
    heading = (*heading, "params", "weights", "cache", "allocated", "device", "fits")
    told = any(row[-1] for row in cells)
    return (heading, cells) if told else (heading[:-1], [row[:-1] for row in cells])


def _align(rows: Sequence[Row], heading: Sequence[str]) -> str:
    return ("<" * (1 + len(rows[0].differs)) + ">>>>><")[: len(heading)]
