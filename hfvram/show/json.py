"""JSON that reads well and is safe on a terminal."""

import json as stdlib_json
import re
from typing import Any

_UNSAFE = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Control and bidirectional characters that JSON itself would let through."""


def dumps(value: Any, indent: int | None = 2) -> str:
    r"""Names and formulas as they are, whatever could steer a terminal escaped.

    >>> print(dumps({"a": "b·s\x1b\x9b"}, None))
    {"a": "b·s\u001b\u009b"}
    """
    text = stdlib_json.dumps(value, ensure_ascii=False, indent=indent)
    return text if text.isascii() else _UNSAFE.sub(lambda m: f"\\u{ord(m[0]):04x}", text)
