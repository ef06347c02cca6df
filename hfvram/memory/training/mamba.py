"""Mamba's mixer with gradients, piece by piece: where one kernel for all of it doesn't fit (Jamba) or none is there.

b sequences of s tokens, d channels, state N, rank r of Δ. Source: transformers 5.17, models/mamba/modeling_mamba.py and
models/{falcon_mamba, jamba}; causal-conv1d 1.5; state-spaces/mamba 2.2, selective_scan_interface.py.
"""

from hfvram.memory.training import operators as op
from hfvram.memory.training.blocks import NORM, NORMED, VARIANCE, rms_norm
from hfvram.memory.training.selective_scan import (
    CONVOLVED,
    DECAY,
    OUT,
    PROJECTED,
    SCAN_CHUNK,
    SCANNED,
    SELECTED,
    STATES,
    decay,
)
from hfvram.memory.training.selective_scan_fallback import scan
from hfvram.memory.training.states import Weights
from hfvram.memory.training.tape import Saved, Tape
from hfvram.memory.training.tensors import Tensor
from hfvram.model.layers import Mamba1


def pieces(t: Tape, part: Mamba1, w: Weights, x: Tensor, fused: bool) -> Tensor:
    """A whole mixer over its normed input (b, s, h), by the kernels of its pieces or without any."""
    dtype = x.dtype
    a_log, skip, conv = w.take(), w.take(), w.take()
    conv_bias = w.bias()
    projected = op.transpose(t, w.linear(t, x, PROJECTED), 1, 2)
    a = decay(t, a_log)
    x_proj, dt_proj, dt_bias = w.take(), w.take(), w.take()
    if not w.norms:  # Jamba's norms have weights
        offered = op.to(t, skip, "fp32", DECAY), op.to(t, dt_bias, "fp32", DECAY)
        del offered  # to a kernel that isn't there
    d = projected.shape[1] // 2
    hidden, gate = op.split(t, projected, 1, d, d)
    hidden = convolution(t, hidden, conv, conv_bias, fused)
    hidden = op.transpose(t, hidden, 1, 2)
    rank, state = part.dt_rank, part.d_state
    step, b, c = op.split(t, op.linear(t, hidden, x_proj, None, SELECTED), -1, rank, state, state)
    if part.inner_norms:
        step, b, c = [rms_norm(t, x, w.norm()[0]) if w.norms else _weightless(t, x) for x in (step, b, c)]
    step = _product(t, step, dt_proj)
    wide_bias = op.to(t, dt_bias, "fp32", DECAY)
    run = kernel if fused else scan
    out = run(t, op.transpose(t, hidden, 1, 2), step, a, b, c, op.to(t, skip, "fp32", DECAY), gate, wide_bias)
    return w.linear(t, op.to(t, op.transpose(t, out, 1, 2), dtype, SCANNED), OUT)


def _product(t: Tape, x: Tensor, weight: Tensor) -> Tensor:
    """weight · xᵀ: rows of x by the weight, turned by a copy."""
    x = op.low(t, x)
    return op.dense(t, op.transpose(t, op.linear(t, x, weight, None, SELECTED), 1, 2), SELECTED)


def _weightless(t: Tape, x: Tensor) -> Tensor:
    """Falcon-Mamba's norms."""
    return op.to(t, _normed(t, op.to(t, x, "fp32", NORM)), x.dtype, NORMED)


def _normed(t: Tape, x: Tensor) -> Tensor:
    shifted = op.shift(t, op.mean(t, op.power(t, x, NORM), VARIANCE), VARIANCE)
    factor = op.rsqrt(t, shifted, VARIANCE)
    del shifted
    return op.mul(t, x, factor, NORM)


def convolution(t: Tape, x: Tensor, weight: Tensor, bias: Tensor | None, fused: bool, activated: bool = True) -> Tensor:
    """Causal, over x (b, d, s), with its activation: one kernel, or padded at both ends, of which one is cut off."""
    dtype, s = x.dtype, x.shape[2]
    flat = op.reshape(t, weight, weight.shape[0], weight.shape[2])
    if fused:
        return _convolved(t, x, flat, bias)
    x = op.to(t, x, weight.dtype, CONVOLVED)
    out = op.convolution(t, x, op.reshape(t, flat, *weight.shape), bias, CONVOLVED)
    del x
    out = op.narrow(t, out, 2, s)
    return op.to(t, op.of_input(t, out, CONVOLVED) if activated else out, dtype, CONVOLVED)


def _convolved(t: Tape, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`causal_conv1d_fn`: its output lies as its input does."""
    given = op.there(x, weight, bias)
    node = t.record(_convolution_gradients, given)
    if 1 not in x.strides[1:]:
        x = t.new(x.shape, x.dtype, None, CONVOLVED)
    t.keep(node, x, weight, bias)
    return op.attach(t.like(x, None, CONVOLVED), node)


def _convolution_gradients(t: Tape, saved: Saved, grads: op.Grads) -> op.Found:
    _grad = op.only(grads)
    return [t.like(x) for x in op.there(*saved)]


def kernel(
    t: Tape, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """`selective_scan_fn` over u (b, d, s): states every 2,048 tokens, output, gated output."""
    turned = op.transpose(t, b, 1, 2), op.transpose(t, c, 1, 2)
    node = t.record(_kernel_gradients, (u, delta, a, *turned, skip, z, bias))
    u, delta, b, c, z = [_last_dense(t, x) for x in (u, delta, *turned, z)]
    out = t.like(delta, None, SCANNED)
    n, d, s = u.shape
    states = t.new((n, d, -(-s // SCAN_CHUNK), 2 * a.shape[1]), "fp32", None, STATES)
    gated = t.like(z, None, SCANNED)
    t.keep(node, u, delta, a, b, c, skip, z, bias, states, out)
    return op.attach(gated, node)


def _last_dense(t: Tape, x: Tensor) -> Tensor:
    return x if x.strides[-1] == 1 else t.new(x.shape, x.dtype, None, SELECTED)


def _kernel_gradients(t: Tape, saved: Saved, grads: op.Grads) -> op.Found:
    u, delta, a, b, c, skip, z, bias, _states, _out = op.there(*saved)
    grad = op.only(grads)
    copied = _last_dense(t, grad)
    del copied
    found = [t.like(x) for x in (u, delta, a)]
    wide = [t.like(x, "fp32") for x in (b, c)]
    rest = [t.like(x) for x in (skip, z, bias)]
    narrow = [x if b.dtype == "fp32" else t.like(x, b.dtype) for x in wide]
    return [*found, *narrow, *rest]
