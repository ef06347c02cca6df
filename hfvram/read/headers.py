"""A safetensors header: 8 bytes of length, then JSON that says each tensor's dtype, shape and place in the file.

The rules are those of the safetensors library (`safetensors/src/tensor.rs`, `Metadata::validate`): offsets begin at
0, leave no holes, agree with dtype × shape, and end where the file ends.
"""

import json
import math
from typing import Any, Final

from hfvram.errors import HfvramError, printable
from hfvram.read.checkpoint import StoredTensor

MAX_HEADER_BYTES: Final = 100_000_000
"""The library's own bound."""

BITS: Final = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits of one element of every dtype that the format knows."""

_Entry = tuple[str, tuple[int, ...], int, int]  # dtype, shape, begin, end


def header_length(prefix: bytes, file_bytes: int | None, where: str) -> int:
    """Length of the JSON that follows the first 8 bytes. Raises `bad_header` where the file can't hold it."""
    if len(prefix) < 8:
        raise _bad(where, "is shorter than the 8 bytes that every safetensors file begins with")
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise _bad(where, f"claims a header of {length:,} bytes: not a safetensors file, or a broken one")
    if length < 2 or (file_bytes is not None and 8 + length > file_bytes):
        raise _bad(where, f"claims a header of {length:,} bytes, and the file has {file_bytes}")
    return length


def parse_header(raw: bytes, data_bytes: int | None, where: str) -> tuple[StoredTensor, ...]:
    """The tensors that a header's JSON declares, in the order of the file.

    `data_bytes` is what the file holds after the header, None where unknown. A dtype that the format doesn't know
    (yet) is kept: its bytes are stored, whatever they mean. Raises `bad_header`.

    >>> parse_header(b'{"w":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}}', 12, "model.safetensors")
    (StoredTensor(name='w', dtype='BF16', shape=(2, 3), nbytes=12),)
    """
    # a tensor's entry takes 50 bytes at the least, with 3 brackets and some commas; a bomb has more, and fills memory
    dense = raw.count(b"[") + raw.count(b"{") > len(raw) // 12 or raw.count(b",") > len(raw) // 3
    if dense and len(raw) > 10**6:
        raise _bad(where, "has a header that describes no tensors")
    try:
        table = json.loads(raw.decode(), object_pairs_hook=_pairs)
    except RecursionError:
        raise _bad(where, "has a header nested too deep") from None
    except ValueError as e:
        raise _bad(where, f"has a header that can't be read: {e}") from None
    if not isinstance(table, dict):
        raise _bad(where, "has a header that is no table of tensors")
    table.pop("__metadata__", None)
    for name, entry in table.items():
        if not isinstance(entry, tuple):
            raise _bad(where, f"describes {name!r} without dtype, shape and data_offsets")
    tensors = []
    at = 0
    for name, (dtype, shape, begin, end) in sorted(table.items(), key=lambda item: item[1][2:]):
        if begin != at or end < begin:
            raise _bad(where, f"puts {name!r} at {begin} … {end}: a hole, or another tensor's place")
        bits = BITS.get(dtype)
        if bits is not None and math.prod(shape) * bits != (end - begin) * 8:
            raise _bad(where, f"gives {name!r} {end - begin:,} bytes, which {dtype} {list(shape)} does not take")
        tensors.append(StoredTensor(name, dtype, shape, end - begin))
        at = end
    if data_bytes is not None and at != data_bytes:
        problem = "runs past the end of the file" if at > data_bytes else "leaves a part of the file undescribed"
        raise _bad(where, f"has a header that {problem} ({at:,} bytes of tensors, {data_bytes:,} in the file)")
    return tuple(tensors)


def _pairs(pairs: list[tuple[str, Any]]) -> Any:
    """Every JSON object as it is met: a tensor's entry becomes a tuple at once, which keeps large headers small."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    if found.keys() == {"dtype", "shape", "data_offsets"} and isinstance(found["dtype"], str):
        return _entry(found["dtype"], found["shape"], found["data_offsets"])
    return found


def _entry(dtype: str, shape: Any, offsets: Any) -> _Entry:
    if not dtype.isascii() or not dtype.isprintable() or not 0 < len(dtype) <= 32:
        raise ValueError("a dtype is no dtype's name")
    if not _sizes(shape) or math.prod(shape) >= 1 << 63:
        raise ValueError("a shape is not a list of sizes")
    if not _sizes(offsets) or len(offsets) != 2:
        raise ValueError("data_offsets are not two positions")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _sizes(value: Any) -> bool:
    # `type`, not isinstance: true is an int in Python. The bound on the rank keeps the product cheap
    return isinstance(value, list) and len(value) <= 64 and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def _bad(where: str, what: str) -> HfvramError:
    return HfvramError("bad_header", f"{printable(where, 200)} {printable(what, 200)}")
