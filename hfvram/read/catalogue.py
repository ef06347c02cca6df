"""The built-in catalogue: what the package itself knows of the most used models, for where the Hub cannot be asked."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hfvram.read.completion import plausible


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One model: the facts of its configuration, and its parameters by the dtype that the checkpoint stores them in.

    `parameters_by_dtype` has safetensors' names of dtypes and counts the model's parameters, each once, never packed
    words or scales: of gpt-oss `F4` are the numbers in MXFP4 blocks. `date` is the day the facts were taken.
    """

    id: str
    config: Mapping[str, Any]
    parameters_by_dtype: Mapping[str, int]
    date: str
    gated: bool


def lookup(model_id: str) -> CatalogueEntry | None:
    """The entry of exactly this Hub id, or None.

    >>> sum(lookup("mistralai/Mixtral-8x7B-v0.1").parameters_by_dtype.values())
    46702792704
    """
    data = _data()
    line = data["models"].get(model_id)
    if line is None:
        return None
    facts = data["models"][line["like"]] if "like" in line else line
    return CatalogueEntry(model_id, facts["config"], facts["parameters"], data["date"], line.get("gated", False))


def completions(text: str) -> list[str]:
    """Ids that `text` may be short for: in another case, or without a version (`-v0.1`) or format (`-hf`) suffix.

    >>> completions("mistralai/mixtral-8x7b")
    ['mistralai/Mixtral-8x7B-v0.1']
    """
    return plausible(text, _data()["models"])


@cache
def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(Path(__file__).with_name("catalogue.json").read_bytes())
    return data
