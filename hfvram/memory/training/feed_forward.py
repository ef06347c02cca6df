"""Dense feed-forward with gradients, as transformers computes it.

Source: transformers 5.17, models/llama/modeling_llama.py `LlamaMLP.forward`, models/phi3/modeling_phi3.py.
"""

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training.blocks import activate
from hfvram.memory.training.sequence_parallel import enter, leave
from hfvram.memory.training.states import Weights
from hfvram.memory.training.tape import Tape
from hfvram.memory.training.tensors import Tensor
from hfvram.model.layers import FeedForward

MLP = "transformers 5.17: LlamaMLP.forward"
WIDE = Tag("feed-forward, gate and up", "activations", "b·s·f·e", MLP)
PRODUCT = Tag("feed-forward, product", "activations", "b·s·f·e", MLP)
DOWN = Tag("feed-forward, output", "activations", "b·s·h·e", MLP)


def feed_forward(t: Tape, part: FeedForward, w: Weights, x: Tensor) -> Tensor:
    """down(act(gate(x)) · up(x)), or down(act(up(x)))."""
    return leave(t, _products(t, part, w, enter(t, x, w.params())))


def _products(t: Tape, part: FeedForward, w: Weights, x: Tensor) -> Tensor:
    if part.gated and part.fused_gate_up:
        return fused_gated(t, part.activation, w, x)
    if part.gated:
        return gated(t, part.activation, w, x)
    return w.linear(t, activate(t, w.linear(t, x, WIDE), part.activation), DOWN)


def gated(t: Tape, activation: str, w: Weights, x: Tensor) -> Tensor:
    """down(act(gate(x)) · up(x))"""
    return w.linear(t, op.mul(t, activate(t, w.linear(t, x, WIDE), activation), w.linear(t, x, WIDE), PRODUCT), DOWN)


def fused_gated(t: Tape, activation: str, w: Weights, x: Tensor) -> Tensor:
    """The same where one product makes both."""
    both = w.linear(t, x, WIDE)
    f = both.shape[-1] // 2
    gate, up = op.split(t, both, -1, f, f)
    product = op.mul(t, up, activate(t, gate, activation), PRODUCT)
    return w.linear(t, product, DOWN)
