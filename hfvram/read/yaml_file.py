"""A small YAML or JSON file of settings, read with bounds: size, depth, aliases. It holds data, nothing else."""

import json
import os
import stat
from pathlib import Path
from typing import Any, Final

from hfvram.errors import HfvramError, printable
from hfvram.units import MiB

MOST_BYTES: Final = MiB
MOST_DEPTH: Final = 32
MOST_ALIASES: Final = 20
"""A file of settings repeats little; merged into each other, more of them can make a file grow without end."""


def load(path: str) -> dict[str, Any]:
    """The mapping that a file holds. Raises `io` where it can't be read, `usage` where it is no such mapping."""
    shown = printable(path, 120)
    text = _text(path, shown)
    try:
        found = _json(text) if text.lstrip().startswith("{") else None
        values = found if found is not None else _yaml(text)
    except RecursionError:
        raise HfvramError("usage", f"{shown}: nested too deeply") from None
    except ValueError as error:
        raise HfvramError("usage", f"{shown} is neither YAML nor JSON: {_one_line(str(error))}") from None
    if not isinstance(values, dict):
        raise HfvramError("usage", f"{shown} holds no settings: a mapping of names to values is wanted")
    return {str(key): value for key, value in values.items()}


def _text(path: str, shown: str) -> str:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise HfvramError("io", f"{shown} is not a file")
        with Path(path).open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise HfvramError("io", f"{shown}: {getattr(error, 'strerror', None) or 'no such path'}") from None
    if len(content) > MOST_BYTES:
        raise HfvramError("usage", f"{shown} is larger than 1 MiB: no file of settings is")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise HfvramError("usage", f"{shown} is not text: YAML or JSON is wanted (no training_args.bin)") from None


def _json(text: str) -> Any:
    """JSON, or None: what begins with a brace can be YAML, too."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _yaml(text: str) -> Any:
    """YAML by PyYAML's safe loader, once its events have been counted: nothing is built of a bomb."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _count(yaml, loader, text)
        return yaml.load(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _count(yaml: Any, loader: Any, text: str) -> None:
    depth = aliases = 0
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
        if depth > MOST_DEPTH:
            raise ValueError(f"nested deeper than {MOST_DEPTH} levels")
        if aliases > MOST_ALIASES:
            raise ValueError(f"more than {MOST_ALIASES} aliases")


def _one_line(text: str) -> str:
    return " ".join(text.split())
