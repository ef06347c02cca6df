"""Bytes of a JSON file that somebody published → an object, or `bad_config`, quickly and in little memory."""

import json
from typing import Any, Final

from hfvram.errors import HfvramError, printable

MAX_CONFIG_BYTES: Final = 10 * 10**6
"""Larger is no configuration. The largest published one known here has 89 KB."""

_MAX_OBJECTS = 200_000


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """A configuration file's JSON object. `NaN` and `Infinity` are taken as published: some files hold them.

    >>> parse_object(b'{"hidden_size": 8, "scale": Infinity}', "config.json")
    {'hidden_size': 8, 'scale': inf}

    Raises `bad_config`: too large, not UTF-8, not JSON, nested too deep, not an object.
    """
    value = parse_json(raw, where)
    if not isinstance(value, dict):
        raise HfvramError("bad_config", f"{printable(where, 200)} holds no JSON object")
    return value


def parse_json(raw: bytes, where: str) -> Any:
    """Any JSON value of such a file, with the same bounds. Raises `bad_config`."""
    where = printable(where, 200)
    if len(raw) > MAX_CONFIG_BYTES:
        raise HfvramError("bad_config", f"{where} is larger than {MAX_CONFIG_BYTES // 10**6} MB: no configuration is")
    # a small file of nothing but brackets would fill memory: an empty list costs 28 times its text
    if raw.count(b"{") + raw.count(b"[") > _MAX_OBJECTS:
        raise HfvramError("bad_config", f"{where} holds more than {_MAX_OBJECTS:,} lists and objects")
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except RecursionError:
        raise HfvramError("bad_config", f"{where} is nested too deep") from None
    except ValueError as e:
        raise HfvramError("bad_config", f"{where} is not JSON: {e}") from None
