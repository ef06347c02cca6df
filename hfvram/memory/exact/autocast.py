"""CUDA's autocast, emulated: the meta device has none.

Products run in the low dtype, with a cast of each fp32 weight that is kept until the outermost autocast ends; what must
be accurate runs in fp32. Source: PyTorch 2.11, autocast_mode.h (the three lists), autocast_mode.cpp `cached_cast`.
"""

from typing import Any

import torch

LOW = frozenset(
    "linear matmul __matmul__ __rmatmul__ mm bmm addmm baddbmm addbmm addmv mv conv1d conv2d conv3d conv_transpose1d "
    "conv_transpose2d conv_transpose3d prelu einsum".split()
)
FP32 = frozenset(
    "layer_norm group_norm cross_entropy nll_loss binary_cross_entropy_with_logits pow __pow__ __rpow__ exp expm1 log "
    "log1p log2 log10 rsqrt reciprocal softplus cosine_similarity norm mse_loss l1_loss smooth_l1_loss kl_div tan "
    "__rdiv__ __rtruediv__ erfinv cumprod normalize cosh sinh acos asin".split()
)
WIDENED = frozenset(("softmax", "log_softmax", "sum", "prod", "cumsum"))
"""Run in fp32 unless a dtype is asked for."""


class Autocast:
    """Whether autocast is on, to which dtype, and the casts of weights that it keeps."""

    def __init__(self, dtype: Any = None) -> None:
        self.dtype = dtype
        self.on = False
        self.backward = False
        self.kept: dict[int, Any] = {}

    def low(self, value: Any) -> Any:
        """A floating tensor in the low dtype; a leaf that needs a gradient is cast once."""
        if not isinstance(value, torch.Tensor) or value.device.type != "meta" or not value.is_floating_point():
            return value
        if value.dtype == self.dtype:
            return value
        leaf = value.requires_grad and value.is_leaf and value.dtype == torch.float32 and not value._is_view()
        if leaf and not self.backward:
            if id(value) not in self.kept:
                self.kept[id(value)] = value.to(self.dtype)
            return self.kept[id(value)]
        return value.to(self.dtype)

    def lowered(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if not self.on:
            return args, kwargs
        return tuple(self.low(a) for a in args), {k: self.low(v) for k, v in kwargs.items()}

    def cast(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments as autocast would pass them to this function."""
        if not self.on:
            return args, kwargs
        if name in LOW:
            return self.lowered(args, kwargs)
        if name in FP32:
            return tuple(self._wide(a) for a in args), {k: self._wide(v) for k, v in kwargs.items()}
        if name in WIDENED and args and self._is_low(args[0]) and kwargs.get("dtype") is None:
            if name in ("softmax", "log_softmax"):
                return (args[0].float(), *args[1:]), kwargs
            return args, {**kwargs, "dtype": torch.float32}
        return args, kwargs

    def _is_low(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.dtype == self.dtype

    def _wide(self, value: Any) -> Any:
        return value.float() if self._is_low(value) else value
