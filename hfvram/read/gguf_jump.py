"""A tokenizer's long arrays of strings are passed without reading them, where reading is dear.

Nothing says where such an array ends but the lengths of all its strings. But strings can be told from all else: eight
bytes of length, that many bytes, and again a length. So parts further on are looked at, until one is found where the
strings end; from the last part that still lies among strings they are walked to the end, where a key follows, or the
first tensor. What this finds is held against the size of the file afterwards (`gguf.py`).
"""

import re
import struct
from typing import Final

from hfvram.read.cursor import Cursor

PLAIN_BYTES: Final = 128 << 10
"""So much of an array is walked and not leapt over."""
PART_BYTES: Final = 4 << 10
NEAR_BYTES: Final = 64 << 10
"""The end is walked to from no further than this."""
LONGEST: Final = 4_096
"""No token is longer."""
FEWEST: Final = 8
"""Strings in a row by which they are known."""
GUESSES: Final = (0.6, 0.9, 1.1, 1.35, 1.7, 2.5)
"""Where the end may be, as parts of what the strings read so far make likely."""
PARTS: Final = 6

_LENGTH = re.compile(rb"[\x01-\xff][\x00-\x0f]\x00{6}")
_KEY = re.compile(rb"[a-z][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)+")
_USUAL = (b"tokenizer.", b"general.", b"split.", b"quantize.")


def leap(c: Cursor, count: int) -> bool:
    """Pass an array of strings; whether some of it was not read. Raises `Truncated`."""
    left, start, length = count, c.at, struct.Struct("<Q").unpack_from
    while left:
        c.want(8)
        buffer, at = c.buffer, c.at - c.begin
        last = len(buffer) - 8
        while left and at <= last:
            at += 8 + length(buffer, at)[0]
            left -= 1
        walked = c.begin + at
        if walked == c.at:
            c.take(8)  # the file ends
        c.skip(walked - c.at)
        if c.size is not None and walked > c.size:
            c.take(1)
        likely = left * (c.at - start) // (count - left)
        if c.leaps and likely > PLAIN_BYTES and c.size is not None:
            if (end := find_end(c, c.at, likely)) is not None:
                c.skip(end - c.at)
                return True
            c.leaps = False  # another try would find no more
    return False


def find_end(c: Cursor, begin: int, likely: int) -> int | None:
    """Where the strings that go on at `begin`, for `likely` bytes, end; None where that can't be told."""
    low, high = begin, c.size or 0
    ends = [begin + int(likely * part) for part in GUESSES]
    for _ in range(6):
        ends = sorted({e for e in ends if low < e < high})
        parts = c.read([(e, min(e + PART_BYTES, high)) for e in ends])
        for at, part in zip(ends, parts, strict=True):
            if synced(part) is None:
                high = at
                break
            low = at
        if high - low <= NEAR_BYTES:
            break
        if high == c.size and low + likely < high:
            ends = [low + likely * k for k in (1, 2, 4, 8, 16)]
        else:
            ends = [low + (high - low) * k // (PARTS + 1) for k in range(1, PARTS + 1)]
    if high - low > 2 * NEAR_BYTES:
        return None
    part = c.read([(low, high + 2 * PART_BYTES)])[0]
    first = 0 if low == begin else synced(part[:PART_BYTES])
    return None if first is None or (end := key_after(part, first)) is None else low + end


def key_after(part: bytes, at: int) -> int | None:
    """Where the first key after the string at `at` begins, None where there is none, or no string."""
    while at + 8 <= len(part):
        length = int.from_bytes(part[at : at + 8], "little")
        if length > LONGEST:
            return None
        if is_key(part[at + 8 : at + 8 + length], part[at + 8 + length : at + 16 + length]):
            return at
        at += 8 + length
    return None


def synced(part: bytes) -> int | None:
    """Where in a part of a file the first string begins, None where it isn't made of strings."""
    for tried, found in enumerate(_LENGTH.finditer(part)):
        if tried == 64:
            break
        at, seen, empty = found.start(), 0, 0
        while at + 8 <= len(part):
            length = int.from_bytes(part[at : at + 8], "little")
            if length > LONGEST:
                break
            # a key or a tensor's name among them is the array's end
            if is_key(part[at + 8 : at + 8 + length], part[at + 8 + length : at + 16 + length]):
                return None
            at, seen, empty = at + 8 + length, seen + 1, empty + (not length)
        else:
            if seen >= FEWEST and empty * 2 < seen:
                return found.start()
    return None


def is_key(name: bytes, after: bytes) -> bool:
    """Whether a string is the key of a pair or the name of a tensor, by what follows it: a type, not a length."""
    if len(after) < 8 or not _KEY.fullmatch(name):
        return False
    low, high = struct.unpack("<II", after)
    return low <= 12 and (high != 0 or name.startswith(_USUAL))


def starts_tensors(c: Cursor) -> bool:
    """Whether the first tensor is described here: a name, up to four sizes, a type, and the place 0."""
    c.want(512)
    raw = c.buffer[c.at - c.begin :][:512]
    length = int.from_bytes(raw[:8], "little")
    if not 0 < length <= 256 or len(raw) < 8 + length + 4:
        return False
    at = 8 + length
    rank = int.from_bytes(raw[at : at + 4], "little")
    if not 1 <= rank <= 4 or len(raw) < at + 16 + 8 * rank:
        return False
    dims = struct.unpack_from(f"<{rank}Q", raw, at + 4)
    kind, offset = struct.unpack_from("<IQ", raw, at + 4 + 8 * rank)
    return all(0 < d < 1 << 32 for d in dims) and kind < 1024 and offset == 0
