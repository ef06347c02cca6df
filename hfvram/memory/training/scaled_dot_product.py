"""`scaled_dot_product_attention` as CUDA runs it: which kernel, what it keeps, and what its gradient makes.

Source: PyTorch 2.11, transformers/cuda/sdp_utils.cpp, attention.cpp, attention_backward.cu, cudnn/MHA.cpp; measured
on an H100 (fixtures/measured). `memory/exact/kernels.py` does the same to the models' own code.
"""

from functools import partial
from math import prod

from hfvram.memory.cuda_kernels import Kernel, attention_kernel, flash_backward_fits, round_up
from hfvram.memory.timeline import Tag
from hfvram.memory.training.operators import (
    Found,
    Grads,
    add,
    add_in_place,
    attach,
    clone,
    dropout,
    expand,
    first,
    low,
    mask,
    matmul,
    narrow,
    reshape,
    scale,
    softmax,
    to,
    transpose,
)
from hfvram.memory.training.tape import Saved, Tape
from hfvram.memory.training.tensors import Shape, Tensor, contiguous

LOG_SUM = Tag("attention, log-sum-exp", "activations", "b·a·s·4", "PyTorch 2.11: transformers/cuda/attention.cu")
SEED = Tag("attention, dropout's seed", "activations", "8", "PyTorch 2.11: transformers/cuda/attention.cu")
BIAS = Tag("attention mask as a bias", "activations", "b·s·t·e", "PyTorch 2.11: transformers/attention.cpp")


def attention(
    t: Tape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    causal: bool = False,
    gqa: bool = False,
    p: float = 0.0,
    tag: Tag | None = None,
) -> Tensor:
    """Attention of (b, heads, s, d) tensors by the kernel that PyTorch picks; `p` is the share that is dropped."""
    if bias is not None and bias.dtype != "bool":
        bias = low(t, bias)
    v = low(t, v)
    k = low(t, k)
    q = low(t, q)
    kernel = kernel_for(t, q, k, v, bias, gqa, p)
    if kernel is None:
        before, t.autocast = t.autocast, None  # autocast stays out of what it has lowered the arguments of
        out = _math(t, q, k, v, bias, causal, p, tag)
        t.autocast = before
        return out
    d = q.shape[-1]
    if kernel == "flash" and d % 8:
        q, k, v = (_padded(t, x) for x in (q, k, v))
        return narrow(t, _fused(t, q, k, v, None, kernel, tag), 3, d)
    return _fused(t, q, k, v, None if bias is None else _bias(t, bias, q), kernel, tag)


def flash(t: Tape, q: Tensor, k: Tensor, v: Tensor, tag: Tag | None = None) -> Tensor:
    """The flash-attn package's kernel, which allocates as PyTorch's copy of it does.

    Source: flash-attn 2.8, flash_attn_interface.py, csrc/flash_api.cpp; as `memory/exact/flash_attention.py` has it.
    """
    d = q.shape[-1]
    if d % 8:
        q, k, v = (_padded(t, x) for x in (q, k, v))
    return narrow(t, _fused(t, q, k, v, None, "flash", tag), 3, d)


def kernel_for(t: Tape, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, gqa: bool, p: float) -> Kernel | None:
    """The kernel that PyTorch picks, None for the math path: also for a bias that needs a gradient."""
    if bias is not None and bias.node is not None:
        return None
    return attention_kernel(
        q.dtype,
        (q.shape[1], k.shape[1], v.shape[1]),
        (q.shape[-1], v.shape[-1]),
        t.gpu,
        masked=bias is not None,
        gqa=gqa,
        narrow=flash_backward_fits(q.shape[-1], p),
    )


def _padded(t: Tape, x: Tensor) -> Tensor:
    node = t.record(partial(_unpadded, x.shape), (x,))
    return attach(t.new((*x.shape[:-1], round_up(x.shape[-1], 8)), x.dtype), node)


def _unpadded(shape: Shape, t: Tape, saved: Saved, grads: Grads) -> Found:
    return (t.new(shape, first(grads).dtype),)


def _bias(t: Tape, bias: Tensor, q: Tensor) -> Tensor:
    """A boolean mask becomes an additive one of the queries' dtype; rows are padded to a multiple of 8."""
    if bias.dtype == "bool":
        bias = t.like(bias, q.dtype, BIAS)
    if bias.shape[-1] % 8:
        wide = t.new((*bias.shape[:-1], round_up(bias.shape[-1], 8)), bias.dtype, None, BIAS)
        return wide.as_(bias.shape, wide.strides)
    return bias


def _alike(t: Tape, x: Tensor, shape: Shape, tag: Tag | None = None) -> Tensor:
    """A (b, heads, s, d) tensor of which the dimensions lie in memory as those of `x` do, as cuDNN has its output."""
    order = sorted(range(4), key=lambda i: (-x.strides[i], i))
    flat = contiguous(tuple([shape[i] for i in order]))
    return t.new(shape, x.dtype, tuple([flat[order.index(i)] for i in range(4)]), tag)


