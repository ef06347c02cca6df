"""The cache of one layer, on one rank: each kind is a frozen dataclass with the bytes of its page.

`page_bytes` are those of one block of `block` tokens; `blocks(tokens, step)` is how many a request of `tokens` holds at
most where `step` new tokens are computed at a time, `kept(tokens, step)` how many tokens are in them. Source: vLLM
0.19.0, v1/kv_cache_interface.py.
"""

from dataclasses import dataclass, replace

BLOCK = 16
"""Tokens of a block, vLLM's default (config/cache.py)."""


@dataclass(frozen=True, slots=True)
class FullCache:
    """Keys and values of every token: block · heads · (d_k + d_v) · e.

    >>> FullCache(kv_heads=8, head_dim=128, value_dim=128, element_bytes=2).page_bytes
    65536
    """

    kv_heads: int
    head_dim: int
    value_dim: int
    element_bytes: int
    block: int = BLOCK

    @property
    def page_bytes(self) -> int:
        return self.block * self.kv_heads * (self.head_dim + self.value_dim) * self.element_bytes

    def kept(self, tokens: int, step: int) -> int:
        return tokens

    def blocks(self, tokens: int, step: int) -> int:
        return -(-tokens // self.block)


@dataclass(frozen=True, slots=True)
class WindowCache:
    """Keys and values of the last `window` tokens; one block more, as a window may begin within a block.

    >>> WindowCache(1, 64, 64, 2, window=128).blocks(100_000, 8192)
    521
    """

    kv_heads: int
    head_dim: int
    value_dim: int
    element_bytes: int
    window: int
    block: int = BLOCK

    @property
    def page_bytes(self) -> int:
        return self.block * self.kv_heads * (self.head_dim + self.value_dim) * self.element_bytes

    def kept(self, tokens: int, step: int) -> int:
        return min(self.window - 1 + step, tokens)

    def blocks(self, tokens: int, step: int) -> int:
        return -(-self.kept(tokens, step) // self.block) + 1


@dataclass(frozen=True, slots=True)
class ChunkCache:
    """Keys and values of the chunk that the last token is in (Llama 4)."""

    kv_heads: int
    head_dim: int
    value_dim: int
    element_bytes: int
    chunk: int
    block: int = BLOCK

    @property
    def page_bytes(self) -> int:
        return self.block * self.kv_heads * (self.head_dim + self.value_dim) * self.element_bytes

    def kept(self, tokens: int, step: int) -> int:
        return min(self.chunk + step, tokens)

    def blocks(self, tokens: int, step: int) -> int:
        return -(-self.kept(tokens, step) // self.block)


@dataclass(frozen=True, slots=True)
class LatentCache:
    """One vector a token for all heads (MLA), the same on every rank; with a sparse indexer its keys beside it.

    >>> LatentCache(bytes_a_token=576 * 2).page_bytes
    18432
    """

    bytes_a_token: int
    block: int = BLOCK

    @property
    def page_bytes(self) -> int:
        return self.block * self.bytes_a_token

    def kept(self, tokens: int, step: int) -> int:
        return tokens

    def blocks(self, tokens: int, step: int) -> int:
        return -(-tokens // self.block)


@dataclass(frozen=True, slots=True)
class StateCache:
    """A recurrent state and its convolution's last columns, one page for a request however long it is.

    Its page is padded to that of attention in the same model. `block` is the longest context, as nothing is shared
    between requests by default. Source: v1/kv_cache_interface.py, MambaSpec; models/config.py, MambaModelConfig.
    """

    conv_bytes: int
    state_bytes: int
    block: int
    padded_bytes: int = 0

    @property
    def own_bytes(self) -> int:
        return self.conv_bytes + self.state_bytes

    @property
    def page_bytes(self) -> int:
        return self.padded_bytes or self.own_bytes

    def kept(self, tokens: int, step: int) -> int:
        return self.block

    def blocks(self, tokens: int, step: int) -> int:
        return 1


TokenCache = FullCache | WindowCache | ChunkCache | LatentCache
Cache = TokenCache | StateCache


def with_block(cache: TokenCache, block: int) -> TokenCache:
    """The same cache in blocks of another size."""
    return replace(cache, block=block)
