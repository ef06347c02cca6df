"""Layers of state spaces with gradients: a norm and a mixer over a residual stream that may be fp32.

Source: transformers 5.17, models/mamba/modeling_mamba.py `MambaBlock`, models/mamba2/modeling_mamba2.py `Mamba2Block`.
"""

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training.attention import Attended, attention
from hfvram.memory.training.blocks import NORMED, normalize, unknown
from hfvram.memory.training.chunk_scan import mamba2
from hfvram.memory.training.chunk_scan_fallback import mamba2_fallback
from hfvram.memory.training.delta_net import delta_net
from hfvram.memory.training.feed_forward import feed_forward
from hfvram.memory.training.mamba import pieces
from hfvram.memory.training.selective_scan import mamba
from hfvram.memory.training.short_convolution import short_convolution
from hfvram.memory.training.states import Blocks, Leaf, Weights
from hfvram.memory.training.surroundings import Surroundings
from hfvram.memory.training.tape import Tape
from hfvram.memory.training.tensors import Tensor
from hfvram.model.layers import Attention, FeedForward, GatedDeltaNet, Layer, Mamba1, Mamba2, Mixer, ShortConv

STREAM = Tag("hidden states", "activations", "b·s·h·4", "transformers 5.17: MambaBlock.forward, residual_in_fp32")


def state_space(t: Tape, layer: Layer, blocks: Blocks, hidden: Tensor, around: Surroundings) -> Tensor:
    """The whole layer: norm in the weights' dtype, one mixer or feed-forward, residual."""
    own = Weights(blocks.own)
    residual, weights = hidden, own.norm()
    hidden = normalize(t, op.to(t, hidden, weights[0].dtype, NORMED), weights, layer.norm, around.kind.norm)
    if layer.residual_fp32:
        residual = op.to(t, residual, "fp32", STREAM)
    if isinstance(layer.feed_forward, FeedForward):
        hidden = feed_forward(t, layer.feed_forward, Weights(blocks.feed_forward), hidden)
    elif layer.feed_forward:
        raise unknown(f"{layer.feed_forward.kind} of {around.class_name}")
    else:
        hidden, _ = _mixed(t, layer.mixers[0], blocks.mixers[0], hidden, around)
    return op.add(t, residual, hidden, STREAM)


def _mixed(t: Tape, part: Mixer, leaves: list[Leaf], x: Tensor, around: Surroundings) -> Attended:
    """The mixer, and what FSDP does around it where it is a unit of its own."""
    if t.units is None:
        return mix(t, part, Weights(leaves), x, around)
    out, weights = mix(t, part, Weights(leaves), t.units.enter_part(leaves, x), around)
    return t.units.leave_part(leaves, out), weights


def mix(t: Tape, part: Mixer, w: Weights, x: Tensor, around: Surroundings) -> Attended:
    """A mixer: attention, or one with a state by its fused kernels."""
    if isinstance(part, Attention):
        return attention(t, part, w, x, around)
    if around.request.padding or around.request.attention == "flash_attention_2":
        raise unknown(f"padding or flash attention of {around.class_name}")
    fused = around.request.kernels == "fused"
    if isinstance(part, GatedDeltaNet):
        return delta_net(t, part, w, x, fused, around.caches), None
    if isinstance(part, ShortConv):
        return short_convolution(t, w, x, fused), None
    if isinstance(part, Mamba1) and part.heads == 1 and (not fused or w.norms):
        return pieces(t, part, w, x, fused), None
    if isinstance(part, Mamba2) and not fused and part.gated_norm and not part.multipliers:
        return mamba2_fallback(t, part, w, x, around.kind.grouped_norm), None
    if not fused:
        raise unknown(f"--kernels {around.request.kernels} of {around.class_name}")
    if isinstance(part, Mamba1):
        return mamba(t, part, w, x), None
    if isinstance(part, Mamba2) and not part.multipliers:
        return mamba2(t, part, w, x), None
    raise unknown(f"{part.kind} of {around.class_name}")
