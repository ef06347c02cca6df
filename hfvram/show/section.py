"""A section of a text file that hfvram keeps up to date between two markers; every other byte stays as it is."""

import contextlib
import os
import re
import stat
import tempfile
from collections.abc import Iterator

from hfvram.errors import HfvramError, printable

START = "<!-- hfvram:start -->"
END = "<!-- hfvram:end -->"
MOST_BYTES = 10**7

MARKER = re.compile(rb"<!--[ \t]*hfvram:(start|end)[ \t]*-->", re.IGNORECASE)
FENCE = re.compile(rb" {0,3}(`{3,}|~{3,})([^\n]*)")
TICKS = re.compile(rb"`+")
BOM = b"\xef\xbb\xbf"


def updated(data: bytes, section: str, name: str) -> bytes:
    """The file's bytes with the section between its markers, or at its end where there are none.

    Lines of the section end as the file's do. Markers in code and in front matter are text. Raises `io` where markers
    are broken or doubled, or the file is no UTF-8.
    """
    name = printable(name, 200)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise HfvramError("io", f"{name} is not UTF-8 text: it was left as it is") from None
    if "\0" in text:
        raise HfvramError("io", f"{name} is not text: it was left as it is")
    line_end = "\r\n" if text.count("\r\n") * 2 > text.count("\n") else "\n"
    new = section.replace("\n", line_end).encode()
    if found := _between(data, name):
        start, end = found
        return data[:start] + new + data[end:]
    gap = line_end.encode()
    if data in (b"", BOM):
        return data + new + gap
    before = b"" if data.endswith((b"\n\n", b"\r\n\r\n")) else gap if data.endswith(b"\n") else gap + gap
    return data + before + new + gap


def _between(data: bytes, name: str) -> tuple[int, int] | None:
    """From the start of the first marker to the end of the second, None where there is neither."""
    found = [(m[1].lower(), m.start(), m.end()) for m in MARKER.finditer(_without_code(data))]
    if not found:
        return None
    kinds = [kind for kind, _, _ in found]
    if kinds == [b"start", b"end"]:
        return found[0][1], found[1][2]
    at = [(kind.decode(), data[:start].count(b"\n") + 1) for kind, start, _ in found[:8]]
    lines = ", ".join(f"{kind} in line {line}" for kind, line in at)
    what = "broken" if len(found) == 1 or kinds == [b"end", b"start"] else "doubled"
    wanted = f"leave one {START} and after it one {END}, or none of them"
    raise HfvramError("io", f"{name} has {what} hfvram markers ({lines}): {wanted}; it was left as it is")


def _without_code(data: bytes) -> bytes:
    """As many bytes, blank where there is front matter or code. A fence that is never closed is none."""
    lines = data.split(b"\n")
    skipped: set[int] = set()
    first = 0
    if lines[0].removeprefix(BOM).rstrip() == b"---":
        first = next((i for i, line in enumerate(lines[1:], 1) if line.rstrip() in (b"---", b"...")), 0)
        skipped.update(range(first))
    opened, fence = 0, b""
    for i, line in enumerate(lines[first:], first):
        if not (m := FENCE.match(line)):
            continue
        if not fence and not (m[1][:1] == b"`" and b"`" in m[2]):
            opened, fence = i, m[1]
        elif fence and m[1].startswith(fence) and not m[2].strip():
            skipped.update(range(opened, i + 1))
            fence = b""
    kept = (b" " * len(line) if i in skipped else _without_spans(line) for i, line in enumerate(lines))
    return b"\n".join(kept)


def _without_spans(line: bytes) -> bytes:
    """A line, blank where it has code between backticks."""
    if b"`" not in line or not MARKER.search(line):
        return line
    runs = [(m.start(), m.end()) for m in TICKS.finditer(line)]
    while runs:
        start, end = runs.pop(0)
        closing = next((i for i, (a, b) in enumerate(runs) if b - a == end - start), None)
        if closing is not None:
            stop = runs[closing][1]
            line = line[:start] + b" " * (stop - start) + line[stop:]
            del runs[: closing + 1]
    return line


def write(path: str, section: str) -> bool:
    """Keep the section in a file; False where nothing changes, and then nothing is written.

    The new file takes the old one's place at once, so that there is never half of one. Raises `io`.
    """
    shown = printable(path, 200)
    with _told(shown):
        target = os.path.realpath(path)
        mode = os.stat(target).st_mode
        if not stat.S_ISREG(mode):
            raise HfvramError("io", f"{shown} is no regular file")
        if not mode & 0o222 or not os.access(target, os.W_OK):
            raise HfvramError("io", f"{shown} is read-only: it was left as it is")
        if os.stat(target).st_size > MOST_BYTES:
            raise HfvramError("io", f"{shown} is larger than {MOST_BYTES // 10**6} MB: it was left as it is")
        with open(target, "rb") as f:
            data = f.read()
        new = updated(data, section, path)
        if new == data:
            return False
        handle, scratch = tempfile.mkstemp(dir=os.path.dirname(target), prefix=".hfvram-", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as f:
                f.write(new)
                f.flush()
                os.fsync(f.fileno())
            os.chmod(scratch, stat.S_IMODE(mode))
            os.replace(scratch, target)
        except BaseException:
            os.unlink(scratch)
            raise
    return True


@contextlib.contextmanager
def _told(shown: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise HfvramError("io", f"there is no file {shown}: create it, or leave --write out to print") from None
    except (OSError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        raise HfvramError("io", f"{shown} can't be written: {why}; it was left as it is") from None
