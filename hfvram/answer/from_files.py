"""Training files as a question: the model and the options that they leave to be asked, and what is told of them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hfvram.answer.estimate import Estimate
from hfvram.errors import HfvramError, printable
from hfvram.read import training_file


def understood(
    model: str | None, given: Mapping[str, Any]
) -> tuple[str | None, dict[str, Any], str | None, tuple[str, ...]]:
    """The model, the options without `from`, the revision and notes: `given` wins over what the files of `from` say.

    Raises `usage` and `io` for a file that can't be read or understood.
    """
    asked = {name: value for name, value in given.items() if name not in ("from", "from_")}
    paths = given.get("from") or given.get("from_")
    if not paths:
        return model, asked, None, ()
    paths = [paths] if isinstance(paths, str) else list(paths) if isinstance(paths, (list, tuple)) else [None]
    if not all(isinstance(path, str) for path in paths):
        raise HfvramError("usage", "--from is a path, or a list of paths")
    read = training_file.read(paths, asked)
    notes = list(read.notes)
    if model and read.model and model != read.model:
        notes.append(f"the model is {printable(model, 80)}, in place of the file's {printable(read.model, 80)}")
    revision = read.revision if not model or model == read.model else None
    return model or read.model, {**read.options, **asked}, revision, tuple(notes)


def noted(found: Estimate, notes: tuple[str, ...]) -> Estimate:
    """The estimate with what is told of the files before its own warnings."""
    return replace(found, warnings=(*notes, *found.warnings)) if notes else found
