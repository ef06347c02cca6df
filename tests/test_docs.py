"""docs/guide.md says what hfvram answers now."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_guide_set_straight_is_written_by_hfvram_itself() -> None:
    """`just docs` writes it anew."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "guide.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
