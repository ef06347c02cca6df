"""Expert parallelism by formula: one rank's part of a mixture is its share of the experts; all else is held by each.

Ranks see sequences of their own. Each sends its tokens to the experts' ranks and is sent as many, since routing is
taken to be balanced; gradients of what all hold are reduced over all ranks, those of experts over the ranks that hold
the same ones.

Source: Megatron-LM, megatron/core/transformer/moe/token_dispatcher.py `MoEAlltoAllTokenDispatcher` (GShard,
arXiv 2006.16668).
"""

from dataclasses import replace
from functools import lru_cache
from math import gcd

from hfvram.errors import HfvramError
from hfvram.model.architecture import Architecture
from hfvram.model.layers import Layer, MixtureOfExperts, Param


@lru_cache(maxsize=256)
def part_of(architecture: Architecture, ep: int) -> Architecture:
    """What one of `ep` ranks holds. Raises `usage` where there are no experts, or they can't be split evenly."""
    if ep == 1:
        return architecture
    text = architecture.text
    found = [x.feed_forward for x in text.layers if isinstance(x.feed_forward, MixtureOfExperts)]
    if not found:
        raise HfvramError("usage", f"--ep {ep} splits experts, {architecture.class_name} has none: valid is --ep 1")
    counts = sorted({x.experts for x in found})
    if any(n % ep for n in counts):
        common = gcd(*counts)
        valid = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        shown = " and ".join(map(str, counts))
        raise HfvramError("usage", f"--ep {ep} does not divide {shown} experts: valid are {valid}")
    if any(p.kind == "experts" and p.shape[0] != x.experts for x in found for p in x.params):
        raise HfvramError("usage", f"--ep has no formula for {architecture.class_name} yet: valid is --ep 1")
    made = {id(x): _layer(x, ep) for x in text.layers}
    local = replace(text, layers=tuple(made[id(x)] for x in text.layers))
    return replace(architecture, stacks=tuple(local if s is text else s for s in architecture.stacks))


def _layer(layer: Layer, ep: int) -> Layer:
    part = layer.feed_forward
    if not isinstance(part, MixtureOfExperts):
        return layer
    return replace(layer, feed_forward=replace(part, params=tuple(_share(p, ep) for p in part.params)))


def _share(param: Param, ep: int) -> Param:
    return replace(param, shape=(param.shape[0] // ep, *param.shape[1:])) if param.kind == "experts" else param
