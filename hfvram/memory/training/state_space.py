"""Layers of state spaces with gradients: a norm and a mixer over a residual stream that may be fp32.

Source: transformers 5.17, models/mamba/modeling_mamba.py `MambaBlock`, models/mamba2/modeling_mamba2.py `Mamba2Block`.
"""

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training.blocks import NORMED, normalize, unknown
from hfvram.memory.training.chunk_scan import mamba2
from hfvram.memory.training.selective_scan import mamba
from hfvram.memory.training.states import Blocks, Weights
from hfvram.memory.training.surroundings import Surroundings
from hfvram.memory.training.tape import Tape
from hfvram.memory.training.tensors import Tensor
from hfvram.model.layers import Layer, Mamba1, Mamba2, Mixer

STREAM = Tag("hidden states", "activations", "b·s·h·4", "transformers 5.17: MambaBlock.forward, residual_in_fp32")


def state_space(t: Tape, layer: Layer, blocks: Blocks, hidden: Tensor, around: Surroundings) -> Tensor:
    """The whole layer: norm in the weights' dtype, mixer, residual."""
    (part,), (leaves,), own = layer.mixers, blocks.mixers, Weights(blocks.own)
    residual, weights = hidden, own.norm()
    hidden = normalize(t, op.to(t, hidden, weights[0].dtype, NORMED), weights, layer.norm, around.kind.norm)
    if layer.residual_fp32:
        residual = op.to(t, residual, "fp32", STREAM)
    hidden = mix(t, part, Weights(leaves), hidden, around)
    return op.add(t, residual, hidden, STREAM)


def mix(t: Tape, part: Mixer, w: Weights, x: Tensor, around: Surroundings) -> Tensor:
    """A mixer with a state, by its fused kernels or without them."""
    if around.request.kernels != "fused":
        raise unknown(f"--kernels {around.request.kernels} of {around.class_name}")
    if isinstance(part, Mamba1):
        return mamba(t, part, w, x)
    if isinstance(part, Mamba2):
        return mamba2(t, part, w, x)
    raise unknown(f"{part.kind} of {around.class_name}")
