"""A line on stderr while an answer takes longer than a second: what is being done, and for how long."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

PATIENCE_S = 1.0
CLEAR = "\r\x1b[K"


@contextlib.contextmanager
def waiting(what: str, *, quiet: bool = False) -> Iterator[None]:
    """Show `what` and the seconds so far on a terminal, and wipe the line in the end; nothing where it is none."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    done = threading.Event()
    line = threading.Thread(target=_tell, args=(what, done), daemon=True)
    line.start()
    try:
        yield
    finally:
        done.set()
        line.join()


def _tell(what: str, done: threading.Event) -> None:
    start = time.monotonic()
    wait, shown = PATIENCE_S, False
    while not done.wait(wait):
        sys.stderr.write(f"{CLEAR}hfvram: {what}, {time.monotonic() - start:.0f} s …")
        sys.stderr.flush()
        wait, shown = 0.5, True
    if shown:
        sys.stderr.write(CLEAR)
        sys.stderr.flush()
