#!/usr/bin/env python3
"""How right the answers are, written anew: docs/accuracy.md. Needs `[dev]`, and some minutes.

    python scripts/accuracy.py [--jobs 2]

Both engines against the GPU memory that was measured (score.py), the two against each other (engines.py), and the
serving engines against figures that others published (published.py).
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import engines
import score

OUT = Path(__file__).parents[1] / "docs" / "accuracy.md"
HFVRAM = [str(Path(sys.executable).with_name("hfvram"))]
WORST, LARGEST = 10, 25
HEAD = """\
# How right it is

Written by `python scripts/accuracy.py` (`just docs`), not by hand. Errors are predicted over true, less one, in
percent; a refusal counts as 100. The `interval` of an answer is what the group's device errors below make of it
(`hfvram/answer/accuracy.json`), and its `basis` names the group.
"""
MEASURED = """\
## Against measured memory

{cases} cases that ran on one H100 80 GB, each in a process of its own (`fixtures/measured`, torch 2.11, transformers
5.17). The rules of both engines were found on cases like these: a general rule may be, a figure for one model may not.
"""
TOGETHER = """\
## The two engines held together

The formula says what the model's own code would do; here the two are compared on one published configuration of every
model type that the fixtures hold, cut to {depth} layers, each mode at small sizes: {compared:,} requests. What is live
at the peak, formula less simulation. Neither is the truth, though the simulation stands nearer to it, as the tables
above show. `tests/test_engines.py` holds a part of this in continuous integration.
"""


def measured(method: str) -> str:
    """The table of a method, and its worst cases."""
    cases = [json.loads(line) for line in score.TRUTH.read_text().splitlines()]
    said = score.answers(cases, method, HFVRAM)
    off = [(score.errors(c, said[c["id"]]), c["id"]) for c in cases]
    lines = [
        f"### By {'formula' if method == 'formula' else 'the models’ own code'}",
        "",
        score.markdown(cases, said),
        "",
    ]
    lines += ["Furthest off, allocated and reserved:", ""]
    for figures, name in sorted(off, key=lambda o: -abs(o[0]["peak_allocated"]))[:WORST]:
        why = (said[name].get("error") or {}).get("message", "")
        told = why.partition(":")[0] or f"{figures['peak_allocated']:+.2f} %, {figures['peak_reserved']:+.2f} %"
        lines.append(f"- `{name}`: {told}")
    return "\n".join(lines)


def together(found: list[engines.Difference]) -> str:
    """Errors by mode, the largest differences, and what is not compared."""
    compared = [d for d in found if not d.why]
    lines = [TOGETHER.format(depth=engines.DEPTH, compared=len(compared))]
    lines += ["| | types | requests | allocated: median | 95 % | max | reserved: median | 95 % |"]
    lines += ["| --- |" + " ---: |" * 7]
    for mode in engines.GRID:
        of = [d for d in compared if d.mode == mode]
        if of:
            allocated, reserved = (score.summary([getattr(d, n) for d in of]) for n in ("allocated", "reserved"))
            cells = [len({d.model_type for d in of}), len(of)]
            cells += [f"{allocated[k]:.2f}" for k in ("median", "p95", "max")]  # type: ignore[misc]
            cells += [f"{reserved[k]:.2f}" for k in ("median", "p95")]  # type: ignore[misc]
            lines.append(f"| {mode} | " + " | ".join(map(str, cells)) + " |")
    lines += ["", "The largest differences, one for each type and mode:", ""]
    lines += ["| type | request | allocated | most of it |", "| --- | --- | ---: | --- |"]
    told: set[tuple[str, str]] = set()
    for d in sorted(compared, key=lambda d: -abs(d.allocated)):
        if (d.model_type, d.mode) not in told and len(told) < LARGEST:
            told.add((d.model_type, d.mode))
            size = f"{d.category} {d.category_bytes / 2**20:+,.1f} MiB"
            if d.mode == "inference" and d.model_type in engines.KNOWN:
                size += f": {engines.KNOWN[d.model_type][1]}"
            lines.append(f"| {d.model_type} | {d.mode}, {d.options} | {d.allocated:+.2f} % | {size} |")
    whys = Counter((d.mode, d.why.partition(":")[0]) for d in found if d.why)
    lines += ["", "Not compared:", ""]
    for (mode, why), count in sorted(whys.items()):
        kinds = sorted({d.model_type for d in found if d.mode == mode and d.why.startswith(why)})
        lines.append(f"- {mode}: {count} requests, {why} ({', '.join(kinds)})")
    return "\n".join(lines)


def published() -> str:
    """The serving engines' table."""
    script = Path(__file__).with_name("published.py")
    done = subprocess.run([sys.executable, str(script), "--markdown"], capture_output=True, text=True, check=True)
    return "## Against what serving engines print\n\n" + done.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    jobs = parser.parse_args().jobs
    cases = len(score.TRUTH.read_text().splitlines())
    parts = [HEAD, MEASURED.format(cases=cases), measured("formula"), "", measured("simulate"), ""]
    parts += [together(list(engines.differences([], jobs))), "", published(), ""]
    OUT.write_text("\n".join(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
