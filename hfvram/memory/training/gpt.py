"""Layers of the GPT line with gradients: GPT-2, GPT-BigCode, GPT-NeoX, BLOOM.

Source: transformers 5.17, models/{gpt2, gpt_bigcode, gpt_neox, bloom}/modeling_*.py.
"""

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training.attention import KEY_VALUE, OUT, PROJECTED, QUERY, SCORES, WIDE_SCORES, Attended, attend
from hfvram.memory.training.blocks import ACTIVATION, DROPPED, HIDDEN, activate, normalize, unknown
from hfvram.memory.training.feed_forward import DOWN, WIDE
from hfvram.memory.training.rotary import rotate_part
from hfvram.memory.training.sequence_parallel import enter, leave, length
from hfvram.memory.training.states import Blocks, Weights
from hfvram.memory.training.surroundings import Surroundings
from hfvram.memory.training.tape import Tape
from hfvram.memory.training.tensors import Tensor
from hfvram.model.layers import Attention, FeedForward, Layer

ALIBI = Tag("attention scores with ALiBi", "activations", "b·a·s·s·e", "transformers 5.17: BloomAttention.forward")


def parts(layer: Layer, around: Surroundings) -> tuple[Attention, FeedForward]:
    """The attention and the dense feed-forward of a layer that has these and nothing else."""
    (mixer,) = layer.mixers
    if not isinstance(mixer, Attention) or not isinstance(layer.feed_forward, FeedForward):
        raise unknown(f"a layer of {around.class_name}")
    return mixer, layer.feed_forward


def held_output(t: Tape, layer: Layer, blocks: Blocks, hidden: Tensor, around: Surroundings) -> Tensor:
    """GPT-2 and GPT-BigCode: the attention's output is held to the end of the layer."""
    part, feed = parts(layer, around)
    own = Weights(blocks.own)
    residual = hidden
    hidden = normalize(t, hidden, own.norm(2), "layer")
    attended, _weights = _split_attention(t, part, Weights(blocks.mixers[0], around.kind.transposed), hidden, around)
    hidden = op.add(t, attended, residual, HIDDEN)
    residual = hidden
    hidden = normalize(t, hidden, own.norm(2), "layer")
    fed = _mlp(t, feed, Weights(blocks.feed_forward, around.kind.transposed), hidden, around)
    return op.add(t, residual, fed, HIDDEN)


def _mlp(t: Tape, feed: FeedForward, w: Weights, hidden: Tensor, around: Surroundings) -> Tensor:
    hidden = w.linear(t, enter(t, hidden, w.params()), WIDE)
    hidden = activate(t, hidden, feed.activation)
    hidden = leave(t, w.linear(t, hidden, DOWN))
    return op.dropout(t, hidden, around.dropout.residual, DROPPED)


def _split_attention(t: Tape, part: Attention, w: Weights, x: Tensor, around: Surroundings) -> Attended:
    """One projection, split in three; with one KV head, keys and values stay as they are."""
    x = enter(t, x, w.params())
    b, s = x.shape[0], length(t, x)
    d = part.head_dim
    width, kv_width = part.heads * d, part.kv_heads * d
    fused = w.linear(t, x, QUERY)
    if part.kv_heads == 1:
        q, k, v = op.split(t, op.reshape(t, fused, b, 1, s, -1), 3, width, kv_width, kv_width)
        q = op.transpose(t, op.reshape(t, q, b, s, -1, d), 1, 2)
    elif around.kind.interleaved:
        fused = op.transpose(t, op.reshape(t, fused, b, s, part.heads, 3 * d), 1, 2)
        q, k, v = op.split(t, fused, 3, d, d, d)
    else:
        q, k, v = op.split(t, fused, 2, width, width, width)
        k = op.transpose(t, op.reshape(t, k, b, s, -1, d), 1, 2)
        v = op.transpose(t, op.reshape(t, v, b, s, -1, d), 1, 2)
        q = op.transpose(t, op.reshape(t, q, b, s, -1, d), 1, 2)
    del fused
    out, weights = attend(t, part, q, k, v, around)
    out = op.dense(t, op.reshape(t, out, b, s, -1, tag=OUT), OUT)
    out = leave(t, w.linear(t, out, PROJECTED))
    return op.dropout(t, out, around.dropout.residual, DROPPED), weights


