"""docs/dry-run.md prints what it says; `HFVRAM_GOLDEN=1 pytest` writes its output anew."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hfvram
from hfvram.show.dry_run import WIDTH

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[1] / "docs" / "dry-run.md"


def test_the_worked_example_prints_what_it_shows(tmp_path: Path) -> None:
    text = DOCS.read_text()
    found = re.search(r"```python\n(.*?)```\n\nIt prints:\n\n```text\n(.*?)```", text, re.DOTALL)
    assert found
    code, shown = found.groups()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stderr == ""
    if os.environ.get("HFVRAM_GOLDEN"):
        DOCS.write_text(text.replace(f"```text\n{shown}```", f"```text\n{done.stdout}```"))
    elif torch.__version__.startswith("2.13."):
        assert done.stdout == shown
    assert max(map(len, done.stdout.splitlines())) <= WIDTH


def test_every_member_is_described_and_what_is_described_is_there() -> None:
    described = set(re.findall(r"^\| `run\.(\w+)", DOCS.read_text(), re.MULTILINE))
    assert described == {name for name in dir(hfvram.DryRun) if not name.startswith("_")}


def test_a_run_of_nothing_can_be_printed() -> None:
    with hfvram.dry_run() as run:
        pass
    assert run.peak_allocated_bytes == 0
    assert run.at_peak() == ()
    assert "peak allocated" in str(run)
