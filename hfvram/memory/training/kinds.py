"""Which code a model type runs where its architecture does not tell: its norms, its layers, what is done around them.

Only types that were held against their own code, event by event, stand here; any other has no formula yet.
"""

from dataclasses import dataclass
from typing import Final, Literal

from hfvram.memory.training.blocks import NormCode, unknown
from hfvram.model.architecture import Architecture

NormOrder = Literal["last", "first", "between"]
"""Where a layer's norms stand among its parameters: after its parts, before them, or one before each."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How a type's code differs from Llama's."""

    norm: NormCode = "weight last"
    layer: Literal["residual", "held output", "two branches", "with alibi"] = "residual"
    embedding: Literal["tokens", "positions", "late positions", "normed"] = "tokens"
    """Learned positions are added, before the mask is made or after it; or the embeddings are normed."""
    interleaved: bool = False
    """Queries, keys and values of a head lie side by side."""
    counts: bool = True
    """Positions are counted, and looked through for packed sequences."""
    transposed: bool = False
    """Linear layers are `Conv1D`."""
    own_softmax: bool = False
    """Eager attention's softmax is in the scores' dtype."""
    norms: NormOrder = "last"
    scaled: bool = False
    """The embeddings are multiplied by a number."""
    multiplied: bool = False
    """So are what joins the residual, and the logits."""
    rotates: Literal["whole", "joined", "fp32"] = "whole"
    """Rotary positions: over whole heads, over a part that is joined with the rest, or in fp32 and cast back."""
    projects_first: bool = False
    """Queries, keys and values are all projected before queries and keys are normed."""
    drops_inside: bool = False
    """The attention itself drops what it returns."""


_LLAMA = Kind()
_GEMMA = Kind(norm="plus one", scaled=True)

KINDS: Final[dict[str, Kind]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "starcoder2": _LLAMA,
    "arcee": _LLAMA,
    "cwm": _LLAMA,
    "granite": Kind(scaled=True, multiplied=True),
    "phi3": Kind(rotates="joined"),
    "olmo2": Kind(norm="weight in fp32", rotates="fp32"),
    "seed_oss": Kind(drops_inside=True),
    "gpt2": Kind(norms="between", layer="held output", embedding="positions", transposed=True, own_softmax=True),
    "gpt_bigcode": Kind(norms="between", layer="held output", embedding="late positions", interleaved=True),
    "gpt_neox": Kind(norms="first", layer="two branches"),
    "bloom": Kind(norms="between", layer="with alibi", embedding="normed", counts=False),
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
}


def kind_of(architecture: Architecture) -> Kind:
    """Raises `usage` for a type that was not held against its code."""
    if architecture.model_type not in KINDS:
        raise unknown(f"model type {architecture.model_type}")
    return KINDS[architecture.model_type]
