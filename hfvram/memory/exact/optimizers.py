"""Optimizers on meta: PyTorch's and transformers' own code where it runs there, bitsandbytes' by its storages."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch

from hfvram.errors import HfvramError


class EightBit:
    """bitsandbytes' blockwise 8-bit optimizers: a byte a state and value, an fp32 scale for each 256 of them.

    Tensors below 4,096 values keep fp32 states. Paged states of 100,000 values and more are managed memory, which the
    allocator does not serve. Source: bitsandbytes 0.49, optim/optimizer.py `get_state_buffer`, `Optimizer2State`.
    """

    def __init__(self, parameters: list[Any], states: int, bits: int = 8, paged: bool = False) -> None:
        self.parameters = parameters
        self.states = states
        self.bits = bits
        self.paged = paged
        self.state: dict[Any, dict[str, Any]] = {}
        self.maps: dict[str, Any] = {}

    def step(self) -> None:
        if not self.state and self.bits == 8:
            self.maps = {f"quantization map {i + 1}": _fp32((256,)) for i in range(2)}
        for p in self.parameters:
            if p.grad is not None and p not in self.state:
                self.state[p] = dict(self._states(p))

    def _states(self, p: Any) -> Iterator[tuple[str, Any]]:
        small = p.numel() < 4096
        for i in range(self.states):
            if self.paged and p.numel() >= 100_000:
                continue
            dtype = torch.uint8 if self.bits == 8 and not small else torch.float32
            yield f"state {i + 1}", torch.zeros(p.shape, dtype=dtype, device=p.device)
        if self.bits == 8 and not small:
            for i in range(self.states):
                yield f"scales of state {i + 1}", _fp32((-(-p.numel() // 256),))


def _fp32(shape: tuple[int, ...]) -> Any:
    return torch.zeros(shape, dtype=torch.float32, device="meta")


def _adafactor(parameters: list[Any]) -> Any:
    from transformers.optimization import Adafactor

    return Adafactor(parameters, lr=1e-6, relative_step=False, scale_parameter=False)


OPTIMIZERS: dict[str, Callable[[list[Any]], Any]] = {
    "adamw_torch_fused": lambda p: torch.optim.AdamW(p, fused=True),
    "adamw_torch": lambda p: torch.optim.AdamW(p, foreach=True),
    "adamw_torch_loop": lambda p: torch.optim.AdamW(p, foreach=False, fused=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, foreach=True),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, foreach=True),
    "adafactor": _adafactor,
    "adamw_8bit": lambda p: EightBit(p, states=2),
    "adamw_bnb_8bit": lambda p: EightBit(p, states=2),
    "paged_adamw_8bit": lambda p: EightBit(p, states=2, paged=True),
    "paged_adamw_32bit": lambda p: EightBit(p, states=2, bits=32, paged=True),
    "lion_32bit": lambda p: EightBit(p, states=1, bits=32),
    "lion_8bit": lambda p: EightBit(p, states=1),
    "paged_lion_8bit": lambda p: EightBit(p, states=1, paged=True),
    "paged_lion_32bit": lambda p: EightBit(p, states=1, bits=32, paged=True),
}


def optimizer(name: str, parameters: list[Any]) -> Any:
    """The optimizer of this name over these parameters: `step()`, and `state` once it has stepped. Raises `usage`."""
    if name not in OPTIMIZERS:
        valid = ", ".join(OPTIMIZERS)
        raise HfvramError("usage", f"--optimizer {name} is unknown: valid are {valid}")
    with fused_on_meta():
        return OPTIMIZERS[name](parameters)


@contextlib.contextmanager
def fused_on_meta() -> Iterator[None]:
    """PyTorch's fused optimizers have meta kernels, but refuse parameters on meta."""
    with patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: ["meta", "cpu"]):
        yield


def states(optimizer: Any) -> Iterator[tuple[str, Any]]:
    """Every tensor that the optimizer keeps, with its name."""
    for kept in (*optimizer.state.values(), getattr(optimizer, "maps", {})):
        for name, value in kept.items():
            if isinstance(value, torch.Tensor):
                yield name, value
