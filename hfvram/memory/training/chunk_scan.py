"""Mamba-2's mixer with gradients, by its Triton kernels: what they allocate and keep, forward and backward.

b sequences of s tokens, h heads of p, g groups, state n, c chunks of q tokens. Source: state-spaces/mamba 2.2,
ops/triton/ssd_combined.py and its neighbours; transformers 5.17, models/mamba2/modeling_mamba2.py.
"""

from dataclasses import dataclass
from functools import partial
from typing import Final

from hfvram.memory.ssm import tune as tuned
from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training.blocks import unknown
from hfvram.memory.training.selective_scan import decay
from hfvram.memory.training.states import Weights
from hfvram.memory.training.tape import Node, Saved, Tape
from hfvram.memory.training.tensors import Tensor
from hfvram.model.layers import Mamba2

COMBINED: Final = "state-spaces/mamba 2.2: ssd_combined.py"
PROJECTED = Tag("state space, projected input", "activations", "b·s·(2·h·p+2·g·n+h)·e", COMBINED)
CONVOLVED = Tag("state space, convolution", "activations", "b·s·(h·p+2·g·n)·e", COMBINED)
STEPS = Tag("state space, time steps and decays", "activations", "b·h·s·4", COMBINED)
STATES = Tag("state space, states of every chunk", "activations", "b·c·h·p·n·4", COMBINED)
PRODUCTS = Tag("state space, products within a chunk", "activations", "b·c·g·q·q·4", COMBINED)
SCANNED = Tag("state space, output of the scan", "activations", "b·s·h·p·e", COMBINED)
OUT = Tag("state space, projected output", "activations", "b·s·h·e", COMBINED)
MULTIPROCESSORS: Final = 132
"""Of a Hopper, by which the backward kernels choose how many partial sums they keep."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one scan: sequences, tokens, heads, head size, groups, state, chunk's tokens; the dtype of its inputs."""

    b: int
    s: int
    h: int
    p: int
    g: int
    n: int
    q: int
    dtype: str

    @property
    def c(self) -> int:
        return -(-self.s // self.q)

    @property
    def steps(self) -> tuple[int, ...]:
        return self.b, self.h, self.c, self.q

    @property
    def states(self) -> tuple[int, ...]:
        return self.b, self.c, self.h, self.p, self.n


def tune(t: Tape, *kernel: object) -> None:
    """The first launch of a Triton kernel for these sizes."""
    tuned(t.timeline, *kernel)


def chunks(t: Tape, z: Sizes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The scan's output (b, s, h·p), time steps, cumulative decays and last states."""
    steps, decays = t.new(z.steps, "fp32", None, STEPS), t.new(z.steps, "fp32", None, STEPS)
    tune(t, "chunk cumsum", z.q, z.h)
    states = t.new(z.states, "fp32", None, STATES)
    tune(t, "chunk state", z.q, z.p, z.n)
    passed, last = t.new(z.states, z.dtype, None, STATES), t.new((z.b, z.h, z.p, z.n), "fp32", None, STATES)
    tune(t, "state passing", z.p * z.n)
    del states
    products = t.new((z.b, z.c, z.g, z.q, z.q), "fp32", None, PRODUCTS)
    tune(t, "chunk products", z.q, z.n)
    out = t.new((z.b, z.s, z.h * z.p), z.dtype, None, SCANNED)
    tune(t, "chunk scan", z.q, z.p, z.n)
    del passed, products
    return out, steps, decays, last


def chunk_gradients(t: Tape, z: Sizes, bias: Tensor | None, skip: Tensor | None, given: bool) -> list[Tensor | None]:
    """Gradients of x, dt, A, B, C, D and the bias; the first, second, fourth and fifth None where the caller has
    memory for them."""
    b, s, h, p, g, n, q, c = z.b, z.s, z.h, z.p, z.g, z.n, z.q, z.c
    d_b = None if given else t.new((b, s, g, n), z.dtype)
    d_c = None if given else t.new((b, s, g, n), z.dtype)
    d_dt = None if given else t.new((b, s, h), z.dtype)
    clone = t.new((b, s, h), z.dtype)
    steps, decays = t.new(z.steps, "fp32"), t.new(z.steps, "fp32")
    products = t.new((b, c, g, q, q), "fp32")
    states = t.new(z.states, "fp32")
    passed, last = t.new(z.states, "fp32"), t.new((b, h, p, n), "fp32")
    states = passed
    del passed, last
    d_states = t.new(z.states, "fp32")
    tune(t, "gradients of states", p, n, q)
    low, converted = t.new(z.states, z.dtype), t.new(z.states, z.dtype)
    by_chunk = t.new((b, h, c, -(-p * n // 64)), "fp32")
    tune(t, "backward state passing", p * n)
    by_chunk = t.new((b, h, c), "fp32")
    d_states, states = low, converted
    del low, converted
    partial_d = t.new((-(-q // 32), b, c, h, 1), "fp32")
    d_x = None if given else t.new((b, s, h * p), z.dtype)
    d_steps = t.new(z.steps, "fp32")
    tune(t, "gradient of x", q, p, n)
    d_skip = None if skip is None else _skip_gradient(t, h, skip.dtype)
    del partial_d
    ratio = h // g
    splits = -(-ratio // max(min(-(-b * c * h // MULTIPROCESSORS), ratio), 1))
    next_sums = t.new(z.steps, "fp32")
    part = t.new((b, s, splits, g, n), "fp32")
    tune(t, "gradient of B", q, n, p)
    wide_b = t.new((b, s, g, n), "fp32")
    part = t.new((b, s, splits, g, n), "fp32")
    previous = t.new(z.steps, "fp32")
    tune(t, "gradient of C", q, n, p)
    wide_c = t.new((b, s, g, n), "fp32")
    part = t.new((b, c, splits, g, q, q), "fp32")
    tune(t, "gradient of the products", q, p)
    d_products = t.new((b, c, g, q, q), "fp32")
    del part
    tune(t, "backward products", q, n)
    del wide_b, wide_c, d_products
    previous = _reversed_sums(t, z)
    sums = t.new((b, h, c, -(-q // 32), q), "fp32")
    tune(t, "gradient of the decays", q, p)
    sums = t.new(z.steps, "fp32")
    d_a, d_bias = t.new((h,), "fp32"), None if bias is None else t.new((h,), "fp32")
    tune(t, "backward chunk cumsum", q, h)
    del clone, steps, decays, products, states, d_states, by_chunk, d_steps, next_sums, previous, sums
    if bias is not None and bias.dtype != "fp32":
        d_bias = t.new((h,), bias.dtype)
    return [d_x, d_dt, d_a, d_b, d_c, d_skip, d_bias]


def _skip_gradient(t: Tape, h: int, dtype: str) -> Tensor:
    wide = t.new((h, 1), "fp32")
    found = t.new((h,), "fp32")
    del wide
    return found if dtype == "fp32" else t.new((h,), dtype)


def _reversed_sums(t: Tape, z: Sizes) -> Tensor:
    flipped = t.new(z.steps, "fp32")
    summed = t.new(z.steps, "fp32")
    del flipped
    found = t.new(z.steps, "fp32")
    del summed
    return found


def mamba2(t: Tape, part: Mamba2, w: Weights, x: Tensor) -> Tensor:
    """A whole mixer over its normed input (b, s, hidden): projection, then one function for all else."""
    dt_bias, a_log, skip, conv = w.take(), w.take(), w.take(), w.take()
    conv_bias = w.bias()
    projected = w.linear(t, x, PROJECTED)
    a = decay(t, a_log)
    conv = op.reshape(t, conv, conv.shape[0], conv.shape[2])
    norm = w.norm()[0] if part.gated_norm else None
    out_proj = w.take()
    if w.rest:
        raise unknown("a bias of the output's projection in Mamba-2's fused kernel")
    return _split_scan(t, part, projected, (conv, conv_bias, dt_bias, a, skip, norm, out_proj))


def _split_scan(t: Tape, part: Mamba2, projected: Tensor, given: tuple[Tensor | None, ...]) -> Tensor:
    """Convolution, scan, gated norm and output projection in one; the projected input, the scan's output and the
    norm's scale are kept, the rest is computed again."""
    conv, conv_bias, dt_bias, a, skip, norm, out_proj = given
    assert out_proj is not None
    inputs = [projected, *[x for x in given if x is not None]]
    b, s, _ = projected.shape
    z = Sizes(b, s, part.heads, part.head_dim, part.groups, part.d_state, part.chunk_size, projected.dtype)
    node: Node | None = t.record(partial(_split_gradients, z, out_proj.dtype), inputs)
    convolved = t.new((b, s, part.conv_dim), projected.dtype, None, CONVOLVED)
    out, *beside = chunks(t, z)
    scale, result = None, out
    if norm is not None:
        result, scale = t.like(out, None, SCANNED), t.new((z.g * b * s,), "fp32", None, STEPS)
    weight, low = out_proj, t.autocast
    if low is not None:
        result = result if result.dtype == low else t.like(result, low, SCANNED)
        weight = weight if weight.dtype == low else t.like(weight, low, PROJECTED)
    t.multiplies()
    product = t.new((b, s, weight.shape[0]), result.dtype, None, OUT)
    del convolved, beside, result
    t.keep(node, projected, conv, conv_bias, out, a, skip, dt_bias, norm, scale, weight)
    return op.attach(product, node)


def _split_gradients(z: Sizes, dtype: str, t: Tape, saved: Saved, grads: op.Grads) -> op.Found:
    projected, conv, conv_bias, out, _, skip, bias, norm, _, weight = saved
    projected, conv, out, weight = op.there(projected, conv, out, weight)
    grad = op.only(grads)
    again = t.like(out)
    convolved = t.new((z.b, z.s, conv.shape[0]), z.dtype)
    d_projected = t.like(projected)
    _d_convolved = t.new(convolved.shape, z.dtype)
    t.multiplies()
    d_out = t.new((z.b, z.s, z.h * z.p), grad.dtype)
    d_norm = None
    if norm is not None:
        normed, rows = t.like(again), t.new((MULTIPROCESSORS, z.h * z.p), "fp32")
        d_norm = _norm_gradient(t, norm)
        d_out = normed
        del normed, rows
    inner = chunk_gradients(t, z, bias, skip, given=True)
    d_weight = t.new(weight.shape, grad.dtype)
    if dtype != d_weight.dtype:
        d_weight = t.like(d_weight, dtype)
    del d_out
    d_conv, d_conv_bias = t.like(conv), None if conv_bias is None else t.like(conv_bias)
    found = [d_conv, d_conv_bias, inner[6], inner[2], inner[5], d_norm, d_weight]
    return [d_projected, *[x for x in found if x is not None]]


def _norm_gradient(t: Tape, norm: Tensor) -> Tensor:
    found = t.new(norm.shape, "fp32")
    return found if norm.dtype == "fp32" else t.like(found, norm.dtype)
