"""T5 with gradients: an encoder, and a decoder that also attends to it; a learned bias for relative positions.

Source: transformers 5.17, models/t5/modeling_t5.py, integrations/sdpa_attention.py `create_position_bias_mask`.
"""

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training.attention import KEY_VALUE, OUT, PROJECTED, QUERY
from hfvram.memory.training.blocks import DROPPED, HIDDEN, NORM, NORMED, VARIANCE, activate, unknown
from hfvram.memory.training.feed_forward import DOWN, PRODUCT, WIDE
from hfvram.memory.training.scaled_dot_product import attention as scaled_dot_product
from hfvram.memory.training.states import Blocks, Weights
from hfvram.memory.training.surroundings import Surroundings
from hfvram.memory.training.tape import Input, Tape
from hfvram.memory.training.tensors import Tensor
from hfvram.model.layers import Attention, FeedForward, Layer

T5 = "transformers 5.17: T5Attention.compute_bias"
BUCKETS = Tag("relative positions, buckets", "activations", "s·s·8", T5)
BIAS = Tag("relative positions, bias", "activations", "a·s·s·e", T5)
CACHED = Tag("keys and values, cached", "activations", "b·s·a·d·e", "transformers 5.17: DynamicCache.update")


def norm(t: Tape, x: Tensor, weight: Tensor) -> Tensor:
    """The deviation in fp32, of a cast that serves nothing else; back to the weight's dtype, then weighted."""
    variance = op.mean(t, op.power(t, op.to(t, x, "fp32", NORM), NORM), VARIANCE)
    x = op.mul(t, x, op.rsqrt(t, op.shift(t, variance, VARIANCE), VARIANCE), NORM)
    if weight.dtype != "fp32":
        x = op.to(t, x, weight.dtype, NORMED)
    return op.mul(t, weight, x, NORMED)


def block(t: Tape, layer: Layer, blocks: Blocks, hidden: Tensor, around: Surroundings) -> Tensor:
    """Attention to itself, in a decoder attention to the encoder, and a feed-forward, each behind its norm."""
    own, p = Weights(blocks.own), layer.dropout.residual
    if not isinstance(layer.feed_forward, FeedForward):
        raise unknown(f"the feed-forward of {around.class_name}")
    for i, (mixer, leaves) in enumerate(zip(layer.mixers, blocks.mixers, strict=True)):
        assert isinstance(mixer, Attention)
        w = Weights([leaf for leaf in leaves if leaf.param.kind != "embedding"])
        table = next((leaf.tensor for leaf in leaves if leaf.param.kind == "embedding"), None)
        hidden = _attended(t, mixer, w, table, own, hidden, around, i == 1, p)
    return _fed(t, layer.feed_forward, Weights(blocks.feed_forward), own, hidden, p)


def _attended(
    t: Tape,
    part: Attention,
    w: Weights,
    table: Tensor | None,
    own: Weights,
    hidden: Tensor,
    around: Surroundings,
    cross: bool,
    p: float,
) -> Tensor:
    normed = norm(t, hidden, *own.norm())
    attended = _attention(t, part, w, table, normed, around, cross)
    return op.add(t, hidden, op.dropout(t, attended, p, DROPPED), HIDDEN)


def _attention(
    t: Tape, part: Attention, w: Weights, table: Tensor | None, x: Tensor, around: Surroundings, cross: bool
) -> Tensor:
    """Keys and values of the layer's own input or of the encoder's output; a decoder caches them, in training too."""
    (b, s, _), d = x.shape, part.head_dim
    source = around.encoded if cross else x
    assert source is not None
    q = op.transpose(t, op.reshape(t, w.linear(t, x, QUERY), b, s, -1, d), 1, 2)
    k = op.transpose(t, op.reshape(t, w.linear(t, source, KEY_VALUE), b, source.shape[1], -1, d), 1, 2)
    v = op.transpose(t, op.reshape(t, w.linear(t, source, KEY_VALUE), b, source.shape[1], -1, d), 1, 2)
    if around.encoded is not None and not around.request.gradient_checkpointing:
        k, v = op.cat(t, (k,), 2, CACHED), op.cat(t, (v,), 2, CACHED)
        around.cached += [k, v]
    bias = around.biases.get(cross)
    if bias is None and table is None:
        bias = t.new((1, part.heads, s, k.shape[2]), q.dtype, None, BIAS)
        if around.request.gradient_checkpointing:
            bias.node = Input(bias)  # as transformers asks for, so that no fused kernel runs
    elif bias is None:
        assert table is not None
        bias = _bias(t, table, s, around.encoded is None)
    around.biases[cross] = bias
    out = _sdpa(t, q, k, v, bias, part.causal, around.dropout.residual)
    out = op.dense(t, op.reshape(t, out, b, s, -1, tag=OUT), OUT)
    return w.linear(t, out, PROJECTED)


