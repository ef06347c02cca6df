"""Mamba's selective scan by its CUDA kernels, alone and with the mixer around it: what each allocates, in their order.

b sequences of s tokens, d channels, state N. Source: state-spaces/mamba 2.2, selective_scan_interface.py and
csrc/selective_scan.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from hfvram.memory.exact.kernels import empty

if TYPE_CHECKING:
    from hfvram.memory.exact.run import Run

SCAN_CHUNK = 2048
"""Tokens between the states that the selective scan keeps."""


def last_contiguous(tensor: Any) -> Any:
    """The tensor, copied where its last dimension does not lie together."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def alike(tensor: Any) -> Any:
    """A gradient of this tensor, None for none."""
    return None if tensor is None else torch.empty_like(tensor)


class SelectiveScan(torch.autograd.Function):  # type: ignore[misc]
    """`selective_scan_fn` over u (b, d, s): states every 2,048 tokens, output, gated output."""

    @staticmethod
    def forward(ctx: Any, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, bias: Any) -> Any:
        u, delta, B, C, z = (last_contiguous(t) for t in (u, delta, B, C, z))
        out, states = torch.empty_like(delta), scan_states(u, A)
        gated = alike(z)
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, states, out)
        ctx.set_materialize_grads(False)
        return (out if z is None else gated), states[:, :, -1, 1::2]

    @staticmethod
    def backward(ctx: Any, grad: Any, _: Any) -> Any:
        u, delta, A, B, C, D, z, bias, _states, _out = ctx.saved_tensors
        last_contiguous(grad)
        first = [alike(t) for t in (u, delta, A)]
        wide = [torch.empty_like(t, dtype=torch.float32) for t in (B, C)]
        rest = [alike(t) for t in (D, z, bias)]
        return (*first, wide[0].to(B.dtype), wide[1].to(C.dtype), *rest)


def scan_states(u: Any, A: Any) -> Any:
    """fp32 (b, d, ⌈s/2048⌉, 2·N): running product and state at each chunk's end."""
    b, d, s = u.shape
    return empty(b, d, -(-s // SCAN_CHUNK), 2 * A.shape[1])


def selective_scan(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    delta_bias: Any = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Any:
    """`selective_scan_fn`, with the last state where it is asked for."""
    out, last = SelectiveScan.apply(u, delta, A, B, C, D, z, delta_bias)
    return (out, last) if return_last_state else out


class MambaInner(torch.autograd.Function):  # type: ignore[misc]
    """`mamba_inner_fn`: a whole mixer after its first projection; what is cheap is computed again in the backward."""

    @staticmethod
    def forward(
        ctx: Any, xz: Any, conv: Any, conv_bias: Any, x_proj: Any, dt_proj: Any, out_proj: Any, *rest: Any
    ) -> Any:
        A, D, bias, low = rest
        if low is not None:  # under autocast the function casts its own weights
            x_proj, dt_proj, out_proj = (w.to(low) for w in (x_proj, dt_proj, out_proj))
        xz = last_contiguous(xz)
        rank, n = dt_proj.shape[1], A.shape[1]
        b, d, s = xz.shape[0], xz.shape[1] // 2, xz.shape[2]
        convolved = empty(b, d, s, dtype=xz.dtype)
        x_dbl = F.linear(rows(convolved).to(x_proj.dtype), x_proj)
        delta = (dt_proj @ x_dbl[:, :rank].t()).view(d, b, s).transpose(0, 1)
        B, C = (by_token(x_dbl[:, rank + i * n : rank + (i + 1) * n], b) for i in range(2))
        out, states = torch.empty_like(convolved), scan_states(convolved, A)
        gated = torch.empty_like(convolved)
        ctx.save_for_backward(xz, conv, conv_bias, x_dbl, x_proj, dt_proj, out_proj, A, B, C, D, bias, states, out)
        del delta
        return F.linear(gated.transpose(1, 2).to(out_proj.dtype), out_proj)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        xz, conv, conv_bias, x_dbl, x_proj, dt_proj, out_proj, A, B, C, D, bias, _, out = ctx.saved_tensors
        b, d, s = out.shape
        rank, n = dt_proj.shape[1], A.shape[1]
        convolved = torch.empty_like(out)
        delta = dt_proj @ x_dbl[:, :rank].t()
        d_xz = torch.empty_like(xz)
        grad = grad.permute(2, 0, 1).reshape(grad.shape[-1], b * s)
        d_y = (out_proj.t() @ grad).view(d, b, s).transpose(0, 1)
        d_conv, d_delta = torch.empty_like(convolved), torch.empty_like(delta)
        small = [alike(A), *(torch.empty_like(t, dtype=torch.float32) for t in (B, C)), alike(D), alike(bias)]
        gated = torch.empty_like(out)
        narrow = [small[1].to(B.dtype), small[2].to(C.dtype)]
        d_out_proj = torch.mm(grad, rows(gated).to(grad.dtype))
        d_x_dbl = torch.empty_like(x_dbl)
        for i, part in enumerate(narrow):
            d_x_dbl[:, rank + i * n : rank + (i + 1) * n] = part.view(b, n, s).transpose(1, 2).reshape(b * s, n)
        d_dt_proj = torch.mm(d_delta, x_dbl[:, :rank])
        d_x_dbl[:, :rank] = torch.mm(d_delta.t(), dt_proj)
        flat = d_conv.transpose(0, 1).reshape(d, b * s)
        d_x_proj = torch.mm(d_x_dbl.t(), rows(convolved).to(d_x_dbl.dtype))
        if flat.dtype == x_proj.dtype:
            torch.addmm(flat, x_proj.t(), d_x_dbl.t(), out=flat)
        else:
            flat.copy_(torch.mm(x_proj.t(), d_x_dbl.t()))
        del d_y
        return d_xz, alike(conv), alike(conv_bias), d_x_proj, d_dt_proj, d_out_proj, small[0], small[3], small[4], None


def rows(x: Any) -> Any:
    """(b, d, s) as (b·s, d): copied where several sequences must be joined."""
    return x.transpose(1, 2).reshape(-1, x.shape[1])


def by_token(x: Any, batch: int) -> Any:
    """(b·s, N) as a contiguous (b, 1, N, s)."""
    return x.reshape(batch, -1, x.shape[1]).transpose(1, 2).unsqueeze(1).contiguous()


def inner(run: "Run") -> Callable[..., Any]:
    """`mamba_inner_fn` of this run, which knows whether autocast is on."""

    def mamba_inner(
        xz: Any,
        conv: Any,
        conv_bias: Any,
        x_proj: Any,
        dt_proj: Any,
        out_proj: Any,
        out_proj_bias: Any,
        A: Any,
        B: Any = None,
        C: Any = None,
        D: Any = None,
        delta_bias: Any = None,
        **_: Any,
    ) -> Any:
        low = run.autocast.dtype if run.autocast.on else None
        return MambaInner.apply(xz, conv, conv_bias, x_proj, dt_proj, out_proj, A, D, delta_bias, low)

    return mamba_inner
