"""Configuration → `Architecture`, by the reader of its family."""

from collections.abc import Mapping
from typing import Any

from hfvram.errors import HfvramError, printable
from hfvram.model.architecture import Architecture
from hfvram.model.config import Config
from hfvram.model.families import reader


def infer(values: Mapping[str, Any], class_name: str | None = None) -> Architecture:
    """The architecture of a configuration. Raises `bad_config`, and `unknown_architecture` that names the type."""
    config = Config(values)
    read = reader(config.model_type)
    if read is None:
        raise HfvramError("unknown_architecture", f"model type {printable(config.model_type, 60)!r} is not known")
    return read(config, class_name)
