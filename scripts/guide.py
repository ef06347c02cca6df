#!/usr/bin/env python3
"""The guide that the project comes from, each of its numbers beside the true one: docs/guide.md, by hfvram itself.

    python scripts/guide.py [--check]

A row is what the guide claims (`guide_rows.py`, in our words), what hfvram answers to the commands that show it, and
why the two differ. Every figure is computed here and now, by formula, without torch. `--check` writes nothing, and
exits 1 where the document is another.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "guide.md"
HEAD = """\
# The guide, set straight

hfvram comes from a guide to estimating GPU memory whose rules many people quote. This page sets each of its numbers
beside the true one. `python scripts/guide.py` (`just docs`) writes it from hfvram's own answers, by formula, without
torch; [accuracy.md](accuracy.md) says how near those come to memory that was measured. The commands run in the
project's folder and print the figures of their row (where torch is installed, add `--method formula` to training).

GB are 10^9 bytes, as the guide seems to mean them. "On a GPU" is what the device shows: live tensors, what PyTorch's
allocator holds beside them, CUDA context and kernels. Sizes are those of three configurations in
`fixtures/configs/guide`, with 2,048 tokens, batch 1 and bf16 unless a row says otherwise:

{models}

The rules as the guide has them stay at hand: `--method guide` answers with them alone, and every answer shows them as
"rule of thumb".
"""


def document() -> str:
    """The whole page."""
    from guide_rows import MODELS, SECTIONS, Answers

    answers = Answers(ROOT)
    models = "\n".join(f"- `{name}`: {what(answers)}" for name, what in MODELS.items())
    lines = [HEAD.format(models=models)]
    for title, intro, rows in SECTIONS:
        lines += [f"## {title}", ""]
        lines += [intro, ""] if intro else []
        lines += ["| the guide | true | why | command |", "| --- | --- | --- | --- |"]
        lines += [f"| {' | '.join(_cells(row, answers))} |" for row in rows] + [""]
    return "\n".join(lines)


def _cells(row: tuple[str, ...], answers: object) -> Iterator[str]:
    claim, true, why, *commands = row
    found = [answers(command) for command in commands]  # type: ignore[operator]
    yield claim
    yield true(*found) if callable(true) else true
    yield why
    yield "<br>".join(f"`hfvram {command}`" for command in commands).replace("|", "\\|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.chdir(ROOT)
    page = document()
    if check:
        return int(not OUT.is_file() or OUT.read_text() != page)
    OUT.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
