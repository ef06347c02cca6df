"""A GGUF header: key-value pairs, then each tensor's name, shape, type and place; the weights follow, and are not read.

Versions 2 and 3, little-endian. Arrays of a tokenizer, megabytes of them, are passed and not kept. The rules are those
of llama.cpp's own reader (`ggml/src/gguf.cpp`): tensors lie one after the other, each at a multiple of
`general.alignment`. Types and their sizes are those of the `gguf` package.
"""

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from typing import Any, Final

from hfvram.errors import HfvramError, printable
from hfvram.read.checkpoint import StoredTensor
from hfvram.read.cursor import Cursor, Truncated
from hfvram.read.gguf_jump import leap, starts_tensors

VERSIONS: Final = (2, 3)
MAX_PAIRS: Final = 10_000
MAX_TENSORS: Final = 100_000
MAX_STRINGS: Final = 2_000_000
"""Of all arrays together. The largest tokenizers have about a million tokens and merges."""
MAX_NAME_BYTES: Final = 65_535
KEPT_BYTES: Final = 4_096
"""Longer texts (chat templates) are passed."""
KEPT_NUMBERS: Final = 4_096
"""Longer arrays of numbers (scores of tokens) are passed: one for each layer is short."""
ALIGNMENT: Final = 32

_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata that is short enough to keep, and the tensors in the order of the file, shapes as rows × columns."""

    metadata: Mapping[str, Any]
    tensors: tuple[StoredTensor, ...]


@dataclass(frozen=True, slots=True)
class _Info:
    name: str
    dims: tuple[int, ...]
    type: int
    offset: int


class _Bad(Exception):
    """What is wrong with a header, to be told with the file's name."""


@cache
def constants() -> Any:
    """The gguf package's module of constants, alone: the package imports numpy and more. Raises `missing_extra`."""
    found = find_spec("gguf")
    for folder in (found and found.submodule_search_locations) or ():
        if spec := spec_from_file_location("gguf_constants", os.path.join(folder, "constants.py")):
            module = module_from_spec(spec)
            try:
                spec.loader.exec_module(module)  # type: ignore[union-attr]
            except OSError:
                continue
            return module
    raise HfvramError("missing_extra", "GGUF needs the gguf package: pip install 'hfvram[gguf]'")


@cache
def types() -> dict[int, tuple[str, int, int]]:
    """Number of a tensor type → its name, the elements of a block, and the bytes of one. Raises `missing_extra`."""
    return {int(t): (t.name, block, size) for t, (block, size) in constants().GGML_QUANT_SIZES.items()}


@cache
def file_types() -> dict[int, str]:
    """Number of a mixture (`general.file_type`) → its name, `Q4_K_M`. Raises `missing_extra`."""
    names = {int(t): str(t.name) for t in constants().LlamaFileType}
    return {number: name.removeprefix("MOSTLY_").removeprefix("ALL_") for number, name in names.items()}


@cache
def architectures() -> frozenset[str]:
    """The architectures that the gguf package knows. Raises `missing_extra`."""
    return frozenset(constants().MODEL_ARCH_NAMES.values())


def block_sizes() -> dict[str, tuple[int, int]]:
    """The same by name, `Q4_K`: elements and bytes of a block."""
    return {name: (block, size) for name, block, size in types().values()}


def parse_gguf(cursor: Cursor, where: str) -> GgufHeader:
    """The header of a file. Raises `bad_header`, `missing_extra`, and what the cursor's source raises.

    Where reading is dear (`cursor.leaps`), long arrays of strings are leapt over, and where the tensors then don't
    fill the file exactly, all is read again without leaps.
    """
    types()
    try:
        header, leapt, fills = _parse(cursor)
        if leapt and not fills:
            raise _Bad("leapt too far")
        return header
    except (_Bad, Truncated) as error:
        if cursor.leaps:
            return parse_gguf(cursor.again(), where)
        what = "ends before its header does" if isinstance(error, Truncated) else str(error)
        raise HfvramError("bad_header", f"{printable(where, 200)} {printable(what, 200)}") from None


