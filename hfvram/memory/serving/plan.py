"""A serving engine's plan for one GPU, in one shape for all engines: what stands, what it runs with, its pools."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from hfvram.memory.timeline import Standing

Requests = tuple[tuple[int, int], ...]
"""Concurrent requests: how many, and the tokens of each."""


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Memory for the cache in equal units: blocks, tokens or states. `units` is None where no GPU is named."""

    name: str
    unit_bytes: int
    units: int | None
    needs: Callable[[int], int]
    """Units that a request of so many tokens needs."""
    formula: str
    spare: int = 0
    """Units that are allocated beside those that requests get."""
    wastes: Callable[[int], float] = lambda tokens: 0.0
    """Units of a request in which there is nothing: the last block's rest."""

    @property
    def pool_bytes(self) -> int:
        return (self.units + self.spare) * self.unit_bytes if self.units else 0

    def needed(self, requests: Requests) -> int:
        return sum(count * self.needs(tokens) for count, tokens in requests)

    def holds(self, requests: Requests) -> bool:
        return self.units is None or self.needed(requests) <= self.units

    def concurrency(self, ctx: int) -> float:
        """Requests of `ctx` tokens that it holds at once."""
        need = self.needs(ctx)
        return (self.units or 0) / need if need else inf


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What one rank holds: that of the pipeline's stage whose pool is the smallest, which sets it for all."""

    engine: str
    standing: Standing
    loaded_bytes: int
    """Weights and buffers as they stand on the device: what the engine prints once the model is loaded."""
    activation_bytes: int
    non_torch_bytes: int
    graph_bytes: int
    pools: tuple[Pool, ...]
    tokens: int | None
    """The size of its cache as the engine prints it."""
    bytes_a_token: int
    """Bytes of the pool for one of those tokens."""
    room_bytes: int | None
    """What is left for the pools; below zero where not even the weights have room."""
    notes: tuple[str, ...] = ()

    @property
    def pool_bytes(self) -> int | None:
        return None if self.room_bytes is None else sum(p.pool_bytes for p in self.pools)

    def cache_bytes(self, requests: Requests) -> int:
        """What these requests take of the pools."""
        return sum(p.needed(requests) * p.unit_bytes for p in self.pools)

    def waste_bytes(self, requests: Requests) -> int:
        """How much of that holds no token."""
        return sum(round(count * p.wastes(tokens) * p.unit_bytes) for p in self.pools for count, tokens in requests)

    def holds(self, requests: Requests) -> bool:
        return (self.room_bytes is None or self.room_bytes >= 0) and all(p.holds(requests) for p in self.pools)

    def concurrency(self, ctx: int) -> float | None:
        if self.room_bytes is None or not self.pools:
            return None
        return min(p.concurrency(ctx) for p in self.pools)
