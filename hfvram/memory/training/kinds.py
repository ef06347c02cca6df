"""Which code a model type runs where its architecture does not tell: its norms, its layers, what is done around them.

Only types that were held against their own code, event by event, stand here; any other has no formula yet.
"""

from dataclasses import dataclass
from typing import Final

from hfvram.memory.training.blocks import NormCode, unknown
from hfvram.model.architecture import Architecture


@dataclass(frozen=True, slots=True)
class Kind:
    """How a type's code differs from Llama's."""

    norm: NormCode = "weight last"
    scaled: bool = False
    """The embeddings are multiplied by a number."""


_LLAMA = Kind()
_GEMMA = Kind(norm="plus one", scaled=True)

KINDS: Final[dict[str, Kind]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "phi3": _LLAMA,
    "olmo2": Kind(norm="weight in fp32"),
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
}


def kind_of(architecture: Architecture) -> Kind:
    """Raises `usage` for a type that was not held against its code."""
    if architecture.model_type not in KINDS:
        raise unknown(f"model type {architecture.model_type}")
    return KINDS[architecture.model_type]
