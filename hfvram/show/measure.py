"""`hfvram measure`: predicted against measured, on the local GPU or from a log."""

from collections.abc import Sequence
from typing import Any

import click

from hfvram.answer.from_log import Compared, LogAnswer
from hfvram.errors import HfvramError, printable
from hfvram.show.layout import columns
from hfvram.units import gib


def from_log(path: str, models: Sequence[str], given: dict[str, Any], source: dict[str, Any]) -> LogAnswer:
    """The log's figures against the estimate of the model, which the log may name, too."""
    from hfvram.answer.from_files import understood
    from hfvram.answer.from_log import against

    if len(models) > 1:
        raise HfvramError("usage", "--read-log is set against one model at a time")
    model, asked, revision, notes = understood(models[0] if models else None, given)
    source |= {"revision": revision} if revision and "revision" not in source else {}
    return against(path, model, asked, notes, **source)


def log_table(found: LogAnswer, width: int) -> str:
    """The log's figures, a row each: where it stands, what it says, what the estimate says, and the difference."""
    e = found.estimate
    heading = f"{found.log.engine}: {len(found.log.printed)} figures"
    against = f", against {printable(e.model.id)} ({e.request.mode}, ctx {e.request.ctx:,})" if e else ""
    rows = [("figure", "line", "log", "estimate", "difference", "")]
    for c in found.compared:
        line = str(c.line) if c.line else "sum"
        rows.append((c.name, line, c.printed, _amount(c, c.estimated), difference(c), c.why))
    return "\n".join([heading + against, "", *columns(rows, width, "<>>>><")])


def difference(c: Compared) -> str:
    """In percent of the log's figure; `as printed` where it is the same within the last digit."""
    if c.estimated is None:
        return ""
    if c.exact:
        return "as printed"
    return f"{100 * (c.estimated - c.logged) / c.logged:+.2f} %" if c.logged else ""


def _amount(c: Compared, value: int | float | None) -> str:
    if value is None:
        return "-"
    if c.unit != "bytes":
        return f"{value:,}"
    return f"{value:,} B" if c.name == "cache a token" else gib(value)


def echo_log(found: LogAnswer, output: set[str], width: int) -> None:
    """The answer to stdout, as JSON or a table."""
    from hfvram.show.json import dumps

    click.echo(dumps(found.to_dict()) if "json" in output else log_table(found, width))
