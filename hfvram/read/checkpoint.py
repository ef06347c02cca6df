"""What the `read` room hands on: a configuration, the table of stored tensors, and where they come from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Source = Literal["hub", "cache", "local", "catalogue"]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as a file stores it: `dtype` as safetensors has it (`BF16`, `F8_E4M3`, `I32`), or GGUF (`Q4_K`); sizes
    in elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Adapter:
    """A PEFT adapter: its `adapter_config.json` and, where they could be read, its stored tensors."""

    id: str
    config: Mapping[str, Any]
    tensors: tuple[StoredTensor, ...] | None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model as it lies on the Hub, on disk or in the catalogue: facts only, no weight is ever read.

    `tensors` are those of the headers, None where no header was read. `parameters_by_dtype` is a count of stored
    elements by dtype that another reader of the headers made (the Hub's own, or the catalogue's); it stands in for
    `tensors` where reading dozens of headers would add nothing. `components` are the parts of a pipeline.
    """

    id: str
    source: Source
    config: Mapping[str, Any]
    commit: str | None = None
    tensors: tuple[StoredTensor, ...] | None = None
    parameters_by_dtype: Mapping[str, int] | None = None
    generation_config: Mapping[str, Any] | None = None
    adapter: Adapter | None = None
    components: Mapping[str, "Checkpoint"] = field(default_factory=dict)
    gguf: Mapping[str, Any] | None = None
    """Metadata of a GGUF file, which has no `config`."""
    projector: tuple[StoredTensor, ...] = ()
    """Tensors of the GGUF file beside it that holds towers for images or sound."""
    path: str | None = None
    """Folder to build the model from with its own code, only where the user trusts it."""
    warnings: tuple[str, ...] = ()