def _heads_last(t: Tape, shape: Shape, dtype: str, tag: Tag | None = None) -> Tensor:
    """A (b, heads, s, d) tensor that lies in memory as (b, s, heads, d)."""
    _, heads, s, d = shape
    return t.new(shape, dtype, (s * heads * d, d, heads * d, 1), tag)


def _fused(t: Tape, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel: Kernel, tag: Tag | None) -> Tensor:
    """A fused kernel: it keeps queries, keys, values, the bias, its output, the log-sum-exp and dropout's seed."""
    node = t.record(partial(fused_gradient, kernel), (q, k, v))
    out, log_sum, seeds = run_fused(t, kernel, q, k, v, tag, kept=kernel == "flash" or node is not None)
    t.keep(node, q, k, v, bias, out, log_sum, *seeds)
    return attach(out, node)


def run_fused(
    t: Tape, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, tag: Tag | None, kept: bool = True
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """What a kernel makes: the output, the log-sum-exp (`kept` unless no gradient needs it), dropout's seed."""
    b, heads, s, _ = q.shape
    shape = (b, heads, s, v.shape[3])
    out = _alike(t, q, shape, tag) if kernel == "cudnn" else _heads_last(t, shape, q.dtype, tag)
    rows = round_up(s, 32) if kernel == "efficient" else s
    log_sum = t.new((b, heads, rows if kept else 0), "fp32", None, LOG_SUM)
    return out, log_sum, (t.new((), "int64", None, SEED), t.new((), "int64", None, SEED))


def fused_gradient(kernel: Kernel, t: Tape, saved: Saved, grads: Grads) -> Found:
    """Gradients of queries, keys and values by a kernel, and what it holds while it runs."""
    grad, (q, k, v, _, out, *_) = first(grads), saved
    assert q is not None
    assert k is not None
    assert v is not None
    assert out is not None
    b, heads, s, d = q.shape
    if kernel == "cudnn":
        found = [_alike(t, x, x.shape) for x in (q, k, v)]
        scratch = [out.nbytes] if grad.strides != out.strides else []
        t.moment(*scratch, b * heads * s * (d + 1) * 4)
        return found
    found = [_heads_last(t, x.shape, q.dtype) for x in (q, k, v)]
    if kernel == "flash":
        rows, width = round_up(s, 128), round_up(d, 32 if d <= 128 else 64)
        scratch = [b * heads * rows * 4, b * heads * rows * width * 4]
        if k.shape[1] != heads:
            scratch += [b * k.shape[2] * heads * d * 2] * 2
    else:
        scratch = [b * heads * s * 4] + ([] if q.dtype == "fp32" else [b * s * heads * d * 4])
    t.moment(*scratch)
    return found


def _math(
    t: Tape, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, p: float, tag: Tag | None
) -> Tensor:
    """The math path, in fp32: every pair of tokens' scores, their softmax, and a mask that is added in place."""
    dtype, groups = q.dtype, q.shape[1] // k.shape[1]
    q, k, v = (to(t, x, "fp32", tag) for x in (q, k, v))
    if not p:
        q = scale(t, q, tag)
    if causal:
        square = (q.shape[2], k.shape[2])
        ones = t.new(square, "bool")
        bias = t.new(square, "bool")
        del ones
    if bias is not None and bias.dtype == "bool":
        numbers = t.new((), q.dtype, None, BIAS), t.new((), q.dtype, None, BIAS)
        bias = t.like(bias, q.dtype, BIAS)
        del numbers
    if groups > 1:
        k, v = (_repeated(t, x, groups, tag) for x in (k, v))
    scores = _scores(t, q, k, tag) if p else matmul(t, q, scale(t, transpose(t, k, 2, 3), tag), tag)
    if bias is not None and bias.node is not None:
        scores = add(t, scores, bias, tag) if t.on_meta and not p else add_in_place(t, scores, bias)
    elif bias is not None and t.on_meta and not p:  # else it is added in place
        scores = mask(t, scores, bias, tag)
    weights = softmax(t, scores, tag=tag)
    if bias is not None:
        t.moment(prod(weights.shape))  # rows that are masked whole
    del scores
    return to(t, matmul(t, dropout(t, weights, p, tag), v, tag), dtype, tag)


def _scores(t: Tape, q: Tensor, k: Tensor, tag: Tag | None) -> Tensor:
    """Both scaled once the mask is there, as the exact engine spells the path out where something is dropped."""
    q, turned = scale(t, q, tag), transpose(t, scale(t, k, tag), 2, 3)
    return matmul(t, q, turned, tag)


def _repeated(t: Tape, x: Tensor, groups: int, tag: Tag | None) -> Tensor:
    """`repeat_interleave` of the heads: always a copy."""
    b, heads, s, d = x.shape
    wide = expand(t, reshape(t, x, b, heads, 1, s, d), b, heads, groups, s, d)
    return reshape(t, clone(t, wide, True, tag), b, heads * groups, s, d)
