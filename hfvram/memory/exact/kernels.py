"""CUDA where the meta device differs: which attention kernel runs, what it keeps, and dropout's masks.

A function mode above the dispatcher: what it replaces never reaches the meta kernels. Source: PyTorch 2.11,
transformers/cuda/sdp_utils.cpp and cudnn/MHA.cpp; what is not said there was measured on an H100 (fixtures/measured),
so that other generations of GPUs (`memory/generation.py`) are derived.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from hfvram.memory.cuda_kernels import Kernel, attention_kernel, flash_backward_fits, round_up
from hfvram.memory.exact.autocast import Autocast
from hfvram.memory.generation import HOPPER, Generation

HALF = (torch.bfloat16, torch.float16)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def empty(*shape: int, dtype: Any = torch.float32) -> Any:
    """An empty tensor on meta."""
    return torch.empty(shape, dtype=dtype, device="meta")


def like_layout(tensor: Any, shape: tuple[int, ...]) -> Any:
    """An empty (b, heads, s, d) tensor of which the dimensions lie in memory as those of `tensor` do.

    cuDNN allocates its output so (`alloc_with_matching_layout`), which decides whether `.contiguous()` copies it.
    """
    order = sorted(range(4), key=lambda i: (-tensor.stride(i), i))
    flat = empty(*(shape[i] for i in order), dtype=tensor.dtype)
    return flat.permute([order.index(i) for i in range(4)])


def heads_last(shape: tuple[int, ...], like: Any) -> Any:
    """An empty (b, heads, s, d) tensor that lies in memory as (b, s, heads, d)."""
    b, heads, s, d = shape
    return empty(b, s, heads, d, dtype=like.dtype).transpose(1, 2)


class FusedAttention(torch.autograd.Function):  # type: ignore[misc]
    """A fused kernel: it saves queries, keys, values, the bias, its output and the log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, bias: Any, kernel: Kernel) -> Any:
        b, heads, s, _ = q.shape
        shape = (b, heads, s, v.shape[3])
        out = like_layout(q, shape) if kernel == "cudnn" else heads_last(shape, q)
        rows = round_up(s, 32) if kernel == "efficient" else s
        # Only flash attention computes the log-sum-exp where no gradient will need it.
        rows = rows if kernel == "flash" or any(ctx.needs_input_grad) else 0
        log_sum = empty(b, heads, rows)
        seed = tuple(empty(dtype=torch.int64) for _ in range(2))  # dropout's, always kept
        ctx.save_for_backward(q, k, v, bias, out, log_sum, *seed)
        ctx.kernel = kernel
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        q, k, v, bias, out, *_ = ctx.saved_tensors
        b, heads, s, d = q.shape
        if ctx.kernel == "cudnn":
            grads = tuple(like_layout(x, x.shape) for x in (q, k, v))
            scratch = [like_layout(out, out.shape)] if grad.stride() != out.stride() else []
            scratch.append(empty(b * heads * s * (d + 1)))  # one workspace: the rows' sums, the queries' gradient
        else:
            grads = tuple(heads_last(x.shape, q) for x in (q, k, v))
            scratch = FusedAttention._flash_scratch(q, k) if ctx.kernel == "flash" else [empty(b, heads, s)]
            if ctx.kernel == "efficient" and q.dtype != torch.float32:
                scratch.append(empty(b, s, heads, d))
        grad_bias = None
        if bias is not None and ctx.needs_input_grad[3]:
            grad_bias = empty(b, heads, s, k.shape[2], dtype=q.dtype).sum_to_size(bias.shape)
        del scratch
        return (*grads, grad_bias, None)

    @staticmethod
    def _flash_scratch(q: Any, k: Any) -> list[Any]:
        """Rows rounded to 128 and heads to 32 or 64 in fp32; with grouped heads, gradients for every head."""
        b, heads, s, d = q.shape
        rows, width = round_up(s, 128), round_up(d, 32 if d <= 128 else 64)
        scratch = [empty(b, heads, rows), empty(b, rows, heads, width)]
        if k.shape[1] != heads:
            scratch += [empty(b, k.shape[2], heads, d, dtype=q.dtype) for _ in range(2)]
        return scratch


