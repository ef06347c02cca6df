"""Mamba-2's chunked scan with gradients in plain PyTorch, where its kernels are not installed.

b sequences of s tokens, h heads of p, g groups, state n, c chunks of q tokens. Source: transformers 5.17,
models/mamba2/modeling_mamba2.py `Mamba2Mixer.forward`, `mamba2_chunk_scan`, `segment_sum`, `MambaRMSNormGated`.
"""

from functools import partial
from typing import Final

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training import selection
from hfvram.memory.training.blocks import NORM, NORMED, VARIANCE
from hfvram.memory.training.chunk_scan import OUT, PROJECTED, SCANNED, STEPS
from hfvram.memory.training.mamba import convolution
from hfvram.memory.training.selective_scan import decay
from hfvram.memory.training.states import Weights
from hfvram.memory.training.tape import Saved, Tape
from hfvram.memory.training.tensors import Shape, Tensor
from hfvram.model.layers import Mamba2

SCAN: Final = "transformers 5.17: mamba2_chunk_scan"
WIDE = Tag("state space, inputs in fp32", "activations", "b·s·h·p·4", SCAN)
PAIRS = Tag("state space, products of every pair of tokens in a chunk", "activations", "b·s·q·h·n·4", SCAN)
STATES = Tag("state space, states of every token", "activations", "b·s·h·p·n·4", SCAN)


def mamba2_fallback(t: Tape, part: Mamba2, w: Weights, x: Tensor, grouped: bool) -> Tensor:
    """A whole mixer over its normed input (b, s, hidden)."""
    dtype = x.dtype
    b, s, _ = x.shape
    h, p, g, n = part.heads, part.head_dim, part.groups, part.d_state
    dt_bias, a_log, skip, conv = w.take(), w.take(), w.take(), w.take()
    conv_bias = w.bias()
    projected = w.linear(t, x, PROJECTED)
    a = decay(t, a_log)
    gate, hidden, dt = op.split(t, projected, -1, h * p, part.conv_dim, h)
    hidden = convolution(t, op.transpose(t, hidden, 1, 2), conv, conv_bias, False)
    hidden, key, query = op.split(t, op.transpose(t, hidden, 1, 2), -1, h * p, g * n, g * n)
    result = scan(
        t,
        part,
        op.reshape(t, hidden, b, s, h, p),
        dt,
        a,
        op.reshape(t, key, b, s, g, n),
        op.reshape(t, query, b, s, g, n),
        skip,
        dt_bias,
    )
    out = _gated_norm(t, op.reshape(t, result, b, s, h * p), gate, w.norm()[0], g if grouped else None)
    return w.linear(t, op.to(t, out, dtype, SCANNED), OUT)


