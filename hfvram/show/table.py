"""Several answers beside each other: models, or the cells of a grid of options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hfvram.answer.estimate import Estimate
from hfvram.errors import HfvramError
from hfvram.show.layout import Paint, columns, plain, shortened, size
from hfvram.show.markdown import table as markdown_table
from hfvram.units import short_count


@dataclass(frozen=True, slots=True)
class Row:
    """One answer or failure, and those of the options asked in which it differs from the others."""

    model: str
    differs: Mapping[str, str]
    answer: Estimate | HfvramError


def table(rows: Sequence[Row], width: int, paint: Paint = plain) -> str:
    """The rows in columns; the smallest GPU (and on it the smallest answer) that fits is marked."""
    heading, cells = figures(rows)
    left = max(12, width - sum(2 + max(len(r[i]) for r in [heading, *cells]) for i in range(1, len(heading))))
    if max(len(r[0]) for r in cells) > left:
        cells = [(shortened(r[0].rpartition("/")[2], left), *r[1:]) for r in cells]
    lines = columns([(*r, "") for r in [heading, *cells]], width, _align(rows) + "<")
    best = cheapest(rows)
    body = [
        paint(line, "red" if isinstance(r.answer, HfvramError) else "green" if i == best else "white")
        for i, (r, line) in enumerate(zip(rows, lines[1:], strict=True))
    ]
    return "\n".join([paint(lines[0], "bold"), *body])


def markdown(rows: Sequence[Row]) -> str:
    """The same table in markdown."""
    heading, cells = figures(rows)
    return markdown_table(heading, cells, _align(rows))


def figures(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heading and cells, each row of them of equal length."""
    heading = ("model", *(n.replace("_", " ") for n in rows[0].differs))
    best = cheapest(rows)
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
    return (*heading, "params", "weights", "cache", "allocated", "device", "fits"), cells


def cheapest(rows: Sequence[Row]) -> int | None:
    """The row that fits on the smallest GPU in the least memory; None where none fits."""
    fitting = [
        (e.fit.capacity_bytes, e.device_bytes, i)
        for i, e in enumerate(row.answer for row in rows)
        if not isinstance(e, HfvramError) and e.fit and e.fit.fits
    ]
    return min(fitting)[2] if fitting else None


def _align(rows: Sequence[Row]) -> str:
    return "<" * (1 + len(rows[0].differs)) + ">>>>>" + "<"