def _parse(c: Cursor) -> tuple[GgufHeader, bool, bool]:
    """The header, whether anything was leapt over, and whether the tensors end where the file does."""
    if (magic := c.take(4)) != b"GGUF":
        raise _Bad("is no GGUF file: it begins with other bytes") if magic else Truncated
    version, tensors, pairs = struct.unpack("<IQQ", c.take(20))
    if version not in VERSIONS:
        big = version.to_bytes(4, "little")[::-1] in (v.to_bytes(4, "little") for v in VERSIONS)
        raise _Bad("is big-endian: llama.cpp on a GPU reads little-endian" if big else f"has GGUF version {version}")
    if tensors > MAX_TENSORS or pairs > MAX_PAIRS:
        raise _Bad(f"claims {tensors:,} tensors and {pairs:,} keys: not a header, or a broken one")
    metadata: dict[str, Any] = {}
    strings, leapt = 0, False
    for _ in range(pairs):
        if leapt and starts_tensors(c):
            break
        key = _text(c, MAX_NAME_BYTES)
        kind = int.from_bytes(c.take(4), "little")
        if kind != _ARRAY:
            if (value := _value(c, kind)) is not None:
                metadata[key] = value
            continue
        inner, count = struct.unpack("<IQ", c.take(12))
        if inner == _STRING:
            strings += count
            if strings > MAX_STRINGS or (c.size is not None and count * 8 > c.size):
                raise _Bad(f"claims an array of {count:,} strings")
            leapt = leap(c, count) or leapt
        elif inner in _SCALARS:
            width = struct.calcsize(_SCALARS[inner])
            if c.size is not None and count * width > c.size:
                raise _Bad(f"claims an array of {count:,} numbers, more than the file holds")
            if count <= KEPT_NUMBERS:
                metadata[key] = struct.unpack(f"<{count}{_SCALARS[inner]}", c.take(count * width))
            else:
                c.skip(count * width)
        else:
            raise _Bad("has an array of arrays, or of an unknown type")
    infos = [_info(c) for _ in range(tensors)]
    return (*_placed(c, metadata, infos, leapt),)


def _text(c: Cursor, most: int) -> str:
    length = int.from_bytes(c.take(8), "little")
    if not 0 < length <= most:
        raise _Bad(f"has a name of {length:,} bytes")
    try:
        return c.take(length).decode()
    except UnicodeDecodeError:
        raise _Bad("has a name that is not UTF-8") from None


def _value(c: Cursor, kind: int) -> Any:
    """A scalar, or a text if it is short enough to keep."""
    if kind == _STRING:
        length = int.from_bytes(c.take(8), "little")
        if c.size is not None and length > c.size:
            raise _Bad(f"has a text of {length:,} bytes, more than the file holds")
        if length > KEPT_BYTES:
            c.skip(length)
            return None
        return c.take(length).decode(errors="replace")
    if kind not in _SCALARS:
        raise _Bad(f"has a value of the unknown type {kind}")
    code = _SCALARS[kind]
    return struct.unpack(f"<{code}", c.take(struct.calcsize(f"<{code}")))[0]


def _info(c: Cursor) -> _Info:
    name = _text(c, MAX_NAME_BYTES)
    rank = int.from_bytes(c.take(4), "little")
    if rank > 4:
        raise _Bad(f"gives {name!r} {rank} dimensions")
    dims = struct.unpack(f"<{rank}Q", c.take(8 * rank))
    if math.prod(dims) >= 1 << 56 or 0 in dims:
        raise _Bad(f"gives {name!r} an absurd shape")
    kind, offset = struct.unpack("<IQ", c.take(12))
    return _Info(name, dims, kind, offset)


def _placed(c: Cursor, metadata: dict[str, Any], infos: list[_Info], leapt: bool) -> tuple[GgufHeader, bool, bool]:
    """Every tensor's bytes, and whether it lies where it must."""
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise _Bad(f"has an alignment of {alignment!r}")
    begin = -(-c.at // alignment) * alignment
    data = None if c.size is None else c.size - begin
    names = {i.name for i in infos}
    if len(names) != len(infos):
        raise _Bad("has two tensors of one name")
    tensors, at = [], 0
    for n, info in enumerate(infos):
        if info.offset != at:
            raise _Bad(f"puts {info.name!r} at {info.offset:,}: a hole, or another tensor's place")
        after = infos[n + 1].offset if n + 1 < len(infos) else data
        dtype, nbytes = _size(info, after)
        tensors.append(StoredTensor(info.name, dtype, info.dims[::-1], nbytes))
        end = at + nbytes
        if data is not None and end > data:
            raise _Bad(f"puts {info.name!r} past the end of the file")
        at = -(-end // alignment) * alignment
    fills = data is None or (bool(infos) and 0 <= data - end <= alignment)
    return GgufHeader(metadata, tuple(tensors)), leapt, fills


def _size(info: _Info, after: int | None) -> tuple[str, int]:
    """Type and bytes of a tensor; one of a type that the package doesn't know (a fork's) goes up to the next."""
    if info.type not in types():
        if after is None or after < info.offset:
            raise _Bad(f"gives {info.name!r} the unknown type {info.type}")
        return f"type {info.type}", after - info.offset
    dtype, block, size = types()[info.type]
    row = info.dims[0] if info.dims else 1
    if row % block:
        raise _Bad(f"gives {info.name!r} rows of {row}, which {dtype} does not divide")
    return dtype, math.prod(info.dims) // block * size
