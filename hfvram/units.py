"""Bytes, tokens and counts as people write them, and back."""

import re

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|[KMGT]i?B)", re.IGNORECASE)
_TOKENS = re.compile(r"(-?\d+(?:\.\d+)?)\s*([km]?)", re.IGNORECASE)
_POWER = {"k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(text: str) -> int | None:
    """`24GB` is 24·10⁹ bytes, `24GiB` is 24·2³⁰; None where the text is no size.

    >>> parse_bytes("24GB"), parse_bytes("24 GiB"), parse_bytes("H100")
    (24000000000, 25769803776, None)
    """
    if not (m := _SIZE.fullmatch(text.strip())):
        return None
    unit = m[2].lower()
    base = 1024 if "i" in unit else 1000
    return int(float(m[1]) * base ** _POWER.get(unit[0], 0))


def parse_tokens(text: str) -> int | None:
    """Tokens, where `k` is 1024 and `m` is 1024²; None where the text is no number of tokens. One below 0 is a number.

    >>> parse_tokens("8k"), parse_tokens("8192"), parse_tokens("0.5k"), parse_tokens("-1"), parse_tokens("eight")
    (8192, 8192, 512, -1, None)
    """
    if not (m := _TOKENS.fullmatch(text.strip())):
        return None
    count = float(m[1]) * 1024 ** _POWER.get(m[2].lower(), 0)
    return int(count) if count.is_integer() else None


def gib(count: int | float, digits: int = 2) -> str:
    """Bytes as GiB with the unit, or as MiB or KiB where GiB would show nothing.

    >>> gib(93405585408), gib(33 * MiB), gib(512), gib(0)
    ('86.99 GiB', '33.0 MiB', '0.5 KiB', '0 B')
    """
    size = abs(count)
    if size >= 10 * 1024 * GiB:
        return f"{count / GiB / 1024:.{digits}f} TiB"
    if size >= GiB / 10:
        return f"{count / GiB:.{digits}f} GiB"
    if size >= MiB / 10:
        return f"{count / MiB:.1f} MiB"
    return f"{count / KiB:.1f} KiB" if size else "0 B"


def short_count(count: int) -> str:
    """A number of parameters or tokens in the field's short form.

    >>> short_count(46702792704), short_count(124439808), short_count(512)
    ('46.70 B', '124.4 M', '512')
    """
    if count >= 10**12:
        return f"{count / 10**12:.2f} T"
    if count >= 10**9:
        return f"{count / 10**9:.2f} B"
    if count >= 10**6:
        return f"{count / 10**6:.1f} M"
    return f"{count:,}"


def short_tokens(count: int) -> str:
    """Tokens in the field's short form, where that is exact.

    >>> short_tokens(8192), short_tokens(1 << 20), short_tokens(1000)
    ('8k', '1M', '1,000')
    """
    for unit, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if count >= unit and count % unit == 0:
            return f"{count // unit}{letter}"
    return f"{count:,}"
