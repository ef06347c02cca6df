"""Mamba's mixer with gradients, by its fused kernels: what `mamba_inner_fn` allocates and keeps.

b sequences of s tokens, d channels, state N, rank r of Δ. Source: state-spaces/mamba 2.2, selective_scan_interface.py
`MambaInnerFn`, csrc/selective_scan; transformers 5.17, models/mamba/modeling_mamba.py.
"""

from typing import Final

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training.blocks import unknown
from hfvram.memory.training.states import Weights
from hfvram.memory.training.tape import Saved, Tape
from hfvram.memory.training.tensors import Tensor, viewed
from hfvram.model.layers import Mamba1

INNER: Final = "state-spaces/mamba 2.2: selective_scan_interface.py MambaInnerFn"
PROJECTED = Tag("state space, projected input", "activations", "b·s·2·d·e", INNER)
CONVOLVED = Tag("state space, convolution", "activations", "b·s·d·e", INNER)
SELECTED = Tag("state space, Δ, B and C", "activations", "b·s·(r+2·N)·e", INNER)
STATES = Tag("state space, states", "activations", "b·d·⌈s/2048⌉·2·N·4", INNER)
SCANNED = Tag("state space, output of the scan", "activations", "b·s·d·e", INNER)
DECAY = Tag("state space, decay", "activations", "d·N·4", "transformers 5.17: MambaMixer.forward")
OUT = Tag("state space, projected output", "activations", "b·s·h·e", INNER)
SCAN_CHUNK: Final = 2048
"""Tokens between the states that the selective scan keeps."""


def decay(t: Tape, a_log: Tensor) -> Tensor:
    """−exp(A_log) in fp32."""
    return op.negative(t, op.of_output(t, op.to(t, a_log, "fp32", DECAY), DECAY), DECAY)


def mamba(t: Tape, part: Mamba1, w: Weights, x: Tensor) -> Tensor:
    """A whole mixer over its normed input (b, s, h)."""
    a_log, skip = w.take(), w.take()
    conv = w.take()
    conv_bias = w.bias()
    projected = op.transpose(t, w.linear(t, x, PROJECTED), 1, 2)
    a = decay(t, a_log)
    x_proj, dt_proj, dt_bias, out_proj = w.take(), w.take(), w.take(), w.take()
    if w.rest:
        raise unknown("a bias of the output's projection, or norms of Δ, B and C, in Mamba's fused kernel")
    skip = op.to(t, skip, "fp32", DECAY)
    return _inner(t, projected, conv, conv_bias, x_proj, dt_proj, out_proj, a, skip, op.to(t, dt_bias, "fp32", DECAY))


def _inner(
    t: Tape,
    xz: Tensor,
    conv: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    out_proj: Tensor,
    a: Tensor,
    skip: Tensor,
    bias: Tensor,
) -> Tensor:
    """Of the projected input (b, 2·d, s); under autocast it casts its own weights."""
    given = op.there(xz, conv, conv_bias, x_proj, dt_proj, out_proj, a, skip, bias)
    node = t.record(_inner_gradients, given)
    low = t.autocast
    if low is not None:
        x_proj, dt_proj, out_proj = [
            p if p.dtype == low else t.like(p, low, PROJECTED) for p in (x_proj, dt_proj, out_proj)
        ]
    if xz.strides[-1] != 1:
        xz = t.new(xz.shape, xz.dtype, None, PROJECTED)
    b, d, s = xz.shape[0], xz.shape[1] // 2, xz.shape[2]
    state = a.shape[1]
    convolved = t.new((b, d, s), xz.dtype, None, CONVOLVED)
    joined = rows(t, convolved)
    t.multiplies()
    selected = t.new((b * s, x_proj.shape[0]), x_proj.dtype, None, SELECTED)
    del joined
    delta = t.new((d, b * s), x_proj.dtype, None, SELECTED)
    by_token = [t.new((b, 1, state, s), x_proj.dtype, None, SELECTED) for _ in range(2)]
    out = t.new((b, d, s), xz.dtype, None, SCANNED)
    states = t.new((b, d, -(-s // SCAN_CHUNK), 2 * state), "fp32", None, STATES)
    gated = t.new((b, d, s), xz.dtype, None, SCANNED)
    del delta
    turned = rows(t, gated) if low is None else gated  # a weight without gradient is not folded into one product
    result = t.new((b, s, out_proj.shape[0]), xz.dtype, None, OUT)
    del turned, convolved, gated
    t.keep(node, xz, conv, conv_bias, selected, x_proj, dt_proj, out_proj, a, *by_token, skip, bias, states, out)
    return op.attach(result, node)


def _inner_gradients(t: Tape, saved: Saved, grads: op.Grads) -> op.Found:
    xz, conv, *conv_bias, selected, x_proj, dt_proj, out_proj, a, _b, _c, skip, bias, _states, out = op.there(*saved)
    grad, dtype = op.only(grads), selected.dtype
    (b, d, s), (state, rank) = out.shape, (a.shape[1], dt_proj.shape[1])
    t.multiplies()
    convolved = t.like(out)
    _delta = t.new((d, b * s), dtype)
    d_xz = t.like(xz)
    d_y = t.new((d, b * s), grad.dtype)
    d_conv, _d_delta = t.like(out), t.new((d, b * s), dtype)
    d_a = t.like(a)
    wide = [t.new((b, 1, state, s), "fp32") for _ in range(2)]
    d_skip, d_bias = t.like(skip), t.like(bias)
    gated = t.like(out)
    _narrow = [x if dtype == "fp32" else t.like(x, dtype) for x in wide]
    joined = rows(t, gated)
    d_out_proj = t.new(out_proj.shape, grad.dtype)
    del joined
    _d_selected = t.like(selected)
    if b > 1:
        for _ in range(2):
            turned = t.new((b * s, state), dtype)
            del turned
    d_dt_proj = t.new(dt_proj.shape, dtype)
    product = t.new((b * s, rank), dtype)
    del product
    flat = d_conv if b == 1 else t.new((d, b * s), d_conv.dtype)
    joined = rows(t, convolved)
    d_x_proj = t.new(x_proj.shape, dtype)
    del joined
    if flat.dtype != dtype:
        product = t.new((d, b * s), dtype)
        del product
    del d_y
    conv_grads = [t.like(x) for x in (conv, *conv_bias)]
    return [d_xz, *conv_grads, d_x_proj, d_dt_proj, d_out_proj, d_a, d_skip, d_bias]


def rows(t: Tape, x: Tensor) -> Tensor:
    """(b, d, s) as (b·s, d): copied where several sequences must be joined."""
    b, d, s = x.shape
    turned = x.as_((b, s, d), (x.strides[0], x.strides[2], x.strides[1]))
    strides = viewed(turned.shape, turned.strides, (b * s, d))
    return turned if strides is not None else t.new((b * s, d), x.dtype)