def _sdpa(t: Tape, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, causal: bool, p: float) -> Tensor:
    if causal:
        bias = _masked(t, bias, q.shape[2])
    out = scaled_dot_product(t, q, k, v, bias, p=p, tag=OUT)
    return op.dense(t, op.transpose(t, out, 1, 2), OUT)


def _masked(t: Tape, bias: Tensor, s: int) -> Tensor:
    """The bias where a token sees the other, the least number elsewhere."""
    rows, columns = t.new((s,), "int64", None, BIAS), t.new((s,), "int64", None, BIAS)
    seen = t.new((s, s), "bool", None, BIAS)
    del rows, columns
    return op.where(t, seen.as_((1, 1, s, s), (s * s, s * s, s, 1)), bias, BIAS)


def _bias(t: Tape, table: Tensor, s: int, both_ways: bool) -> Tensor:
    """A number for each head and each pair of tokens, by the bucket that their distance falls in."""
    count = t.new((s,), "int64", None, BUCKETS)
    context = t.new((s, 1), "int64", None, BUCKETS)
    del count
    memory = t.new((s,), "int64", None, BUCKETS)
    relative = t.new((s, s), "int64", None, BUCKETS)
    values = op.embedding(t, _buckets(t, s, both_ways), table, BIAS)
    del context, memory, relative
    values = op.permute(t, values, 2, 0, 1)
    return op.reshape(t, values, 1, *values.shape)


def _buckets(t: Tape, s: int, both_ways: bool) -> Tensor:
    square = (s, s)

    def new(dtype: str = "int64") -> Tensor:
        return t.new(square, dtype, None, BUCKETS)

    buckets = None
    if both_ways:
        part = new("bool")
        part = new()
        part = new()
        buckets = new()
        del part
        distance = new()
    else:
        zeros = new()
        least = new()
        del zeros
        distance = new()
        del least
    small = new("bool")
    far = new("fp32")
    for _ in range(4):
        far = new("fp32")
    far = new()
    far = new()
    last = new()
    large = new()
    del far, last
    chosen = new()
    if buckets is None:
        buckets = new()
    del chosen, distance, small, large
    return buckets


def _fed(t: Tape, feed: FeedForward, w: Weights, own: Weights, hidden: Tensor, p: float) -> Tensor:
    fed = norm(t, hidden, *own.norm())
    fed = _gated(t, feed, w, fed, p) if feed.gated else _dense(t, feed, w, fed, p)
    return op.add(t, hidden, op.dropout(t, fed, p, DROPPED), HIDDEN)


def _dense(t: Tape, feed: FeedForward, w: Weights, hidden: Tensor, p: float) -> Tensor:
    hidden = w.linear(t, hidden, WIDE)
    hidden = activate(t, hidden, feed.activation)
    hidden = op.dropout(t, hidden, p, PRODUCT)
    hidden = op.to(t, hidden, w.rest[-1].tensor.dtype, PRODUCT)  # autocast takes it back
    return w.linear(t, hidden, DOWN)


def _gated(t: Tape, feed: FeedForward, w: Weights, hidden: Tensor, p: float) -> Tensor:
    gate = activate(t, w.linear(t, hidden, WIDE), feed.activation)
    up = w.linear(t, hidden, WIDE)
    hidden = op.mul(t, gate, up, PRODUCT)
    hidden = op.dropout(t, hidden, p, PRODUCT)
    hidden = op.to(t, hidden, w.rest[-1].tensor.dtype, PRODUCT)  # autocast takes it back
    return w.linear(t, hidden, DOWN)
