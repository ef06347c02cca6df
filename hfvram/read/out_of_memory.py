"""PyTorch's out-of-memory message, as 2.x and 1.x write it.

Source: PyTorch 2.11, c10/cuda/CUDACachingAllocator.cpp (malloc); 1.13 the same file.
"""

import re
from typing import Final

from hfvram.read.engine_log import Dialect, Setting, pattern


def _compact(text: str) -> str:
    return text.replace(" ", "")


DIALECT: Final = Dialect(
    "PyTorch",
    (
        pattern("asked for last", r"out of memory\. Tried to allocate ~", "bytes", "last"),
        pattern("capacity", r"total capaci?ty of ~", "bytes", "last"),
        pattern("capacity", r"~ total capacity;", "bytes", "last"),
        pattern("free", r"of which ~ is free", "bytes", "last"),
        pattern("free", r"~ free;", "bytes", "last"),
        pattern("on the device", r"this process has ~ memory in use", "bytes", "last"),
        pattern("allocated", r"[Oo]f the allocated memory ~ is allocated by PyTorch", "bytes", "last"),
        pattern("allocated", r"~ already allocated;", "bytes", "last"),
        pattern("reserved, unallocated", r"~ is reserved by PyTorch but unallocated", "bytes", "last"),
        pattern("reserved", r"~ reserved in total by PyTorch", "bytes", "last"),
    ),
    (
        Setting("gpu", re.compile(r"total capaci?ty of ([\d.]+ ?[GM]iB)"), _compact),
        Setting("gpu", re.compile(r"([\d.]+ ?[GM]iB) total capacity;"), _compact),
    ),
)