def kernel_for(
    q: Any, k: Any, v: Any, mask: Any, gqa: bool, gpu: Generation = HOPPER, dropout: float = 0.0
) -> Kernel | None:
    """The kernel that PyTorch picks, None for the math path: also for a mask that needs a gradient."""
    if q.dim() != 4 or (mask is not None and mask.requires_grad):
        return None
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return attention_kernel(
        NAMES.get(q.dtype, "fp32"),
        (q.shape[1], k.shape[1], v.shape[1]),
        (q.shape[-1], v.shape[-1]),
        gpu,
        masked=mask is not None,
        gqa=gqa,
        narrow=not trains or flash_backward_fits(q.shape[-1], dropout),
    )


_sdpa = F.scaled_dot_product_attention


def attention(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    gpu: Generation = HOPPER,
) -> Any:
    """`scaled_dot_product_attention` as CUDA runs it; tensors that are not on meta are left to PyTorch."""
    if q.device.type != "meta":
        return _sdpa(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    kernel = kernel_for(q, k, v, attn_mask, enable_gqa, gpu, dropout_p)
    if kernel is None:
        if dropout_p:
            return _math_with_dropout(q, k, v, attn_mask, dropout_p, is_causal, scale)
        return _sdpa(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    d = q.shape[-1]
    if kernel == "flash" and d % 8:
        q, k, v = (F.pad(x, (0, -d % 8)) for x in (q, k, v))
        return FusedAttention.apply(q, k, v, None, kernel)[..., :d]
    return FusedAttention.apply(q, k, v, None if attn_mask is None else _bias(attn_mask, q), kernel)


def _bias(mask: Any, q: Any) -> Any:
    """A boolean mask becomes an additive one of the queries' dtype.

    One whose rows don't start at multiples of 8, or don't lie in one piece (T5's, heads side by side), is copied, its
    rows padded to the next multiple of 8. Source: PyTorch 2.11, native/transformers/attention.cpp `aligned_tensor`,
    `pad_bias`.
    """
    bias = torch.empty_like(mask, dtype=q.dtype) if mask.dtype == torch.bool else mask
    *strides, last = bias.stride()
    if last != 1 or any(stride % 8 for stride in strides):
        length = bias.shape[-1]
        bias = F.pad(bias, (0, 8 - length % 8))[..., :length]
    return bias


def _math_with_dropout(q: Any, k: Any, v: Any, mask: Any, p: float, causal: bool, scale: float | None) -> Any:
    """The math path spelled out: inside it meta takes dropout apart, where CUDA has one kernel with a mask."""
    dtype = q.dtype
    q, k, v = (x.float() if x.dtype in HALF else x for x in (q, k, v))
    if causal:
        mask = torch.ones((q.shape[2], k.shape[2]), dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.empty_like(mask, dtype=q.dtype)
    if (groups := q.shape[1] // k.shape[1]) > 1:
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    factor = math.sqrt(scale if scale is not None else 1 / math.sqrt(q.shape[-1]))
    weights = torch.matmul(q * factor, (k * factor).transpose(-2, -1))
    weights = torch.softmax(weights, -1) if mask is None else torch._safe_softmax(weights.add_(mask), -1)
    return torch.matmul(torch.native_dropout(weights, p, True)[0], v).to(dtype)


class CudaBehaviour(TorchFunctionMode):  # type: ignore[misc]
    """The mode: attention, dropout (one boolean a value), and autocast where it is on."""

    def __init__(self, autocast: Autocast, gpu: Generation = HOPPER) -> None:
        super().__init__()
        self.autocast = autocast
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            args, kwargs = self.autocast.lowered(args, kwargs)
            return attention(*args, **{**kwargs, "gpu": self.gpu})
        if name == "dropout" and func is not torch.dropout_:
            return _dropout(*args, **kwargs)
        return self.autocast.call(func, name, args, kwargs)


def _dropout(
    input: Any, p: float = 0.5, training: bool = True, inplace: bool = False, *, train: bool | None = None
) -> Any:
    if not (training if train is None else train) or p == 0:
        return input
    return torch.native_dropout(input, p, True)[0]
