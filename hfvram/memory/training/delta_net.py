"""Gated delta nets with gradients: Qwen3-Next's mixer, and Qwen3.5's, whose projections stand apart.

Source: transformers 5.17, models/{qwen3_next, qwen3_5}/modeling_*.py.
"""

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training.blocks import NORM, NORMED, VARIANCE
from hfvram.memory.training.delta_rule import chunked
from hfvram.memory.training.mamba import convolution
from hfvram.memory.training.selective_scan import decay
from hfvram.memory.training.states import Weights
from hfvram.memory.training.tape import Saved, Tape
from hfvram.memory.training.tensors import Tensor
from hfvram.model.layers import GatedDeltaNet

NET = "transformers 5.17: Qwen3NextGatedDeltaNet.forward"
PROJECTED = Tag("delta net, projections", "activations", "b·s·H·(2·d_k+2·d_v)·e", NET)
GATES = Tag("delta net, decays and β", "activations", "b·s·H·4", NET)
CACHED = Tag("states, cached", "activations", "b·H·d_k·d_v·4", "transformers 5.17: cache_utils.py LinearAttentionLayer")
OUT = Tag("delta net, output", "activations", "b·s·H·d_v·e", NET)


def delta_net(t: Tape, part: GatedDeltaNet, w: Weights, x: Tensor, fused: bool, cached: bool) -> Tensor:
    """A whole mixer over its normed input (b, s, h); its states are cached where the model's configuration says so."""
    b, s, _ = x.shape
    last = [leaf for leaf in w.rest if leaf.param.name.endswith("out_proj.weight")]
    w.rest = [leaf for leaf in w.rest if leaf not in last]
    dt_bias, a_log, conv = w.take(), w.take(), w.take()
    h, d_k, d_v = part.key_heads, part.key_dim, part.value_dim
    keys, values, times = h * d_k, part.value_heads * d_v, part.value_heads // h
    if part.fused_projection:
        both, others = w.linear(t, x, PROJECTED), w.linear(t, x, PROJECTED)
        query, key, value, z, beta, a = _sorted(t, part, both, others)
        parts = [op.reshape(t, i, b, s, -1, tag=PROJECTED) for i in (query, key, value)]
        query, key, value = parts
        del parts
        mixed = op.cat(t, (query, key, value), -1, PROJECTED)
        mixed = op.transpose(t, mixed, 1, 2)
    else:
        mixed = op.transpose(t, w.linear(t, x, PROJECTED), 1, 2)
        z = op.reshape(t, w.linear(t, x, PROJECTED), b, s, -1, d_v)
        beta, a = w.linear(t, x, GATES), w.linear(t, x, GATES)
    if cached:
        t.held.append(t.new((b, mixed.shape[1], part.d_conv), mixed.dtype, None, CACHED))
    mixed = convolution(t, mixed, conv, None, fused)
    mixed = op.narrow(t, mixed, 2, s, from_end=True) if cached else mixed
    mixed = op.transpose(t, mixed, 1, 2)
    query, key, value = op.split(t, mixed, -1, keys, keys, values)
    query = op.reshape(t, query, b, s, -1, d_k)
    key = op.reshape(t, key, b, s, -1, d_k)
    value = op.reshape(t, value, b, s, -1, d_v)
    forget = op.of_output(t, beta, GATES)
    g = _decays(t, a_log, a, dt_bias)
    if times > 1:
        query = _repeated(t, query, times)
        key = _repeated(t, key, times)
    out, state = chunked(t, query, key, value, g, forget, cached)
    if state is not None:
        t.held.append(_kept(t, state))
    shape = out.shape
    out = op.reshape(t, out, -1, d_v, tag=OUT)
    z = op.reshape(t, z, -1, d_v)
    out = _gated_norm(t, out, z, w)
    out = op.reshape(t, op.reshape(t, out, *shape), b, s, -1)
    return Weights(last).linear(t, out, OUT)


def _kept(t: Tape, state: Tensor) -> Tensor:
    """The cache's own state, into which the last one is copied with its graph."""
    kept = t.new(state.shape, state.dtype, None, CACHED)
    return op.attach(kept, t.record(_same, (state,)))


def _same(t: Tape, saved: Saved, grads: op.Grads) -> op.Found:
    return (grads[0],)


def _sorted(t: Tape, part: GatedDeltaNet, both: Tensor, others: Tensor) -> tuple[Tensor, ...]:
    """What lies group after group: `fix_query_key_value_ordering`."""
    b, s, _ = both.shape
    h, d_k, d_v = part.key_heads, part.key_dim, part.value_dim
    times = part.value_heads // h
    query, key, value, z = op.split(t, op.reshape(t, both, b, s, h, -1), 3, d_k, d_k, times * d_v, times * d_v)
    beta, a = op.split(t, op.reshape(t, others, b, s, h, -1), 3, times, times)
    value = op.reshape(t, value, b, s, -1, d_v, tag=PROJECTED)
    z = op.reshape(t, z, b, s, -1, d_v, tag=PROJECTED)
    beta = op.reshape(t, beta, b, s, part.value_heads, tag=GATES)
    return query, key, value, z, beta, op.reshape(t, a, b, s, part.value_heads, tag=GATES)


def _decays(t: Tape, a_log: Tensor, a: Tensor, bias: Tensor) -> Tensor:
    """−exp(A_log) · softplus(a + bias) in fp32."""
    rate = decay(t, a_log)
    step = op.softplus(t, op.add(t, op.to(t, a, "fp32", GATES), bias, GATES), GATES)
    return op.mul(t, rate, step, GATES)


def _repeated(t: Tape, x: Tensor, times: int) -> Tensor:
    """Queries or keys for every head of the values: `repeat_interleave`."""
    b, s, h, d = x.shape
    wide = op.expand(t, op.reshape(t, x, b, s, h, 1, d), b, s, h, times, d)
    return op.reshape(t, op.clone(t, wide, True, PROJECTED), b, s, h * times, d)


def _gated_norm(t: Tape, x: Tensor, gate: Tensor, w: Weights) -> Tensor:
    """A weighted norm of each head, times a gate in fp32."""
    dtype = x.dtype
    x = op.to(t, x, "fp32", NORM)
    variance = op.mean(t, op.power(t, x, NORM), VARIANCE)
    x = op.mul(t, x, op.rsqrt(t, op.shift(t, variance, VARIANCE), VARIANCE), NORM)
    x = op.mul(t, w.norm()[0], op.to(t, x, dtype, NORMED), NORMED)
    x = op.mul(t, x, op.of_input(t, op.to(t, gate, "fp32", OUT), OUT), OUT)
    return op.to(t, x, dtype, OUT)
