"""vLLM's groups: layers of one kind of cache in groups of equal size, so that a block of any group has the same bytes.

Source: vLLM 0.19.0, v1/core/kv_cache_utils.py (get_kv_cache_groups, _get_kv_cache_groups_uniform_page_size,
_report_kv_cache_config, get_max_concurrency_for_kv_cache_config); model_executor/models/config.py
(HybridAttentionMambaModelConfig).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hfvram.errors import HfvramError
from hfvram.memory.serving.specs import (
    BLOCK,
    Cache,
    FullCache,
    LatentCache,
    StateCache,
    TokenCache,
    with_block,
)


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share a table of blocks, by index; the last ones of a kind may be fewer than a group has room for."""

    cache: Cache
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of a model. `row_bytes` are those of one block on the fullest rank: a page for every layer slot."""

    groups: tuple[Group, ...]
    uneven: bool = False
    """One group whose layers have pages of different sizes (all full attention, say)."""
    pages: tuple[int, ...] = ()
    """Bytes of a page of every layer with a cache, in order, where they are uneven."""

    def row_bytes(self, first: int = 0, last: int | None = None) -> int:
        """Bytes of a block, for the layers from `first` to before `last` alone (a pipeline's stage)."""
        kept = [[k for k, i in enumerate(g.layers) if first <= i and (last is None or i < last)] for g in self.groups]
        if self.uneven:
            return sum(self.pages[k] for k in kept[0])
        return max(map(len, kept), default=0) * (self.groups[0].cache.page_bytes if self.groups else 0)

    @property
    def block(self) -> int:
        """Tokens of a block, as the engine's line about its tokens counts them."""
        return min(g.cache.block for g in self.groups)

    def tokens(self, blocks: int) -> int:
        """What the engine prints as the size of its cache."""
        return blocks // len(self.groups) * self.block

    def blocks(self, tokens: int, step: int) -> int:
        """Blocks that a request of `tokens` needs in all groups."""
        return sum(g.cache.blocks(tokens, step) for g in self.groups)

    def waste(self, tokens: int, step: int) -> float:
        """The part of these blocks in which there is no token, in blocks."""
        caches = (g.cache for g in self.groups)
        return sum(c.blocks(tokens, step) - c.kept(tokens, step) / c.block for c in caches)


def grouped(caches: Sequence[tuple[int, Cache]]) -> Groups:
    """The groups of these (layer, cache) pairs. Raises `usage` where vLLM can't make their pages equal.

    A group has as many layers as the rarest kind, or as the most common one where that is less than half more.

    >>> from hfvram.memory.serving.specs import WindowCache
    >>> full, window = FullCache(16, 128, 128, 2), WindowCache(16, 128, 128, 2, window=1024)
    >>> gemma = grouped([(i, window if (i + 1) % 6 else full) for i in range(62)])
    >>> [len(g.layers) for g in gemma.groups]
    [9, 9, 9, 9, 8, 8, 10]
    >>> gemma.row_bytes() * len(gemma.groups) // gemma.block
    573440
    """
    kinds = {cache for _, cache in caches}
    if len(kinds) <= 1:
        return Groups(tuple(Group(cache, tuple(i for i, _ in caches)) for cache in kinds))
    if all(isinstance(c, (FullCache, LatentCache)) for c in kinds) and len({c.block for c in kinds}) == 1:
        first = caches[0][1]
        layers = tuple(i for i, _ in caches)
        return Groups((Group(first, layers),), uneven=True, pages=tuple(c.page_bytes for _, c in caches))
    largest = max(c.page_bytes for c in kinds)
    by_kind: dict[Cache, list[int]] = {}
    for i, cache in caches:
        by_kind.setdefault(_in_pages_of(cache, largest), []).append(i)
    fewest, most = min(map(len, by_kind.values())), max(map(len, by_kind.values()))
    size = most if most < fewest * 1.5 else fewest
    groups: list[Group] = []
    for cache, layers_of in by_kind.items():
        count = -(-len(layers_of) // size)
        groups += [Group(cache, tuple(layers_of[k::count])) for k in range(count)]
    return Groups(tuple(groups))


def _in_pages_of(cache: Cache, page: int) -> Cache:
    """The cache with blocks so long that its pages have that size."""
    if cache.page_bytes == page:
        return cache
    if isinstance(cache, StateCache) or page % cache.page_bytes:
        raise HfvramError("usage", "vLLM can't make the cache pages of this model's layers equal")
    return with_block(cache, cache.block * (page // cache.page_bytes))


def beside_states(token: TokenCache, state: StateCache) -> tuple[TokenCache, StateCache]:
    """Attention in blocks long enough for a state's page, and the state's page padded to theirs.

    >>> token, state = beside_states(FullCache(2, 256, 256, 2), StateCache(98_304, 1_048_576, 4096))
    >>> token.block, token.page_bytes == state.page_bytes
    (560, True)
    """
    align = 64 if isinstance(token, LatentCache) else BLOCK
    one = with_block(token, 1).page_bytes
    block = max(token.block, align * -(-state.own_bytes // (align * one)))
    grown = with_block(token, block)
    return grown, replace(state, padded_bytes=grown.page_bytes)
