"""CUDA's autocast, emulated: the meta device has none.

Products run in the low dtype, with a cast of each fp32 weight that is kept until the outermost autocast ends; what must
be accurate runs in fp32 (`square` is a `pow` to the dispatcher). Source: PyTorch 2.11, autocast_mode.h (the three
lists), autocast_mode.cpp `cached_cast`.
"""

import contextlib
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.amp.autocast_mode import autocast as torch_autocast

LOW = frozenset(
    (
        *("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "addbmm", "addmv", "mv"),
        *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "prelu", "einsum"),
    )
)
FP32 = frozenset(
    (
        *("layer_norm", "group_norm", "norm", "normalize", "nll_loss", "binary_cross_entropy_with_logits", "mse_loss"),
        *("l1_loss", "smooth_l1_loss", "huber_loss", "kl_div", "cosine_similarity", "cosine_embedding_loss", "cdist"),
        *("softplus", "logsumexp", "erfinv", "tan", "cosh", "sinh", "acos", "asin", "exp", "expm1", "reciprocal"),
        *("log", "log1p", "log2", "log10", "rsqrt", "square", "pow", "__pow__", "__rpow__", "__rdiv__", "__rtruediv__"),
    )
)
STOOD_FOR = ("meta", "cuda")
WIDENED = frozenset(("softmax", "log_softmax", "sum", "prod", "cumsum", "cumprod"))
"""Run in fp32 unless a dtype is asked for."""


class Autocast:
    """Whether autocast is on, to which dtype, and the casts of weights that it keeps until the outermost one ends."""

    def __init__(self, dtype: Any = torch.bfloat16) -> None:
        self.dtype = dtype
        self.on = False
        self.depth = 0
        self.kept: dict[int, Any] = {}

    @contextlib.contextmanager
    def region(self, dtype: Any = None, enabled: bool = True) -> Iterator[None]:
        """As `torch.autocast(device, dtype, enabled)` does it."""
        before = self.on, self.dtype
        self.on, self.dtype, self.depth = enabled, dtype or self.dtype, self.depth + 1
        try:
            yield
        finally:
            self.on, self.dtype = before
            self.depth -= 1
            if not self.depth:
                self.kept.clear()

    @contextlib.contextmanager
    def stands_in(self) -> Iterator[None]:
        """Code that asks torch for autocast on meta gets this one: models, PEFT, checkpointing's recomputation."""
        own = self
        made, enter, leave = torch_autocast.__init__, torch_autocast.__enter__, torch_autocast.__exit__

        def new(
            region: Any, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None
        ) -> None:
            if device_type in STOOD_FOR:
                region.device, region.fast_dtype, region._enabled = device_type, dtype, enabled
            else:
                made(region, device_type, dtype, enabled, cache_enabled)

        def entered(region: Any) -> Any:
            if region.device not in STOOD_FOR:
                return enter(region)
            within = own.region(region.fast_dtype, region._enabled)
            within.__enter__()
            vars(region).setdefault("within", []).append(within)
            return region

        def left(region: Any, *error: Any) -> Any:
            return region.within.pop().__exit__(*error) if region.device in STOOD_FOR else leave(region, *error)

        asked, dtype, available = torch.is_autocast_enabled, torch.get_autocast_dtype, torch.amp.is_autocast_available

        def enabled(device: str | None = None) -> Any:
            return own.on if device in (None, *STOOD_FOR) else asked(device)

        with (
            _maybe_too(),
            patch.multiple(torch_autocast, __init__=new, __enter__=entered, __exit__=left),
            patch.object(torch, "is_autocast_enabled", enabled),
            patch.object(torch, "get_autocast_dtype", lambda d: own.dtype if d in STOOD_FOR else dtype(d)),
            patch.object(torch.amp, "is_autocast_available", lambda d: d in STOOD_FOR or available(d)),
        ):
            yield

    def low(self, value: Any) -> Any:
        """A floating tensor in the low dtype; a leaf that needs a gradient is cast once."""
        if not isinstance(value, torch.Tensor) or value.device.type != "meta" or not value.is_floating_point():
            return value
        if value.dtype == self.dtype:
            return value
        if value.requires_grad and value.is_leaf and value.dtype == torch.float32 and not value._is_view():
            if id(value) not in self.kept:
                self.kept[id(value)] = value.to(self.dtype)
            return self.kept[id(value)]
        return value.to(self.dtype)

    def lowered(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments in the low dtype, cast from the last to the first, as C++ compiled by GCC evaluates them."""
        if not self.on:
            return args, kwargs
        named = {k: self.low(v) for k, v in reversed(kwargs.items())}
        return tuple(self.low(a) for a in reversed(args))[::-1], named

    def call(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Call this function as autocast would."""
        if self.on:
            if name in LOW:
                args, kwargs = self.lowered(args, kwargs)
            elif name in FP32:
                named = {k: self._wide(v) for k, v in reversed(kwargs.items())}
                args, kwargs = tuple(self._wide(a) for a in reversed(args))[::-1], named
            elif name in WIDENED and args and self._is_low(args[0]) and kwargs.get("dtype") is None:
                if name in ("softmax", "log_softmax"):
                    args = (args[0].float(), *args[1:])
                else:
                    kwargs = {**kwargs, "dtype": torch.float32}
            elif name == "cross_entropy" and self._is_low(args[0]):
                return _cross_entropy(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _is_low(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.dtype == self.dtype

    def _wide(self, value: Any) -> Any:
        return value.float() if self._is_low(value) else value


@contextlib.contextmanager
def _maybe_too() -> Iterator[None]:
    """transformers' `maybe_autocast` lets meta be. It was imported by name everywhere, so its code is what is changed.

    Source: transformers 5.17, utils/generic.py.
    """
    found = getattr(sys.modules.get("transformers.utils.generic"), "maybe_autocast", None)
    if found is None:
        yield
        return
    before, found.__code__ = found.__code__, _as_on_cuda.__code__
    try:
        yield
    finally:
        found.__code__ = before


def _as_on_cuda(device_type: Any, dtype: Any = None, enabled: Any = True, cache_enabled: Any = None) -> Any:
    """Its last lines. Runs among its names, which have no torch."""
    import torch

    if torch.is_autocast_enabled(device_type) or enabled:
        return torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)
    return nullcontext()


def _cross_entropy(func: Any, input: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
    """Not in autocast's lists: its log-softmax asks for the input's own dtype, and `nll_loss` widens that.

    Source: PyTorch 2.11, LossNLL.cpp `cross_entropy_loss`; `set_opt_dtype` in autocast_mode.h.
    """
    if target.is_floating_point() or args or kwargs.get("label_smoothing"):
        return func(input, target, *args, **kwargs)
    scores = torch.log_softmax(input, 0 if input.dim() == 1 else 1)
    kwargs.pop("label_smoothing", None)
    return torch.nn.functional.nll_loss(scores.float(), target, **kwargs)
