"""`hfvram measure`: predicted against measured, on the local GPU or from a log."""

from collections.abc import Sequence
from typing import Any

from hfvram.answer.from_log import Compared, LogAnswer
from hfvram.answer.measured import Beside, Measurement
from hfvram.errors import HfvramError, printable
from hfvram.show.json import dumps
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


def log_text(found: LogAnswer, output: set[str], width: int) -> str:
    """The answer as JSON or a table."""
    return dumps(found.to_dict()) if "json" in output else log_table(found, width)


def on_gpu(
    models: Sequence[str], given: dict[str, Any], source: dict[str, Any], save: str | None, snapshot: str | None
) -> Measurement:
    """The request, measured on this machine's GPU; `save` gets a line of it. Raises `no_gpu` without one."""
    from hfvram.answer.from_files import understood
    from hfvram.answer.measured import measure
    from hfvram.memory.measure.run import ready
    from hfvram.request import Request

    ready()
    model, asked, revision, notes = understood(models[0] if models else None, given)
    if not model or len(models) > 1:
        raise HfvramError("usage", "one model at a time is measured, as in: hfvram measure gpt2 --mode train --ctx 1k")
    source |= {"revision": revision} if revision and "revision" not in source else {}
    found = measure(model, Request.from_dict(asked), snapshot=snapshot, notes=notes, **source)
    if save:
        append(save, found.line())
    return found


def append(path: str, line: dict[str, Any]) -> None:
    """A line more in a file of measured cases. Raises `io`."""
    import json

    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
    except OSError as error:
        raise HfvramError("io", f"{path}: {error.strerror}") from None


def gpu_table(found: Measurement, width: int) -> str:
    """Predicted and measured, a row a figure."""
    e, m = found.estimate, found.measured
    heading = f"{printable(e.model.id)} ({e.request.mode}, ctx {e.request.ctx:,}, batch {e.request.batch:,})"
    where = ", ".join(f"{name} {version}" if name != "device" else version for name, version in m.environment.items())
    rows = [("", "predicted", "measured", "difference", "")]
    for b in found.beside:
        name = b.name if b.kind != "phase" else f"phase: {b.name}"
        rows.append((name, _bytes(b.predicted_bytes), _bytes(b.measured_bytes), _percent(b), ""))
    return "\n".join([heading, printable(where), "", *columns(rows, width, "<>>><")])


def _bytes(count: int | None) -> str:
    return "-" if count is None else gib(count)


def _percent(b: Beside) -> str:
    if b.predicted_bytes is None or not b.measured_bytes:
        return ""
    if b.predicted_bytes == b.measured_bytes:
        return "exact"
    return f"{100 * (b.predicted_bytes - b.measured_bytes) / b.measured_bytes:+.2f} %"


def gpu_text(found: Measurement, output: set[str], width: int) -> str:
    """The answer as JSON or a table, with `--explain` PyTorch's own summary below it."""
    text = dumps(found.to_dict()) if "json" in output else gpu_table(found, width)
    return f"{text}\n\n{found.measured.summary}" if "explain" in output else text
