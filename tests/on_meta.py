"""A closed form against the model that transformers builds on the meta device: what differs, in words."""

from collections.abc import Mapping
from typing import Any

from hfvram.model import meta
from hfvram.model.config import Config
from hfvram.model.families import reader
from hfvram.model.layers import Param

BYTES = {"fp32": 4, "int64": 8, "int32": 4, "complex64": 8, "bool": 1}


def differences(values: Mapping[str, Any], class_name: str | None = None) -> list[str]:
    """Names, shapes, kinds and dtypes that differ; a head counts as linear, buffers only beyond 64 KiB."""
    read = reader(values["model_type"])
    assert read is not None
    architecture = read(Config(values), class_name)
    model = meta.build(values, class_name, "bf16")
    built, formed = split(meta.params(model)), split(architecture.all_params)
    found = [f"class {type(model).__name__}"] if type(model).__name__ != architecture.class_name else []
    names = [p.name for p in architecture.all_params]
    found += [f"{name} twice" for name in set(names) if names.count(name) > 1]
    return found + [f"{name}: meta {built.get(name)}, ours {formed.get(name)}" for name in differing(built, formed)]


Facts = tuple[tuple[int, ...], str, str | None]


def split(params: tuple[Param, ...]) -> dict[str, Facts]:
    return {
        p.name: (p.shape, "linear" if p.kind == "head" else p.kind, None if p.kind == "buffer" else p.dtype)
        for p in params
        if p.kind != "buffer" or p.numel * BYTES.get(p.dtype or "", 2) > 1 << 16
    }


def differing(built: dict[str, Facts], formed: dict[str, Facts]) -> list[str]:
    return [name for name in {**built, **formed} if built.get(name) != formed.get(name)]
