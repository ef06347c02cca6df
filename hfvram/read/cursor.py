"""A position in a file of which only parts are fetched, wherever it lies: what is passed is not read."""

from collections.abc import Callable, Sequence
from typing import Final

Span = tuple[int, int]
Fetch = Callable[[Sequence[Span]], list[bytes]]
"""Bytes of spans (start, stop), fewer where the file ends."""

MOST_BYTES: Final = 64 << 20
"""Fetched of one file. No header is as long."""


class Truncated(Exception):
    """The file ends, or too much of it was asked for."""


class Cursor:
    """Reads forward. `size` is the whole file's where known; `step` bytes are fetched first, twice as many each time
    after that, up to `largest`."""

    def __init__(self, fetch: Fetch, size: int | None, *, step: int, largest: int, leaps: bool = False) -> None:
        self.at = 0
        self.size = size
        self.leaps = leaps
        self.buffer = b""
        self.begin = 0
        """Where in the file the buffer begins."""
        self._fetch = fetch
        self._step = self._first = step
        self._largest = largest
        self._left = MOST_BYTES

    def again(self) -> "Cursor":
        """From the start, without leaps."""
        return Cursor(self._fetch, self.size, step=1 << 20, largest=1 << 20)

    def take(self, count: int) -> bytes:
        """The next bytes. Raises `Truncated` where there are not as many."""
        self.want(count)
        start = self.at - self.begin
        if len(self.buffer) - start < count:
            raise Truncated
        self.at += count
        return self.buffer[start : start + count]

    def skip(self, count: int) -> None:
        """Go on without reading."""
        self.at += count

    def want(self, count: int) -> None:
        """Have as many of the next bytes in the buffer as there are."""
        have = self.begin + len(self.buffer)
        if self.begin <= self.at and self.at + count <= have:
            return
        if count > self._left:
            raise Truncated
        start = self.at if not self.begin <= self.at <= have else have
        kept = self.buffer[self.at - self.begin :] if start == have else b""
        stop = max(self.at + count, start + self._step)
        self._step = min(self._step * 2, self._largest)
        self.buffer = kept + self.read([(start, stop)])[0]
        self.begin = start - len(kept)

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        """Parts from anywhere, all at once; the position stays. Raises `Truncated` past the bound."""
        bound = self.size if self.size is not None else 1 << 62
        spans = [(min(start, bound), min(stop, bound)) for start, stop in spans]
        self._left -= sum(stop - start for start, stop in spans)
        if self._left < 0:
            raise Truncated
        return self._fetch(spans) if any(stop > start for start, stop in spans) else [b"" for _ in spans]
