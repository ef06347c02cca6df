"""What a configuration leaves unsaid: the defaults, aliases and sections of transformers' configuration classes.

`defaults.json` is written by scripts/write_family_defaults.py from transformers 5.17.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hfvram.errors import HfvramError
from hfvram.model.config import Config


@cache
def _table() -> Mapping[str, Mapping[str, Any]]:
    table: Mapping[str, Mapping[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_bytes())
    return table


def known(config: Config) -> Config:
    """The configuration with the defaults of its type behind it."""
    return _known(config, config.model_type, config.model_type)


def _known(config: Config, kind: str, key: str) -> Config:
    if (facts := _table().get(key)) is None:
        return config
    return Config(config.values, facts["defaults"] | {"model_type": kind}, facts["aliases"])


def section(config: Config, name: str) -> Config:
    """A nested configuration with its type's defaults; where it is absent, what transformers puts in its place.

    Raises `bad_config` where neither the file nor the family says what it is.
    """
    facts = _table().get(config.model_type, {}).get("sections", {}).get(name)
    nested = config.section(name)
    if nested is None:
        if facts is None or facts["absent"] is None:
            raise HfvramError("bad_config", f"config.json has no {name}: the model's sizes can't be known without it")
        nested = Config(facts["absent"])
    if facts is None or (facts["any"] and nested.model_type):
        return known(nested)
    return _known(nested, nested.model_type or facts["type"], facts["type"])


def class_of(config: Config, asked: str | None = None) -> str:
    """The class to build: the one asked for, else the first of `architectures` that transformers builds from this type
    (remote code has names of its own), else the type's first."""
    classes = _classes(config)
    named = config.strings("architectures") or []
    return asked or next((name for name in named if name in classes), None) or next(iter(classes), "")


def prefix_of(config: Config, class_name: str) -> str:
    """What stands before the base model's tensors in this class: `model.` as a rule, nothing in the bare model."""
    return _classes(config).get(class_name, "" if class_name.endswith("Model") else "model.")


def opened(config: Config, asked: str | None) -> tuple[Config, str, str]:
    """What most readers begin with: the configuration with its defaults, the class to build, and its prefix."""
    config = known(config)
    class_name = class_of(config, asked)
    return config, class_name, prefix_of(config, class_name)


def _classes(config: Config) -> Mapping[str, str]:
    classes: Mapping[str, str] = _table().get(config.model_type, {}).get("classes", {})
    return classes


def type_of_class(class_name: str) -> str | None:
    """The model type that this class is built from; a wrapper's rather than that of what it wraps."""
    found = [kind for kind, facts in _table().items() if class_name in facts["classes"]]
    return min(found, key=len) if found else None