def _gated_norm(t: Tape, x: Tensor, gate: Tensor, weight: Tensor, groups: int | None) -> Tensor:
    """Over the whole width, or over that of each group (Nemotron-H)."""
    dtype, shape = x.dtype, x.shape
    x = op.to(t, x, "fp32", NORM)
    x = op.mul(t, x, op.of_input(t, op.to(t, gate, "fp32", NORM), NORM), NORM)
    if groups:
        x = op.reshape(t, x, *shape[:-1], groups, shape[-1] // groups)
    variance = op.mean(t, op.power(t, x, NORM), VARIANCE)
    x = op.mul(t, x, op.rsqrt(t, op.shift(t, variance, VARIANCE), VARIANCE), NORM)
    if groups:
        x = op.reshape(t, x, *shape)
    return op.mul(t, weight, op.to(t, x, dtype, NORMED), NORMED)


def scan(
    t: Tape,
    part: Mamba2,
    hidden: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    bias: Tensor,
) -> Tensor:
    """Over hidden (b, s, h, p): chunks as products that are summed, the widest of every pair of tokens in a chunk."""
    size, s, h, p = hidden.shape
    n, q = part.d_state, part.chunk_size
    pad = -s % q
    chunks = (s + pad) // q
    dt = op.add(t, dt, op.to(t, bias, dt.dtype, STEPS), STEPS)
    dt = op.of_input(t, op.wide(t, dt), STEPS)
    dt = _clamp(t, dt)
    hidden = op.to(t, hidden, "fp32", WIDE)
    b = _repeated(t, op.to(t, b, "fp32", WIDE), h)
    c = _repeated(t, op.to(t, c, "fp32", WIDE), h)
    residual = op.mul(t, op.reshape(t, skip, h, 1), _padded(t, hidden, pad), WIDE)
    hidden = op.mul(t, hidden, op.to(t, op.reshape(t, dt, size, s, h, 1), "fp32", STEPS), WIDE)
    a = op.mul(t, a, op.to(t, dt, "fp32", STEPS), STEPS)
    given = (hidden, a, b, c)
    hidden, a, b, c = [op.reshape(t, _padded(t, x, pad), size, chunks, q, *x.shape[2:]) for x in given]
    del given
    a = op.permute(t, a, 0, 3, 1, 2)
    sums = _cumsum(t, a)
    causal = op.of_output(t, _segment_sum(t, a), PAIRS)
    pairs = _summed(
        t,
        op.mul(t, op.reshape(t, c, size, chunks, q, 1, h, n), op.reshape(t, b, size, chunks, 1, q, h, n), PAIRS),
        -1,
    )
    turned = op.reshape(t, op.permute(t, causal, 0, 2, 3, 4, 1), size, chunks, q, q, h, 1)
    weights = _summed(t, op.mul(t, op.reshape(t, pairs, size, chunks, q, q, h, 1), turned, PAIRS), -1)
    diagonal = _summed(
        t,
        op.mul(
            t, op.reshape(t, weights, size, chunks, q, q, h, 1), op.reshape(t, hidden, size, chunks, 1, q, h, p), PAIRS
        ),
        3,
    )
    last = op.narrow(t, sums, 3, 1) if q > 1 else sums
    decays = op.of_output(t, op.subtract(t, last, sums, STEPS), STEPS)
    decayed = op.mul(t, b, op.reshape(t, op.permute(t, decays, 0, 2, 3, 1), size, chunks, q, h, 1), WIDE)
    states = _summed(
        t,
        op.mul(
            t,
            op.reshape(t, decayed, size, chunks, q, h, 1, n),
            op.reshape(t, hidden, size, chunks, q, h, p, 1),
            STATES,
        ),
        2,
    )
    before = t.new((size, 1, h, p, n), "fp32", None, STATES)
    states = op.cat(t, [before, states], 1, STATES)
    between = _segment_sum(t, _padded_last(t, op.select(t, sums, 3)))
    between = op.transpose(t, op.of_output(t, between, STEPS), 1, 3)
    passed = _summed(
        t,
        op.mul(
            t,
            op.reshape(t, between, size, chunks + 1, chunks + 1, h, 1, 1),
            op.reshape(t, states, size, chunks + 1, 1, h, p, n),
            STATES,
        ),
        1,
    )
    states = op.narrow(t, passed, 1, chunks)
    decay_out = op.of_output(t, sums, STEPS)
    products = op.mul(
        t, op.reshape(t, c, size, chunks, q, h, 1, n), op.reshape(t, states, size, chunks, 1, h, p, n), STATES
    )
    off = op.mul(
        t,
        _summed(t, products, -1),
        op.reshape(t, op.permute(t, decay_out, 0, 2, 3, 1), size, chunks, q, h, 1),
        SCANNED,
    )
    out = op.add(t, diagonal, off, SCANNED)
    out = op.reshape(t, out, size, s + pad, h, p)
    out = op.add(t, out, residual, SCANNED)
    return op.narrow(t, out, 1, s)


def _summed(t: Tape, x: Tensor, dim: int) -> Tensor:
    return selection.total(t, x, dim, False, PAIRS)


def _clamp(t: Tape, x: Tensor) -> Tensor:
    node = t.record(op._clipped, (x,), x)
    return op.attach(t.elementwise(x, tag=STEPS), node)


def _repeated(t: Tape, x: Tensor, heads: int) -> Tensor:
    """`repeat_interleave`: every group's for each of its heads."""
    b, s, g, n = x.shape
    wide = op.expand(t, op.reshape(t, x, b, s, g, 1, n), b, s, g, heads // g, n)
    return op.reshape(t, op.clone(t, wide, True, WIDE), b, s, heads, n)


def _padded(t: Tape, x: Tensor, pad: int) -> Tensor:
    return _grown(t, x, (x.shape[0], x.shape[1] + pad, *x.shape[2:]))


def _padded_last(t: Tape, x: Tensor) -> Tensor:
    return _grown(t, x, (*x.shape[:-1], x.shape[-1] + 1))


def _grown(t: Tape, x: Tensor, shape: Shape) -> Tensor:
    node = t.record(partial(_cut, x.shape), (x,))
    return op.attach(t.new(shape, x.dtype, None, WIDE), node)


def _cut(shape: Shape, t: Tape, saved: Saved, grads: op.Grads) -> op.Found:
    return (t.new(shape, op.first(grads).dtype),)


def _cumsum(t: Tape, x: Tensor, tag: Tag = STEPS) -> Tensor:
    node = t.record(_sums_again, (x,))
    return op.attach(t.new(x.shape, x.dtype, None, tag), node)


def _sums_again(t: Tape, saved: Saved, grads: op.Grads) -> op.Found:
    flipped = t.like(op.first(grads))
    summed = t.new(flipped.shape, flipped.dtype)
    return (t.like(summed),)


def _segment_sum(t: Tape, x: Tensor) -> Tensor:
    """Sums over every pair of tokens of a chunk, the later ones masked."""
    q = x.shape[-1]
    x = op.expand(t, op.reshape(t, x, *x.shape, 1), *x.shape, q)
    mask = _lower(t, q)
    x = selection.masked(t, x, t.like(mask, tag=PAIRS), PAIRS)
    sums = _cumsum(t, x, PAIRS)
    mask = _lower(t, q)
    return selection.masked(t, sums, t.like(mask, tag=PAIRS), PAIRS)


def _lower(t: Tape, q: int) -> Tensor:
    ones = t.new((q, q), "bool", None, PAIRS)
    lower = t.new((q, q), "bool", None, PAIRS)
    del ones
    return lower
