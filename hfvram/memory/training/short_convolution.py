"""LFM2's gated short convolution with gradients.

b sequences of s tokens, h channels. Source: transformers 5.17, models/lfm2/modeling_lfm2.py `Lfm2ShortConv.forward`.
"""

from typing import Final

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training.mamba import convolution
from hfvram.memory.training.states import Weights
from hfvram.memory.training.tape import Tape
from hfvram.memory.training.tensors import Tensor

FORWARD: Final = "transformers 5.17: Lfm2ShortConv.forward"
PROJECTED = Tag("short convolution, projected input", "activations", "b·s·3·h·e", FORWARD)
GATED = Tag("short convolution, gated", "activations", "b·s·h·e", FORWARD)
OUT = Tag("short convolution, output", "activations", "b·s·h·e", FORWARD)


def short_convolution(t: Tape, w: Weights, x: Tensor, fused: bool) -> Tensor:
    """A gate, a convolution over a few tokens, a second gate."""
    h = x.shape[-1]
    conv, conv_bias = w.take(), w.bias()
    projected = op.transpose(t, w.linear(t, x, PROJECTED), 1, 2)
    first, second, x = op.split(t, projected, 1, h, h, h)
    hidden = op.mul(t, first, x, GATED)
    hidden = convolution(t, hidden, conv, conv_bias, fused, activated=False)
    y = op.mul(t, second, hidden, GATED)
    y = op.dense(t, op.transpose(t, y, 1, 2), GATED)
    return w.linear(t, y, OUT)
