"""The line that says what takes so long: on a terminal, after a second, and gone in the end."""

import os
import pty
import subprocess
import sys
from pathlib import Path

SLOW = (
    "import sys, time; from hfvram.show.progress import waiting\nwith waiting({what!r}, quiet={quiet}): time.sleep({s})"
)


def on_a_terminal(seconds: float, *, quiet: bool = False) -> str:
    """What a process writes whose stderr is a terminal."""
    ours, theirs = pty.openpty()
    code = SLOW.format(what="reading x/y", quiet=quiet, s=seconds)
    with subprocess.Popen([sys.executable, "-c", code], stderr=theirs, cwd=Path(__file__).parents[1]) as process:
        os.close(theirs)
        written = b""
        try:
            while some := os.read(ours, 4096):
                written += some
        except OSError:  # Linux says so where the other end is closed
            pass
        finally:
            os.close(ours)
    assert process.returncode == 0
    return written.decode()


def test_a_line_after_a_second_and_wiped_in_the_end() -> None:
    written = on_a_terminal(1.3)
    assert written.startswith("\r\x1b[Khfvram: reading x/y, 1 s …")
    assert written.endswith("\r\x1b[K")


def test_nothing_for_what_is_quick_or_quiet() -> None:
    assert on_a_terminal(0.1) == ""
    assert on_a_terminal(1.3, quiet=True) == ""


def test_nothing_where_there_is_no_terminal() -> None:
    code = SLOW.format(what="x", quiet=False, s=1.3)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
