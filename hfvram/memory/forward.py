"""One pass of a model over some tokens, as the formulas need it: sizes and dtypes, no weights."""

from dataclasses import dataclass

from hfvram.memory.generation import HOPPER, Generation

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What one of several GPUs that hold a model together runs of it; `placement.py` says which layers."""

    first: bool
    """Token ids are here, and logits come back to it."""
    receives: bool
    """Hidden states come from another GPU; else the embedding is here."""
    ends: bool
    """The last norm is here."""
    generates: bool
    """The model has a head, here or elsewhere."""
    tables_away_bytes: int = 0
    """The largest module before the layers that is in CPU memory and comes for as long as it runs: embeddings."""
    head_away_bytes: int = 0
    """The head, where it is in CPU memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """`batch` sequences of `tokens` new tokens each, after `past` that a cache already holds.

    `dtype` is what the model computes in; `masked` whether attention is given a mask of (batch, 1, tokens, attended)
    for padding.
    """

    batch: int
    tokens: int
    past: int = 0
    dtype: str = "bf16"
    attention: str = "sdpa"
    kernels: str = "fused"
    masked: bool = False
    mask_of_ones: bool = True
    """Whether the model is given a mask of (batch, tokens) at all, as by generate()."""
    quant: str = "none"
    double_quant: bool = True
    resident_experts: int | None = None
    """Experts of each layer that stay on the GPU where the others are in CPU memory; None where all are there."""
    away: frozenset[int] = frozenset()
    """Layers (their `id`) that are in CPU memory, and come for as long as they run."""
    stage: Stage | None = None
    decoding: bool = False
    """A step of generate() after its prefill."""
    use_cache: bool = True
    source: int = 0
    """Tokens of the encoder's output, which cross attention reads."""
    static_length: int = 0
    """Tokens that a static cache holds, 0 for a dynamic one."""
    cache: str = "dynamic"
    """Which of transformers' caches."""
    cache_bits: int = 16
    """Bits of a value in a quantized one."""
    prompt: int = 0
    """Tokens before the first that was decoded."""
    gpu: Generation = HOPPER
    """The GPU's generation, which decides about kernels."""

    @property
    def decoded(self) -> int:
        """Tokens of the past that came one by one."""
        return max(0, self.past - self.prompt)

    @property
    def rows(self) -> int:
        """Tokens of all sequences: the rows of every activation."""
        return self.batch * self.tokens

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]

    @property
    def half(self) -> bool:
        return self.dtype != "fp32"

    def bytes(self, width: int) -> int:
        """An activation of this width, in the computing dtype."""
        return self.batch * self.tokens * width * ELEMENT_BYTES[self.dtype]

    def fp32_bytes(self, width: int) -> int:
        return self.batch * self.tokens * width * 4
