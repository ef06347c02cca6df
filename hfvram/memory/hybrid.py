"""Layers with attention and a state space: side by side (Falcon-H1), or a shared transformer block before (Zamba).

Source: transformers 5.17, models/falcon_h1/modeling_falcon_h1.py (`FalconH1DecoderLayer.forward`) and
zamba2/modeling_zamba2.py (`Zamba2HybridLayer.forward`); checked event by event on the meta device.
"""

from dataclasses import replace

from hfvram.memory.attention import attention
from hfvram.memory.blocks import HIDDEN, normalize
from hfvram.memory.feed_forward import WIDE, feed_forward, mixture
from hfvram.memory.forward import Forward
from hfvram.memory.ssm import mamba1, mamba2
from hfvram.memory.timeline import Timeline
from hfvram.model.layers import Attention, FeedForward, Layer, Mamba1, Mamba2, MixtureOfExperts


def is_hybrid(layer: Layer) -> bool:
    """Whether one layer has both kinds of mixer."""
    return len(layer.mixers) > 1 and any(isinstance(m, Mamba1 | Mamba2) for m in layer.mixers)


def keeps_embedding(layers: tuple[Layer, ...]) -> bool:
    """Whether a copy of the embedding is held to the end of the pass, for shared blocks to read."""
    return any(is_hybrid(layer) and isinstance(layer.mixers[0], Attention) for layer in layers)


def scales_embedding(layers: tuple[Layer, ...]) -> bool:
    """Whether the embedding is multiplied by a constant, and only the product held (Falcon-H1)."""
    return any(isinstance(m, Mamba2) and m.multipliers for layer in layers[:1] for m in layer.mixers)


def hybrid(t: Timeline, f: Forward, layer: Layer, cache: list[int]) -> int:
    """One such layer: its output's handle; its input is the caller's to free.

    `cache` holds keys and values first, then the states.
    """
    first, second = layer.mixers
    states: list[int] = []
    keys = cache if f.past else []
    if isinstance(first, Attention) and isinstance(second, Mamba1 | Mamba2):
        out = _after_block(t, f, layer, (first, second), keys, states)
    elif isinstance(second, Attention) and isinstance(first, Mamba1 | Mamba2):
        out = _side_by_side(t, f, layer, (first, second), keys, states)
    else:
        raise NotImplementedError(layer.mixers)
    if not f.past:
        cache += keys + states
    return out


def _side_by_side(
    t: Timeline, f: Forward, layer: Layer, mixers: tuple[Mamba1 | Mamba2, Attention], keys: list[int], states: list[int]
) -> int:
    """Both read the same normed input; each input and output has a multiplier of its own, and both outputs stay."""
    state_space, softmax = mixers
    width = state_space.hidden_size
    nbytes = f.bytes(width)
    normed = normalize(t, f, width, layer.norm)
    mixed = _state_space(t, f, state_space, states)
    scaled = [t.alloc(nbytes, HIDDEN)]
    t.free(mixed)
    source = t.alloc(nbytes, HIDDEN)
    attended, weights = attention(t, f, softmax, keys)
    t.free(source)
    scaled.append(t.alloc(nbytes, HIDDEN))
    t.free(attended)
    both = t.alloc(nbytes, HIDDEN)
    t.free(normed)
    residual = t.alloc(nbytes, HIDDEN)
    t.free(both)
    normed = normalize(t, f, width, layer.norm)
    fed = _feed(t, f, layer)
    product = t.alloc(nbytes, HIDDEN)
    t.free(fed, normed)
    total = t.alloc(nbytes, HIDDEN)
    t.free(product, residual, *scaled, *([] if weights is None else [weights]))
    return total


def _after_block(
    t: Timeline, f: Forward, layer: Layer, mixers: tuple[Attention, Mamba1 | Mamba2], keys: list[int], states: list[int]
) -> int:
    """A transformer block over the hidden state and the embedding side by side, whose output the state space adds to
    its input."""
    softmax, state_space = mixers
    width = state_space.hidden_size
    nbytes = f.bytes(width)
    joined = t.alloc(2 * nbytes, HIDDEN)
    normed = normalize(t, f, 2 * width, layer.norm)
    t.free(joined)
    attended, weights = attention(t, f, replace(softmax, hidden_size=width), keys)
    t.free(normed, *([] if weights is None else [weights]))
    normed = normalize(t, f, width, layer.norm)
    t.free(attended)
    if isinstance(layer.feed_forward, FeedForward) and layer.feed_forward.fused_gate_up:
        # Zamba2 adds this layer's own adapter to the shared projection.
        t.moment(WIDE, *[f.bytes(2 * layer.feed_forward.intermediate_size)] * 3)
    fed = _feed(t, f, layer)
    t.free(normed)
    block = t.alloc(nbytes, HIDDEN)
    t.free(fed)
    total = t.alloc(nbytes, HIDDEN)
    normed = normalize(t, f, width, layer.norm)
    t.free(total)
    mixed = _state_space(t, f, state_space, states)
    out = t.alloc(nbytes, HIDDEN)
    t.free(mixed, normed, block)
    return out


def _state_space(t: Timeline, f: Forward, part: Mamba1 | Mamba2, states: list[int]) -> int:
    return mamba1(t, f, part, states) if isinstance(part, Mamba1) else mamba2(t, f, part, states)


def _feed(t: Timeline, f: Forward, layer: Layer) -> int:
    part: FeedForward | MixtureOfExperts | None = layer.feed_forward
    if part is None:
        return t.alloc(0, HIDDEN)
    return feed_forward(t, f, part) if isinstance(part, FeedForward) else mixture(t, f, part)
