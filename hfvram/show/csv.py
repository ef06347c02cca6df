"""Answers as comma-separated values: one row each, whole bytes, the JSON's names."""

import csv as stdlib_csv
import io
from collections.abc import Sequence

from hfvram.errors import HfvramError, printable
from hfvram.show.table import Row, ranked

REQUEST = ("mode", "ctx", "batch", "quant", "kv_dtype", "gpus", "gpu")
TOTALS = ("weights_bytes", "cache_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes")
PEAKS = ("peak_allocated_bytes", "peak_reserved_bytes", "device_bytes", "cpu_bytes", "nvme_bytes", "disk_bytes")


def csv(rows: Sequence[Row]) -> str:
    """A heading and the rows; an answer that failed has the kind of its error in the last column."""
    out = io.StringIO()
    writer = stdlib_csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "commit", "parameters", *REQUEST, *TOTALS, *PEAKS, "fits", "cheapest", "error_kind"])
    rows, best = ranked(rows)
    for i, row in enumerate(rows):
        e = row.answer
        if isinstance(e, HfvramError):
            asked = [row.differs.get(name, "") for name in REQUEST]
            writer.writerow([printable(row.model), "", "", *asked, *[""] * len(TOTALS + PEAKS), "", "", e.kind])
            continue
        asked = [getattr(e.request, name) for name in REQUEST]
        sizes = [getattr(e, name) for name in TOTALS + PEAKS]
        fits = e.fit.fits if e.fit else ""
        writer.writerow(
            [
                printable(e.model.id),
                e.model.commit,
                e.model.parameters,
                *asked,
                *sizes,
                fits,
                i == best if e.fit else "",
                "",
            ]
        )
    return out.getvalue().rstrip("\n")
