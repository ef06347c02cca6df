"""Which function writes the memory of which kind of layer: the one place where kinds and their formulas meet."""

from hfvram.memory.attention import attention, cross_attention, grow
from hfvram.memory.compressed import compressed_attention, grow_compressed
from hfvram.memory.feed_forward import feed_forward, mixture
from hfvram.memory.forward import Forward
from hfvram.memory.latent import grow_latent, latent_attention
from hfvram.memory.linear_attention import delta_net, lightning, rg_lru, short_convolution
from hfvram.memory.offload import brought_experts
from hfvram.memory.ssm import mamba1, mamba2
from hfvram.memory.timeline import Timeline
from hfvram.model.layers import (
    RGLRU,
    Attention,
    CompressedAttention,
    FeedForward,
    GatedDeltaNet,
    LatentAttention,
    Layer,
    LightningAttention,
    Mamba1,
    Mamba2,
    Mixer,
    MixtureOfExperts,
    ShortConv,
)


def mix(t: Timeline, f: Forward, part: Mixer, cache: list[int]) -> tuple[int, list[int]]:
    """One mixer of a layer. Returns the output's handle, and what the layer keeps to its end."""
    if isinstance(part, Attention):
        run = cross_attention if part.kind == "cross_attention" else attention
        out, kept = run(t, f, part, cache)
        return out, [] if kept is None else [kept]
    if isinstance(part, LatentAttention):
        out, kept = latent_attention(t, f, part, cache)
        return out, [] if kept is None else [kept]
    if isinstance(part, CompressedAttention):
        return compressed_attention(t, f, part, cache)
    if isinstance(part, Mamba1):
        return mamba1(t, f, part, cache), []
    if isinstance(part, Mamba2):
        return mamba2(t, f, part, cache), []
    if isinstance(part, GatedDeltaNet):
        return delta_net(t, f, part, cache), []
    if isinstance(part, LightningAttention):
        return lightning(t, f, part, cache), []
    if isinstance(part, ShortConv):
        return short_convolution(t, f, part, cache), []
    if isinstance(part, RGLRU):
        return rg_lru(t, f, part, cache), []
    raise NotImplementedError(type(part))


def grow_cache(t: Timeline, f: Forward, layer: Layer, cache: list[int]) -> None:
    """What a step does to a layer's cache, and nothing else: for layers whose step was written once already."""
    for part in layer.mixers:
        if isinstance(part, CompressedAttention):
            grow_compressed(t, f, part, cache)
        elif isinstance(part, LatentAttention):
            grow_latent(t, f, part, cache)
        elif isinstance(part, Attention) and part.cached and part.kind != "cross_attention":
            t.free(*grow(t, f, part, cache))


def feed(t: Timeline, f: Forward, part: FeedForward | MixtureOfExperts, source: list[int] | None = None) -> int:
    """The feed-forward of a layer. Returns the output's handle; an inline one frees `source`, its input."""
    if isinstance(part, FeedForward):
        return feed_forward(t, f, part, source if part.inline else None)
    brought = [*brought_experts(t, f, part)]
    out = mixture(t, f, part)
    t.free(*brought)
    return out
