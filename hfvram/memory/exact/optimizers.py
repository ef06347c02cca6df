"""Optimizers on meta: PyTorch's and transformers' own code where it runs there, others by what they keep and make."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from hfvram.errors import HfvramError
from hfvram.memory import bitsandbytes
from hfvram.memory.bitsandbytes import PAGED_STATE, SMALL_STATE, STATE_BLOCK
from hfvram.memory.exact.labels import states_of


class BitsAndBytes:
    """bitsandbytes' blockwise optimizers: a byte for a state of a value, and an fp32 scale for each 256 of them.

    Tensors below 4,096 values keep fp32 states. Paged states of 100,000 values and more are managed memory, which
    PyTorch's allocator does not serve. Source: bitsandbytes 0.49, optim/optimizer.py, `init_state`.
    """

    def __init__(self, parameters: list[Any], states: int, bits: int = 8, paged: bool = False) -> None:
        self.parameters = parameters
        self.states = states
        self.bits = bits
        self.paged = paged
        self.state: dict[Any, dict[str, Any]] = {}
        self.maps: dict[str, Any] = {}
        self.managed_bytes = 0

    def step(self) -> None:
        if not self.maps and self.bits == 8:
            self.maps = {f"quantization map {i + 1}": _fp32(STATE_BLOCK) for i in range(2)}
        for p in self.parameters:
            if p.grad is not None and p not in self.state:
                self.state[p] = dict(self._states(p))

    def _states(self, p: Any) -> Iterator[tuple[str, Any]]:
        quantized = self.bits == 8 and p.numel() >= SMALL_STATE
        for i in range(self.states):
            if self.paged and p.numel() >= PAGED_STATE:
                self.managed_bytes += p.numel() * (1 if quantized else 4)
            else:
                dtype = torch.uint8 if quantized else torch.float32
                yield f"state {i + 1}", torch.zeros(p.shape, dtype=dtype, device=p.device)
        for i in range(self.states if quantized else 0):
            yield f"scales of state {i + 1}", _fp32(-(-p.numel() // STATE_BLOCK))


class LowRank:
    """GaLore and APOLLO: AdamW's states of gradients that are projected to `rank` along their shorter side.

    The projection is an SVD's (GaLore) or random (APOLLO); parameters that are no linear layer's have plain AdamW.
    Source: galore_torch 1.0, galore_projector.py and adamw.py; apollo_torch 1.0, apollo.py.
    """

    def __init__(self, linear: list[Any], others: list[Any], rank: int, svd: bool) -> None:
        self.linear = linear
        self.rank = rank
        self.svd = svd
        self.rest = torch.optim.AdamW(others, foreach=False) if others else None
        self.own: dict[Any, dict[str, Any]] = {}

    @property
    def state(self) -> dict[Any, dict[str, Any]]:
        return self.own | (dict(self.rest.state) if self.rest else {})

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self) -> None:
        for p in self.linear:
            if p.grad is not None:
                self._step(p, self.own.setdefault(p, {}))
        if self.rest:
            self.rest.step()

    def _step(self, p: Any, state: dict[str, Any]) -> None:
        grad, (rows, columns) = p.grad, p.shape
        right, rank = rows >= columns, min(self.rank, *p.shape)
        if "projection" not in state:
            state["projection"] = self._projection(grad, rank, right)
        basis = state["projection"]
        low = torch.matmul(grad, basis.t()) if right else torch.matmul(basis.t(), grad)
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(low), torch.zeros_like(low)
        state["exp_avg"].mul_(0.9).add_(low, alpha=0.1)
        state["exp_avg_sq"].mul_(0.999).addcmul_(low, low, value=0.001)
        step = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(1e-8)
        if self.svd:
            full = torch.matmul(step, basis) if right else torch.matmul(basis, step)
            p.add_(full * 0.25)
        else:
            side = 1 if right else 0
            scale = step.norm(dim=side) / (low.norm(dim=side) + 1e-8)
            p.add_(grad * (scale.unsqueeze(side)))

    def _projection(self, grad: Any, rank: int, right: bool) -> Any:
        rows, columns = grad.shape
        if not self.svd:
            return torch.empty((rank, columns) if right else (rows, rank), dtype=grad.dtype, device=grad.device)
        u, _, vh = torch.linalg.svd(grad.float(), full_matrices=False)
        return (vh[:rank] if right else u[:, :rank]).to(grad.dtype, copy=True)


@dataclass
class Muon:
    """PyTorch's Muon for the linear layers, its fused AdamW for the rest."""

    parts: list[Any]

    @property
    def state(self) -> dict[Any, Any]:
        return {p: s for part in self.parts for p, s in part.state.items()}

    def step(self) -> None:
        for part in self.parts:
            part.step()


