"""Which parameters a request means by names of modules: what stays frozen, and what is trained whole beside adapters.

Both engines ask with the names that transformers gives parameters.
"""

import re
from collections.abc import Iterable

from hfvram.errors import HfvramError, printable
from hfvram.model.patterns import Clock, expression, paths

SHOWN = 16


def frozen(names: Iterable[str], asked: str | tuple[str, ...]) -> frozenset[str]:
    r"""The parameters that `--freeze` means: by whole parts of their names, or one regular expression for all of it.

    >>> names = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    >>> sorted(frozen(names, ("embed_tokens", "layers.0"))) == list(names[:2])
    True
    >>> frozen(names, r".*\.1\..*") == {names[2]}
    True
    """
    names = tuple(names)
    if isinstance(asked, str) and not re.fullmatch(r"[\w.-]+", asked):
        if (found := expression(asked)) is None:
            raise HfvramError("usage", f"--freeze {printable(asked, 60)} is no regular expression that is understood")
        clock = Clock()
        means = frozenset(name for name in names if clock.run(found.is_whole, name))
        if not means:
            raise _nothing("--freeze", asked, names)
    else:
        means = _named("--freeze", (asked,) if isinstance(asked, str) else asked, {n: n for n in names})
    if len(means) == len(names):
        raise HfvramError("usage", "--freeze leaves nothing to train: valid is a part of the parameters")
    return means


def saved(names: Iterable[str], asked: tuple[str, ...]) -> frozenset[str]:
    """The parameters of modules that `--modules-to-save` means, by whole parts of their paths.

    >>> names = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"
    >>> sorted(saved(names, ("lm_head", "mlp"))) == ["lm_head.weight", "model.layers.0.mlp.up_proj.weight"]
    True
    """
    modules = {name: name.rpartition(".")[0] for name in names}
    means = _named("--modules-to-save", asked, modules)
    parts = {part for module in modules.values() for part in module.split(".")}
    for name in asked:  # PEFT takes every module whose path ends so
        longer = sorted(part for part in parts if part.endswith(name) and part != name)
        if longer:
            raise HfvramError("usage", f"--modules-to-save {printable(name, 60)} is also the end of {longer[0]}")
    return means


def _named(option: str, asked: tuple[str, ...], modules: dict[str, str]) -> frozenset[str]:
    runs = {name: frozenset(paths(module)) for name, module in modules.items()}
    for part in asked:
        if not any(part in found for found in runs.values()):
            raise _nothing(option, part, modules)
    return frozenset(name for name, found in runs.items() if not found.isdisjoint(asked))


def _nothing(option: str, asked: str, names: Iterable[str]) -> HfvramError:
    parts = {part for name in names for part in name.split(".")[:-1] if not part.isdigit()}
    valid = ", ".join(sorted(parts)[:SHOWN])
    return HfvramError("usage", f"{option} {printable(asked, 60)} matches nothing: valid are {valid}")
