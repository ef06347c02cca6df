"""Mamba-2's chunked scan by its Triton kernels: what each allocates, in their order, forward and backward.

b sequences of s tokens, h heads of p, g groups, state n, c chunks of q tokens. Source: state-spaces/mamba 2.2,
ops/triton/ssd_combined.py and its neighbours; each kernel's autotuner runs at its first launch.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from hfvram.memory.exact.kernels import empty

if TYPE_CHECKING:
    from hfvram.memory.exact.run import Run

MULTIPROCESSORS = 132
"""Of a Hopper, by which the backward kernels choose how many partial sums they keep."""
Tune = Callable[..., None]


def contiguous(tensor: Any, dtype: Any = None) -> Any:
    """An empty tensor of this shape, in its dtype or another; None for none."""
    return None if tensor is None else empty(*tensor.shape, dtype=dtype or tensor.dtype)


def forward_chunks(tune: Tune, x: Any, B: Any, q: int) -> tuple[Any, Any, Any, Any]:
    """Output, time steps, cumulative decays and final states of x (b, s, h, p)."""
    (b, s, h, p), (g, n) = x.shape, B.shape[2:]
    c = -(-s // q)
    steps, decays = empty(b, h, c, q), empty(b, h, c, q)
    tune("chunk cumsum", q, h)
    states = empty(b, c, h, p, n)
    tune("chunk state", q, p, n)
    passed, last = empty(b, c, h, p, n, dtype=B.dtype), empty(b, h, p, n)
    tune("state passing", p * n)
    del states
    products = empty(b, c, g, q, q)
    tune("chunk products", q, n)
    out = contiguous(x)
    tune("chunk scan", q, p, n)
    del passed, products
    return out, steps, decays, last


def backward_chunks(tune: Tune, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, bias: Any, q: int, given: Any) -> Any:
    """Gradients of x, dt, A, B, C, D and the bias. `given` are those of x, dt, B and C where the caller has them."""
    (b, s, h, p), (g, n) = x.shape, B.shape[2:]
    c = -(-s // q)
    d_x, d_dt, d_B, d_C = given
    d_B, d_C = (contiguous(B) if d_B is None else d_B), (contiguous(C) if d_C is None else d_C)
    d_dt = contiguous(dt) if d_dt is None else d_dt
    clone = contiguous(dt)
    steps, decays = empty(b, h, c, q), empty(b, h, c, q)
    products = empty(b, c, g, q, q)
    states = empty(b, c, h, p, n)
    passed, last = empty(b, c, h, p, n), empty(b, h, p, n)
    states = passed
    del passed, last
    d_states = empty(b, c, h, p, n)
    tune("gradients of states", p, n, q)
    low, converted = contiguous(d_states, x.dtype), contiguous(states, x.dtype)
    by_chunk = empty(b, h, c, -(-p * n // 64))
    tune("backward state passing", p * n)
    by_chunk = by_chunk.sum(-1)
    d_states, states = low, converted
    del low, converted
    partial_D = empty(-(-q // 32), b, c, h, 1)
    d_x = contiguous(x) if d_x is None else d_x
    d_steps = empty(b, h, c, q)
    tune("gradient of x", q, p, n)
    d_D = None if D is None else partial_D.sum((0, 1, 2)).sum(-1).to(D.dtype)
    del partial_D
    ratio = h // g
    splits = -(-ratio // max(min(-(-b * c * h // MULTIPROCESSORS), ratio), 1))
    next_sums = empty(b, h, c, q)
    partial = empty(b, s, splits, g, n)
    tune("gradient of B", q, n, p)
    wide_B = partial.sum(2)
    partial = empty(b, s, splits, g, n)
    previous = empty(b, h, c, q)
    tune("gradient of C", q, n, p)
    wide_C = partial.sum(2)
    partial = empty(b, c, splits, g, q, q)
    tune("gradient of the products", q, p)
    d_products = partial.sum(2)
    del partial
    tune("backward products", q, n)
    del wide_B, wide_C, d_products
    previous = previous.flip([-1]).cumsum(-1).flip([-1])
    sums = empty(b, h, c, -(-q // 32), q)
    tune("gradient of the decays", q, p)
    sums = sums.sum(3)
    d_A, d_bias = empty(h), None if bias is None else empty(h)
    tune("backward chunk cumsum", q, h)
    del clone, steps, decays, products, states, d_states, by_chunk, d_steps, next_sums, previous, sums
    return d_x, d_dt, d_A.to(A.dtype), d_B, d_C, d_D, None if d_bias is None else d_bias.to(bias.dtype)


class ChunkScan(torch.autograd.Function):  # type: ignore[misc]
    """`mamba_chunk_scan_combined`: keeps its inputs, its output and the cumulative decays."""

    @staticmethod
    def forward(ctx: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, bias: Any, q: int, tune: Tune) -> Any:
        out, _, decays, last = forward_chunks(tune, x, B, q)
        ctx.save_for_backward(out, x, dt, decays, A, B, C, D, bias)
        ctx.q, ctx.tune = q, tune
        ctx.set_materialize_grads(False)
        return out, last

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        _out, x, dt, _decays, A, B, C, D, bias = ctx.saved_tensors
        grads = backward_chunks(ctx.tune, x, dt, A, B, C, D, bias, ctx.q, (None,) * 4)
        return (*grads, None, None)


def chunk_scan(tune: Tune) -> Callable[..., Any]:
    """`mamba_chunk_scan_combined` of (b, s, h, p)."""

    def scan(
        x: Any,
        dt: Any,
        A: Any,
        B: Any,
        C: Any,
        chunk_size: int,
        D: Any = None,
        z: Any = None,
        dt_bias: Any = None,
        return_final_states: bool = False,
        **_: Any,
    ) -> Any:
        out, last = ChunkScan.apply(x, dt, A, B, C, D, dt_bias, chunk_size, tune)
        return (out, last) if return_final_states else out

    return scan


class SplitScan(torch.autograd.Function):  # type: ignore[misc]
    """`mamba_split_conv1d_scan_combined`: convolution, scan, gated norm and output projection in one.

    Keeps the projected input, the scan's output and the norm's scale; the rest is computed again.
    """

    @staticmethod
    def forward(ctx: Any, projected: Any, conv: Any, conv_bias: Any, bias: Any, A: Any, D: Any, *rest: Any) -> Any:
        norm, out_proj, p, g, q, tune, low = rest
        b, s, _ = projected.shape
        width = A.shape[0] * p
        convolved = channels_first(projected, conv.shape[0])
        x, B, _ = parts(convolved, A.shape[0], p, g)
        out, steps, decays, last = forward_chunks(tune, x, B, q)
        scale = None
        result = out.view(b, s, width)
        if norm is not None:
            result, scale = torch.empty_like(result), empty(g * b * s)
        weight = out_proj
        if low is not None:
            result, weight = result.to(low), out_proj.to(low)
        result = F.linear(result, weight)
        ctx.save_for_backward(projected, conv, conv_bias, out, A, D, bias, norm, scale, weight)
        ctx.sizes, ctx.tune, ctx.weight_dtype = (p, g, q), tune, out_proj.dtype
        del steps, decays, last
        return result

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        projected, conv, conv_bias, out, A, D, bias, norm, _scale, out_proj = ctx.saved_tensors
        p, g, q = ctx.sizes
        (b, s, _), h = projected.shape, A.shape[0]
        again = empty(b, s, h * p, dtype=out.dtype)
        convolved = channels_first(projected, conv.shape[0])
        x, B, C = parts(convolved, h, p, g)
        d_projected = torch.empty_like(projected)
        d_convolved = channels_first(projected, conv.shape[0])
        d_out = F.linear(grad, out_proj.t())
        d_norm = None
        if norm is not None:
            normed = torch.empty_like(again)
            partial = empty(MULTIPROCESSORS, h * p)
            d_norm = partial.sum(0).to(norm.dtype)
            d_out = normed
            del normed, partial
        dt = projected[..., -h:]
        d_x, d_B, d_C = parts(d_convolved, h, p, g)
        grads = backward_chunks(ctx.tune, x, dt, A, B, C, D, bias, q, (d_x, d_projected[..., -h:], d_B, d_C))
        d_out_proj = torch.mm(grad.reshape(-1, grad.shape[-1]).t(), again.view(-1, h * p)).to(ctx.weight_dtype)
        del d_out
        grads = d_projected, contiguous(conv), contiguous(conv_bias), grads[6], grads[2], grads[5], d_norm, d_out_proj
        return (*grads, *(None,) * 5)


def channels_first(projected: Any, channels: int) -> Any:
    """The convolution's output, in memory as its input: (b, s, channels)."""
    return empty(*projected.shape[:2], channels, dtype=projected.dtype)


def parts(convolved: Any, h: int, p: int, g: int) -> tuple[Any, Any, Any]:
    """x, B and C as views of the convolution's output."""
    b, s, channels = convolved.shape
    n = (channels - h * p) // (2 * g)
    x, B, C = convolved.split([h * p, g * n, g * n], dim=-1)
    return x.view(b, s, h, p), B.view(b, s, g, n), C.view(b, s, g, n)


def split_scan(tune: Tune, run: "Run") -> Callable[..., Any]:
    """`mamba_split_conv1d_scan_combined` of this run, which knows whether autocast is on."""

    def scan(
        projected: Any,
        conv: Any,
        conv_bias: Any,
        dt_bias: Any,
        A: Any,
        D: Any = None,
        chunk_size: int = 256,
        rmsnorm_weight: Any = None,
        outproj_weight: Any = None,
        headdim: int = 64,
        ngroups: int = 1,
        **_: Any,
    ) -> Any:
        low = run.autocast.dtype if run.autocast.on else None
        rest = rmsnorm_weight, outproj_weight, headdim, ngroups, chunk_size, tune, low
        return SplitScan.apply(projected, conv, conv_bias, dt_bias, A, D, *rest)

    return scan