def two_branches(t: Tape, layer: Layer, blocks: Blocks, hidden: Tensor, around: Surroundings) -> Tensor:
    """GPT-NeoX: both branches read the layer's input, or the second one the first one's sum."""
    part, feed = parts(layer, around)
    own = Weights(blocks.own)
    attended, _weights = _rotated_attention(
        t, part, Weights(blocks.mixers[0]), normalize(t, hidden, own.norm(2), "layer"), around
    )
    attended = op.dropout(t, attended, around.dropout.residual, DROPPED)
    w = Weights(blocks.feed_forward)
    if layer.parallel:
        normed = normalize(t, hidden, own.norm(2), "layer")
        fed = _plain_mlp(t, feed, w, normed)
        del normed
        fed = op.dropout(t, fed, around.dropout.residual, DROPPED)
        return op.add(t, op.add(t, fed, attended, HIDDEN), hidden, HIDDEN)
    attended = op.add(t, attended, hidden, HIDDEN)
    normed = normalize(t, attended, own.norm(2), "layer")
    fed = _plain_mlp(t, feed, w, normed)
    del normed
    fed = op.dropout(t, fed, around.dropout.residual, DROPPED)
    return op.add(t, fed, attended, HIDDEN)


def _plain_mlp(t: Tape, feed: FeedForward, w: Weights, hidden: Tensor) -> Tensor:
    hidden = w.linear(t, enter(t, hidden, w.params()), WIDE)
    hidden = activate(t, hidden, feed.activation)
    return leave(t, w.linear(t, hidden, DOWN))


def _rotated_attention(t: Tape, part: Attention, w: Weights, x: Tensor, around: Surroundings) -> Attended:
    """Queries, keys and values of a head lie side by side; a share of each head is rotated."""
    x = enter(t, x, w.params())
    b, s = x.shape[0], length(t, x)
    d = part.head_dim
    fused = op.transpose(t, op.reshape(t, w.linear(t, x, QUERY), b, s, -1, 3 * d), 1, 2)
    q, k, v = op.split(t, fused, 3, d, d, d)
    q, k = rotate_part(t, q, k, *around.angles(part))
    out, weights = attend(t, part, q, k, v, around)
    out = op.dense(t, op.reshape(t, out, b, s, -1, tag=OUT), OUT)
    return leave(t, w.linear(t, out, PROJECTED)), weights


def with_alibi(t: Tape, layer: Layer, blocks: Blocks, hidden: Tensor, around: Surroundings) -> Tensor:
    """BLOOM: ALiBi goes into the product of queries and keys; each branch adds the residual itself."""
    part, _ = parts(layer, around)
    own = Weights(blocks.own)
    normed = normalize(t, hidden, own.norm(2), "layer")
    attended, probabilities = _alibi_attention(t, part, Weights(blocks.mixers[0]), normed, hidden, around)
    normed = normalize(t, attended, own.norm(2), "layer")
    out = _alibi_mlp(t, Weights(blocks.feed_forward), normed, attended, around)
    around.held = probabilities  # returned with the output, and held until the next layer's
    return out


def _alibi_mlp(t: Tape, w: Weights, hidden: Tensor, residual: Tensor, around: Surroundings) -> Tensor:
    hidden = op.tanh_gelu(t, w.linear(t, enter(t, hidden, w.params()), WIDE), ACTIVATION)
    fed = leave(t, w.linear(t, hidden, DOWN))
    return op.add(t, residual, op.dropout(t, fed, around.dropout.residual, DROPPED), HIDDEN)


def _alibi_attention(
    t: Tape, part: Attention, w: Weights, x: Tensor, residual: Tensor, around: Surroundings
) -> tuple[Tensor, Tensor]:
    x = enter(t, x, w.params())
    b, s = x.shape[0], length(t, x)
    a, d = part.heads, part.head_dim
    fused = op.reshape(t, w.linear(t, x, QUERY), b, s, a, 3, d)
    q = op.transpose(t, op.select(t, fused, 3), 1, 2)
    k = op.transpose(t, op.select(t, fused, 3), 1, 2)
    v = op.transpose(t, op.select(t, fused, 3), 1, 2)
    q = op.reshape(t, q, b * a, -1, d, tag=QUERY)
    k = op.transpose(t, op.reshape(t, k, b * a, -1, d, tag=KEY_VALUE), 1, 2)
    v = op.reshape(t, v, b * a, -1, d, tag=KEY_VALUE)
    assert around.alibi is not None
    scores = op.scaled_product(t, around.alibi, q, k, ALIBI)
    weights = op.reshape(t, scores, b, a, s, -1)
    if (bias := around.masks.get(part.window)) is not None:
        weights = op.mask(t, weights, bias, SCORES)
    probabilities = op.to(t, op.softmax(t, weights, "fp32", WIDE_SCORES), q.dtype, SCORES)
    probabilities = op.dropout(t, probabilities, around.dropout.attention, SCORES)
    context = op.batched_product(t, op.reshape(t, probabilities, b * a, s, -1), v, OUT)
    context = op.permute(t, op.reshape(t, context, b, a, s, d), 0, 2, 1, 3)
    context = op.reshape(t, context, b, s, a * d, tag=OUT)
    out = leave(t, w.linear(t, context, PROJECTED))
    out = op.add(t, residual, op.dropout(t, out, around.dropout.residual, DROPPED), HIDDEN)
    return out, probabilities
