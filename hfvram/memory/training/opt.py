"""OPT's layers with gradients: scaled queries, and a feed-forward over flattened tokens inside the layer's own code.

Source: transformers 5.17, models/opt/modeling_opt.py.
"""

from hfvram.memory.training import operators as op
from hfvram.memory.training.attention import KEY_VALUE, OUT, PROJECTED, QUERY, Attended, attend
from hfvram.memory.training.blocks import DROPPED, HIDDEN, activate, normalize
from hfvram.memory.training.feed_forward import DOWN, WIDE
from hfvram.memory.training.gpt import parts
from hfvram.memory.training.sequence_parallel import enter, leave, length
from hfvram.memory.training.states import Blocks, Weights
from hfvram.memory.training.surroundings import Surroundings
from hfvram.memory.training.tape import Tape
from hfvram.memory.training.tensors import Tensor
from hfvram.model.layers import Attention, Layer


def flattened(t: Tape, layer: Layer, blocks: Blocks, hidden: Tensor, around: Surroundings) -> Tensor:
    """Norms before the branches, or (OPT-350M) after what joins the residual."""
    part, feed = parts(layer, around)
    own, p, first = Weights(blocks.own), layer.dropout.residual, layer.norm_position == "pre"
    size = len(blocks.own) // 2
    residual = hidden
    if first:
        hidden = normalize(t, hidden, own.norm(size), "layer")
    hidden, _weights = _attention(t, part, Weights(blocks.mixers[0]), hidden, around)
    hidden = op.dropout(t, hidden, p, DROPPED)
    hidden = op.add(t, residual, hidden, HIDDEN)
    if not first:
        hidden = normalize(t, hidden, own.norm(size), "layer")
    shape = hidden.shape
    flat = t.sp == 1  # Megatron-LM doesn't flatten
    hidden = op.reshape(t, hidden, -1, shape[-1]) if flat else hidden
    residual = hidden
    if first:
        hidden = normalize(t, hidden, own.norm(size), "layer")
    w = Weights(blocks.feed_forward)
    hidden = w.linear(t, enter(t, hidden, w.params()), WIDE)
    hidden = activate(t, hidden, feed.activation)
    hidden = leave(t, w.linear(t, hidden, DOWN))
    hidden = op.dropout(t, hidden, p, DROPPED)
    hidden = op.reshape(t, op.add(t, residual, hidden, HIDDEN), *shape)
    return hidden if first else normalize(t, hidden, own.norm(size), "layer")


def _attention(t: Tape, part: Attention, w: Weights, x: Tensor, around: Surroundings) -> Attended:
    x = enter(t, x, w.params())
    b, s = x.shape[0], length(t, x)
    d = part.head_dim
    q = op.scale(t, w.linear(t, x, QUERY), QUERY)
    q = op.transpose(t, op.reshape(t, q, b, -1, part.heads, d), 1, 2)
    k = w.linear(t, x, KEY_VALUE)
    v = w.linear(t, x, KEY_VALUE)
    k = op.transpose(t, op.reshape(t, k, b, -1, part.heads, d), 1, 2)
    v = op.transpose(t, op.reshape(t, v, b, -1, part.heads, d), 1, 2)
    out, weights = attend(t, part, q, k, v, around)
    out = op.dense(t, op.reshape(t, out, b, s, -1, tag=OUT), OUT)
    return leave(t, w.linear(t, out, PROJECTED)), weights
