"""Which GGUF files of a folder are a model, said from the names alone: sets of shards, quantizations, projectors."""

import re
from collections.abc import Collection, Mapping
from typing import Final

from hfvram.errors import HfvramError, printable

SHOWN: Final = 24
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
# the projector of images or sound, and what quantizing leaves behind: no model of their own
_PROJECTOR = re.compile(r"mmproj", re.I)
_NO_MODEL = re.compile(r"imatrix|ggml-vocab", re.I)
_QUANT = re.compile(
    r"(?<![A-Za-z0-9])((?:UD-)?(?:I?Q\d(?:_\w+)?|TQ\d_\d|B?F16|F32|MXFP4(?:_\w+)?))(?![A-Za-z0-9])", re.I
)


def only_gguf(files: Collection[str]) -> bool:
    """Whether the weights of a folder are GGUF files and nothing else."""
    ends = {f.rpartition(".")[2] for f in files}
    return "gguf" in ends and not ends & {"safetensors", "bin", "pt", "pth"}


def models(files: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Every model among these files: the path without its end → its shards in order.

    >>> models(["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf", "mmproj-F16.gguf"])
    {'m-Q8_0': ('m-Q8_0-00001-of-00002.gguf', 'm-Q8_0-00002-of-00002.gguf')}
    """
    found: dict[str, list[str]] = {}
    for path in sorted(f for f in files if f.endswith(".gguf")):
        name = path.rpartition("/")[2]
        if not _PROJECTOR.search(name) and not _NO_MODEL.search(name):
            shard = _SHARD.fullmatch(path)
            found.setdefault(shard[1] if shard else path.removesuffix(".gguf"), []).append(path)
    return {stem: tuple(paths) for stem, paths in found.items()}


def projectors(files: Collection[str]) -> tuple[str, ...]:
    """The files that hold towers for images or sound: llama.cpp's `--mmproj`."""
    return tuple(sorted(f for f in files if f.endswith(".gguf") and _PROJECTOR.search(f.rpartition("/")[2])))


def quantization(stem: str) -> str:
    """The quantization that a name says, "" where it says none.

    >>> quantization("Llama-3.2-3B-Instruct-Q4_K_M"), quantization("UD-Q4_K_XL/m"), quantization("phi-4")
    ('Q4_K_M', 'UD-Q4_K_XL', '')
    """
    found = _QUANT.findall(stem)
    return found[-1].upper() if found else ""


def pick(files: Collection[str], asked: str | None, where: str) -> tuple[str, ...]:
    """The shards of the one model that is meant: the only one, or the one that a file's name or a quantization picks.

    Raises `usage` that lists what there is, and `no_config` where there is no model or a part of it is missing.
    """
    known = models(files)
    if not known:
        raise HfvramError("no_config", f"{printable(where, 200)} holds no GGUF file of a model")
    found = known if asked is None else _named(known, asked)
    if len(found) != 1:
        choices = sorted({quantization(stem) or stem for stem in (found or known)})
        if len(choices) < len(found or known):
            choices = sorted(found or known)
        listed = ", ".join(choices[:SHOWN]) + (f" and {len(choices) - SHOWN} more" if len(choices) > SHOWN else "")
        if asked is None:
            what = "holds several GGUF files: --file picks one of"
        else:
            what = f"has {'several' if found else 'no'} GGUF files for --file {printable(asked, 80)}: valid are"
        raise HfvramError("usage", f"{printable(where, 200)} {what} {listed}")
    shards = next(iter(found.values()))
    if (shard := _SHARD.fullmatch(shards[0])) and len(shards) != int(shard[3]):
        raise HfvramError(
            "no_config", f"{printable(where, 200)} has {len(shards)} of the {int(shard[3])} parts of {shard[1]}"
        )
    return shards


def _named(known: Mapping[str, tuple[str, ...]], asked: str) -> dict[str, tuple[str, ...]]:
    """The models that a path, a file's name or a quantization means; the name of any shard means all."""
    for exact in (
        {stem: paths for stem, paths in known.items() if asked in (stem, *paths)},
        {stem: paths for stem, paths in known.items() if asked in {p.rpartition("/")[2] for p in (stem, *paths)}},
        {stem: paths for stem, paths in known.items() if asked.upper() == quantization(stem)},
    ):
        if exact:
            return exact
    word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(asked)}(?![A-Za-z0-9_])", re.I)
    return {stem: paths for stem, paths in known.items() if word.search(stem)}
