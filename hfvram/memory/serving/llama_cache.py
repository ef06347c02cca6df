"""llama.cpp's caches: cells of keys and values by layer, windows with cells of their own, recurrent states in fp32.

Cells are allocated at start, whatever is then used of them: `n_ctx` padded to 256, of a window `n_swa` and one ubatch,
padded. With one cache for all sequences (`--kv-unified`, as llama-server with its automatic four slots) a window has
room for each of them; else every sequence has a stream of its own. Latent attention keeps one vector and no values.

Source: llama.cpp b10635, src/llama-context.cpp, llama-kv-cache.cpp, llama-kv-cache-iswa.cpp and
llama-memory-recurrent.cpp.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from hfvram.memory.serving.layers import recurrent, state_cache
from hfvram.model.architecture import Architecture
from hfvram.model.layers import Attention, LatentAttention

TYPES: Final = {
    "f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34), "q5_1": (32, 24), "q5_0": (32, 22),
    "q4_1": (32, 20), "q4_0": (32, 18), "iq4_nl": (32, 18),
}  # fmt: skip
"""Types that `--cache-type-k` takes (common/arg.cpp): elements and bytes of a block (ggml-common.h)."""
PAD: Final = 256
UBATCH: Final = 512
STATE_BYTES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """What decides the number of cells. `ctx` is that of one sequence."""

    ctx: int
    sequences: int = 1
    unified: bool = False
    """One cache for all sequences, who share `ctx`."""
    ubatch: int = UBATCH
    swa_full: bool = False

    @property
    def streams(self) -> int:
        return 1 if self.unified else self.sequences

    @property
    def full(self) -> int:
        """Cells of a stream in a layer that sees all tokens.

        >>> Cells(ctx=1000).full
        1024
        """
        return padded(self.ctx)

    def window(self, tokens: int) -> int:
        """Cells of a stream in a layer with a window of so many tokens.

        >>> Cells(ctx=65536, sequences=4, unified=True).window(128)
        1024
        """
        if self.swa_full:
            return self.full
        return padded(min(self.full, tokens * (self.sequences if self.unified else 1) + self.ubatch))


@dataclass(frozen=True, slots=True)
class Cache:
    """The cache of one layer: keys and values, or a state."""

    layer: int
    kind: str
    """`full attention`, `sliding window`, `latent attention`, `indexer`, or `recurrent states`."""
    cells: int
    cell_bytes: int

    @property
    def nbytes(self) -> int:
        return self.cells * self.cell_bytes


def padded(tokens: int) -> int:
    """Up to whole 256."""
    return -(-tokens // PAD) * PAD


def row_bytes(elements: int, kind: str) -> int:
    """Bytes of so many elements of a cache's type.

    >>> row_bytes(1024, "f16"), row_bytes(1024, "q8_0"), row_bytes(1024, "q4_0")
    (2048, 1088, 576)
    """
    block, size = TYPES[kind]
    return -(-elements // block) * size


def caches(a: Architecture, cells: Cells, keys: str, values: str) -> Iterator[Cache]:
    """What each layer keeps, layers without a cache left out. Raises `usage` for a layer of which nothing is known."""
    if a.task == "encoder":
        return
    full = cells.full * cells.streams
    for i, layer in enumerate(a.text.layers):
        for mixer in layer.mixers:
            if isinstance(mixer, LatentAttention):
                wide = row_bytes(mixer.kv_lora_rank + mixer.qk_rope_head_dim, keys)
                yield Cache(i, "latent attention", full, wide)
                if mixer.index_top_k and mixer.index_head_dim:
                    yield Cache(i, "indexer", full, row_bytes(mixer.index_head_dim, keys))
            elif isinstance(mixer, Attention):
                if not mixer.cached or not mixer.kv_heads or mixer.kind == "cross_attention":
                    continue
                wide = row_bytes(mixer.kv_heads * mixer.head_dim, keys)
                wide += row_bytes(mixer.kv_heads * mixer.value_dim, values)
                if mixer.window and mixer.kind != "full_attention":
                    yield Cache(i, "sliding window", cells.window(mixer.window) * cells.streams, wide)
                else:
                    yield Cache(i, "full attention", full, wide)
        state = sum(state_cache(m, 1, STATE_BYTES, STATE_BYTES, 1).own_bytes for m in recurrent(layer))
        if state:
            yield Cache(i, "recurrent states", cells.sequences, state)
