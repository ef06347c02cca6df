"""Configuration → `Architecture`, by the reader of its family."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from hfvram.errors import HfvramError, printable
from hfvram.model.architecture import Architecture
from hfvram.model.config import Config
from hfvram.model.families import reader
from hfvram.model.families.defaults import known, type_of_class
from hfvram.model.quantization import method
from hfvram.model.scheme import scheme

UNKNOWN: Final = "unknown_architecture"


def infer(
    values: Mapping[str, Any], class_name: str | None = None, generation: Mapping[str, Any] | None = None
) -> Architecture:
    """The architecture of a configuration, with the quantization that it says it has.

    `class_name` is what to build instead of the first of `architectures`; `generation` the generation configuration,
    which decides about the cache where there is one. A type that isn't known may have code in its repo that copies
    transformers', by its class's name: it is read as that class, with a warning. Raises `bad_config`, and
    `unknown_architecture` that names the model type or the kind of layer that isn't known.
    """
    if not isinstance(values, Mapping):
        raise HfvramError("bad_config", "config.json is not an object")
    config = Config(values)
    model_type = config.model_type or _type_by_class(config)
    taken: tuple[str, ...] = ()
    if (read := reader(model_type)) is None:
        class_, like = _copied(config)
        if like is None or (read := reader(like)) is None:
            raise _unknown(config, model_type)
        what = f"model type {printable(model_type, 60)!r} is not known: read as {like}, by the name of its class"
        taken, model_type = (f"{what} {class_}",), like
    if config.model_type != model_type:
        config = Config({**values, "model_type": model_type})
    architecture = read(config, class_name)
    if not architecture.text.layers:
        raise HfvramError("bad_config", f"config.json: this {printable(model_type, 60)} has no layers")
    quantization, unquantized = method(values)
    return replace(
        architecture,
        quantization=quantization,
        unquantized=unquantized,
        scheme=scheme(values),
        generates_cache=architecture.generates_cache and _caches(known(config), generation),
        warnings=taken + architecture.warnings + _taken_for_granted(config),
    )


def _type_by_class(config: Config) -> str:
    """The type of a configuration that names only the class to build."""
    named = config.strings("architectures") or []
    if not named:
        raise HfvramError(UNKNOWN, "config.json has neither model_type nor architectures: it may be of any kind")
    model_type = type_of_class(named[0])
    if model_type is None:
        raise HfvramError(UNKNOWN, f"class {printable(named[0], 60)!r} is not known, and there is no model_type")
    return model_type


def _copied(config: Config) -> tuple[str, str | None]:
    """The class that a repo's own code builds, and the type whose class in transformers has that name."""
    named = (config.strings("architectures") or [""])[0]
    own = config.section("auto_map")
    if own is None or not any(isinstance(v, str) and v.endswith(f".{named}") for v in own.values.values()):
        return named, None
    return named, type_of_class(named)


def _unknown(config: Config, model_type: str) -> HfvramError:
    """Names the type; code of the repo's own is said to be the reason where there is some."""
    what = f"model type {printable(model_type, 60)!r} is not known"
    named = config.strings("architectures")
    if config.get("auto_map") is not None:
        what += f" ({printable(named[0], 60) if named else 'it'} is built by remote code of its repo)"
    return HfvramError(UNKNOWN, what)


def _caches(config: Config, generation: Mapping[str, Any] | None) -> bool:
    """Whether `generate` keeps a cache: as the generation configuration says; without one, as the model's does."""
    if generation is not None:
        return generation.get("use_cache") is not False
    text = config.section("text_config")
    return (config if text is None else text).flag("use_cache", default=True)


def _taken_for_granted(config: Config) -> tuple[str, ...]:
    """A warning where the file gives no width at all, so that all of its sizes are the family's defaults."""
    said = " ".join(config.values)
    if any(word in said for word in ("hidden_size", "d_model", "n_embd", "n_embed", "dim", "_config", "hidden_sizes")):
        return ()
    return (f"config.json says no sizes: those are the defaults of {printable(config.model_type, 60)}",)
