"""What no key of a GGUF file says and llama.cpp's code decides: which layers have a window, and which a cache.

Source: llama.cpp b10635, src/models/*.cpp (`load_arch_hparams`), src/llama-hparams.cpp (`set_swa_pattern`).
"""

from collections.abc import Sequence
from typing import Final

from hfvram.model.gguf_keys import Keys

ENCODERS: Final = (
    *("bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "neo-bert", "modern-bert", "eurobert"),
    *("gemma-embedding", "t5encoder"),
)
"""They keep no cache, whatever their keys say (`llama_model::create_memory`)."""
REFUSED: Final = {
    "clip": "a projector of images or sound: name the model's own file, and --mmproj to count it",
    "deepseek4": "its compressed caches are not modelled",
    "minimax-m3": "its indexer's cache is not modelled",
    "kimi-linear": "Kimi's delta attention is not modelled",
    "bailingmoe3": "Kimi's delta attention is not modelled",
    "t5": "an encoder with a decoder",
    "wavtokenizer-dec": "a decoder of sound",
    **dict.fromkeys(("rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"), "RWKV's state is not modelled"),
}
PERIODS: Final = {
    "afmoe": (4, False), "cohere2": (4, False), "exaone-moe": (4, False), "exaone4": (4, False),
    "gemma-embedding": (6, False), "gemma2": (2, False), "gemma3": (6, False), "gemma3n": (5, False),
    "gpt-oss": (2, False), "laguna": (4, True), "llama4": (4, False), "modern-bert": (3, True), "olmo2": (4, False),
    "plamo3": (8, False), "smallthinker": (4, True),
}  # fmt: skip
"""One layer in so many sees all tokens, the last of them or (True) the first; the others have a window."""
DEFAULT_WINDOWS: Final = {"gemma2": 4096, "llama4": 8192, "exaone-moe": 128, "exaone4": 4096}
KEPT_FROM_START: Final = {"gemma3n": 20}
"""Layers with a cache of their own; the later ones read those."""


def windows(keys: Keys, layers: int) -> list[int | None]:
    """Each layer's window, None where it sees all tokens.

    A family without a rule has none, whatever `attention.sliding_window` says: llama.cpp does not read it (Mistral),
    or sets it aside (Phi-3).

    >>> windows(Keys({"gemma3.attention.sliding_window": 512}, "gemma3"), 6)
    [512, 512, 512, 512, 512, None]
    """
    window = keys.size("attention.sliding_window", default=DEFAULT_WINDOWS.get(keys.arch, 0), low=0)
    pattern = keys.get("attention.sliding_window_pattern")
    if not window:
        return [None] * layers
    if isinstance(pattern, Sequence) and not isinstance(pattern, str) and len(pattern) >= layers:
        return [window if flag else None for flag in pattern[:layers]]
    if keys.arch not in PERIODS or (keys.arch == "exaone4" and layers != 64):
        return [None] * layers
    period, first = PERIODS[keys.arch]
    if type(pattern) is int and pattern > 0:
        period = pattern
    return [None if i % period == (0 if first else period - 1) else window for i in range(layers)]


def cached_layers(keys: Keys, layers: int) -> int:
    """How many layers from the first on have a cache of their own (`n_layer_kv_from_start`)."""
    shared = keys.size("attention.shared_kv_layers", default=0, low=0)
    return min(KEPT_FROM_START.get(keys.arch, layers), layers - shared if shared < layers else layers)