def _fp32(*shape: int) -> Any:
    return torch.zeros(shape, dtype=torch.float32, device="meta")


def _adafactor(parameters: list[Any], linear: list[bool]) -> Any:
    from transformers.optimization import Adafactor

    return Adafactor(parameters, lr=1e-3, relative_step=False, scale_parameter=False)


def _muon(parameters: list[Any], linear: list[bool]) -> Any:
    inner, rest = _split(parameters, linear)
    parts = [torch.optim.Muon(inner)] if inner else []
    return Muon(parts + ([torch.optim.AdamW(rest, fused=True)] if rest else []))


def _split(parameters: list[Any], linear: list[bool]) -> tuple[list[Any], list[Any]]:
    pairs = list(zip(parameters, linear, strict=True))
    return [p for p, inner in pairs if inner], [p for p, inner in pairs if not inner]


def _torch(name: str, **options: Any) -> Callable[[list[Any], list[bool]], Any]:
    return lambda parameters, _: getattr(torch.optim, name)(parameters, lr=1e-3, **options)


def _bnb(states: int, bits: int = 8, paged: bool = False) -> Callable[[list[Any], list[bool]], Any]:
    return lambda parameters, _: BitsAndBytes(parameters, states, bits, paged)


def _low_rank(rank: int, svd: bool) -> Callable[[list[Any], list[bool]], Any]:
    return lambda parameters, linear: LowRank(*_split(parameters, linear), rank, svd)


OPTIMIZERS: dict[str, Callable[[list[Any], list[bool]], Any]] = {
    "adamw_torch_fused": _torch("AdamW", fused=True),
    "adamw_torch": _torch("AdamW", foreach=True),
    "adamw_torch_loop": _torch("AdamW", foreach=False, fused=False),
    "sgd": _torch("SGD", foreach=True),
    "sgd_momentum": _torch("SGD", momentum=0.9, foreach=True),
    "adagrad": _torch("Adagrad", foreach=True),
    "rmsprop": _torch("RMSprop", foreach=True),
    "adafactor": _adafactor,
    **{name: _bnb(*made) for name, made in bitsandbytes.OPTIMIZERS.items()},
    "galore_adamw": _low_rank(128, svd=True),
    "apollo_adamw": _low_rank(256, svd=False),
    "muon": _muon,
}
"""transformers' names, and `adamw_torch_loop`, `sgd_momentum`, `lion`, `muon`; `answer.supported` names the same."""


def optimizer(name: str, parameters: list[Any], linear: list[bool] | None = None) -> Any:
    """The optimizer over these parameters: `step()`, and `state` once it has stepped. `linear` says which of them are
    weights of linear layers, the head's left out. Raises `usage` for a name that is unknown."""
    if name not in OPTIMIZERS:
        raise HfvramError("usage", f"--optimizer {name} is unknown: valid are {', '.join(OPTIMIZERS)}")
    with fused_on_meta():
        return OPTIMIZERS[name](parameters, linear or [False] * len(parameters))


@contextlib.contextmanager
def fused_on_meta() -> Iterator[None]:
    """PyTorch's fused optimizers have meta kernels, but refuse parameters on meta."""
    with patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: ["meta", "cpu", "cuda"]):
        yield


def states(optimizer: Any) -> Iterator[tuple[str, Any]]:
    """Every tensor that the optimizer keeps, with its name: some keep a count of steps in host memory."""
    for kept in (*optimizer.state.values(), getattr(optimizer, "maps", {})):
        yield from states_of(kept)
