"""gpt-oss' layers with gradients: attention sinks beside the scores, and experts whose products have biases.

Source: transformers 5.17, models/gpt_oss/modeling_gpt_oss.py.
"""

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training import selection
from hfvram.memory.training.attention import KEY_VALUE, OUT, PROJECTED, QUERY, SCORES, Attended, repeat
from hfvram.memory.training.blocks import HIDDEN, normalize, unknown
from hfvram.memory.training.mixture import experts
from hfvram.memory.training.rotary import ROTATE
from hfvram.memory.training.routing import chosen_alone
from hfvram.memory.training.states import Blocks, Weights
from hfvram.memory.training.surroundings import Surroundings
from hfvram.memory.training.tape import Tape
from hfvram.memory.training.tensors import Tensor
from hfvram.model.layers import Attention, Layer, MixtureOfExperts

GPT_OSS = "transformers 5.17: gpt_oss eager_attention_forward"
BESIDE = Tag("attention scores and sinks", "activations", "b·a·s·(s+1)·e", GPT_OSS)


def with_sinks(t: Tape, layer: Layer, blocks: Blocks, hidden: Tensor, around: Surroundings) -> Tensor:
    """The whole layer; attention's weights are held until the experts are done, then the router's are."""
    (mixer,), feed = layer.mixers, layer.feed_forward
    asked = around.request
    if not isinstance(mixer, Attention) or not isinstance(feed, MixtureOfExperts) or feed.auxiliary or asked.ep > 1:
        raise unknown(f"a layer of {around.class_name}")
    if not mixer.sinks or not around.eager(mixer):
        raise unknown(f"--attention {asked.attention} of {around.class_name}")
    own, code = Weights(blocks.own), around.kind.norm
    residual = hidden
    hidden = normalize(t, hidden, own.norm(), "rms", code)
    hidden, rest = _attention(t, mixer, Weights(blocks.mixers[0]), hidden, around)
    hidden = op.add(t, residual, hidden, HIDDEN)
    residual = hidden
    hidden = normalize(t, hidden, own.norm(), "rms", code)
    hidden, rest = _experts(t, feed, blocks, hidden)
    out = op.add(t, residual, hidden, HIDDEN)
    del rest
    return out


def _attention(t: Tape, part: Attention, w: Weights, x: Tensor, around: Surroundings) -> Attended:
    """A softmax over scores and one sink a head, less their maximum, in the scores' dtype."""
    b, s, _ = x.shape
    d, sinks = part.head_dim, w.take()
    q = op.transpose(t, op.reshape(t, w.linear(t, x, QUERY), b, s, -1, d), 1, 2)
    k = op.transpose(t, op.reshape(t, w.linear(t, x, KEY_VALUE), b, s, -1, d), 1, 2)
    v = op.transpose(t, op.reshape(t, w.linear(t, x, KEY_VALUE), b, s, -1, d), 1, 2)
    q, k = ROTATE[around.kind.rotates](t, q, k, *around.angles(part))
    out, weights = _weighted(t, part, q, k, v, sinks, around)
    out = op.dense(t, op.reshape(t, out, b, s, -1, tag=OUT), OUT)
    return w.linear(t, out, PROJECTED), weights


def _weighted(
    t: Tape, part: Attention, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, around: Surroundings
) -> tuple[Tensor, Tensor]:
    k, v = repeat(t, k, part), repeat(t, v, part)
    weights = op.scale(t, op.matmul(t, q, op.transpose(t, k, 2, 3), SCORES), SCORES)
    if (bias := around.masks.get(part.window)) is not None:
        weights = op.mask(t, weights, bias, SCORES)
    b, _, s, _ = q.shape
    sinks = op.expand(t, op.reshape(t, sinks, 1, -1, 1, 1), b, part.heads, s, 1)
    both = op.cat(t, (weights, sinks), -1, BESIDE)
    both = op.subtract(t, both, selection.maximum(t, both, SCORES), BESIDE)
    probabilities = op.softmax(t, both, both.dtype, BESIDE)
    scores = op.narrow(t, probabilities, 3, s)
    weights = op.to(t, op.dropout(t, scores, around.dropout.attention, SCORES), v.dtype, SCORES)
    out = op.transpose(t, op.matmul(t, weights, v, OUT), 1, 2)
    return op.dense(t, out, OUT), weights


def _experts(t: Tape, part: MixtureOfExperts, blocks: Blocks, x: Tensor) -> tuple[Tensor, Tensor]:
    b, s, h = x.shape
    own = [leaf for leaf in blocks.feed_forward if leaf.param.kind == "experts"]
    router = Weights([leaf for leaf in blocks.feed_forward if leaf.param.kind != "experts"])
    x = op.reshape(t, x, -1, h)
    _logits, weights, chosen = chosen_alone(t, part, router, x)
    x = experts(t, part, own, x, weights, chosen)
    return op.reshape(t, x, b, s, h), weights
