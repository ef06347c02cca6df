"""Which function writes the memory of which kind of layer: the one place where kinds and their formulas meet."""

from hfvram.memory.attention import attention
from hfvram.memory.feed_forward import feed_forward
from hfvram.memory.forward import Forward
from hfvram.memory.timeline import Timeline
from hfvram.model.layers import Attention, FeedForward, Layer, MixtureOfExperts


def mix(t: Timeline, f: Forward, layer: Layer, cache: list[int]) -> tuple[int, list[int]]:
    """The mixers of a layer, one after the other. Returns the output's handle, and what the layer keeps to its end."""
    part = layer.mixers[0]
    if isinstance(part, Attention):
        out, kept = attention(t, f, part, cache)
        return out, [] if kept is None else [kept]
    raise NotImplementedError(type(part))


def feed(t: Timeline, f: Forward, part: FeedForward | MixtureOfExperts) -> int:
    """The feed-forward of a layer. Returns the output's handle."""
    if isinstance(part, FeedForward):
        return feed_forward(t, f, part)
    raise NotImplementedError(type(part))
