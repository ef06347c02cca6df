"""Which files of a repository are the weights that transformers would load, said from the names alone."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

INDEX: Final = "model.safetensors.index.json"

_SHARD = re.compile(r"(.+?)-(\d{5,6})-of-(\d{5,6})\.safetensors")
_STEMS = ("model", "diffusion_pytorch_model")
# other copies of the same weights (Mistral's own format), what training leaves behind, and adapters
_NOT_THE_WEIGHTS = re.compile(r"consolidated|adapter|optimizer|scheduler|random_states|training|rng_state", re.I)


@dataclass(frozen=True, slots=True)
class Weights:
    """`shards` in order; `index` names the index file where only that can say; `choices` where names don't decide."""

    shards: tuple[str, ...] = ()
    index: str | None = None
    choices: tuple[str, ...] = ()


def find_weights(files: Collection[str], prefix: str = "") -> Weights:
    """The safetensors files of the model in the folder `prefix`.

    The order is that of transformers and diffusers: one whole `model.safetensors`, then the shards. A complete set
    of shards by their names needs no index, which for a large MoE is larger than a whole answer may be.

    >>> find_weights(["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "adapter.safetensors"]).shards
    ('m-00001-of-00002.safetensors', 'm-00002-of-00002.safetensors')
    """
    below = (f.removeprefix(prefix) for f in files if f.startswith(prefix) and f.endswith(".safetensors"))
    here = {f for f in below if "/" not in f}
    groups: dict[tuple[str, int], list[str]] = {}
    for name in here:
        m = _SHARD.fullmatch(name)
        groups.setdefault((m[1], int(m[3])) if m else (name.removesuffix(".safetensors"), 0), []).append(name)
    # a shard or more of a set that isn't whole is no model
    whole = {key: sorted(names) for key, names in groups.items() if len(names) == (key[1] or 1)}
    for stem in _STEMS:
        if (stem, 0) in whole:
            return _weights(prefix, whole[stem, 0])
        sets = [names for key, names in whole.items() if key[0] == stem]
        index = f"{prefix}{stem}.safetensors.index.json"
        if len(sets) == 1 and not any(key[0] == stem and key not in whole for key in groups):
            return _weights(prefix, sets[0])
        if index in files:
            return Weights(index=index)
    others = {key: names for key, names in whole.items() if not _NOT_THE_WEIGHTS.search(key[0])} or {
        key: names for key, names in whole.items() if key[0].startswith("consolidated")
    }
    if len(others) == 1:
        return _weights(prefix, next(iter(others.values())))
    return Weights(choices=tuple(sorted(prefix + names[0] for names in others.values())))


def shards_of_index(index: Mapping[str, Any], path: str, files: Collection[str]) -> tuple[tuple[str, ...], int]:
    """The shards that an index names, of those that exist, and how many it names that don't."""
    table = index.get("weight_map")
    folder = path.rpartition("/")[0]
    names = {v for v in table.values() if isinstance(v, str)} if isinstance(table, dict) else set()
    paths = {f"{folder}/{name}" if folder else name for name in names}
    return tuple(sorted(paths & set(files))), len(paths - set(files))


def _weights(prefix: str, names: list[str]) -> Weights:
    return Weights(tuple(prefix + name for name in names))
