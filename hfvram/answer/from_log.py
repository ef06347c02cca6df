"""A log's figures set against the estimate of the same request, line by line."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from hfvram.answer.estimate import Estimate
from hfvram.answer.question import Session
from hfvram.answer.serving_options import ENGINES
from hfvram.errors import HfvramError, printable
from hfvram.memory.device import CONTEXT_BYTES
from hfvram.read import engine_log
from hfvram.read.engine_log import Log, Printed
from hfvram.request import Request
from hfvram.units import GiB, gib


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A figure of a log, and the estimate's, None where it has none. `exact`: equal to the digit that is printed."""

    name: str
    line: int | None
    printed: str
    unit: str
    logged: int | float
    estimated: int | float | None
    exact: bool
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LogAnswer:
    """A log, the estimate (None where no model is known), and what is set against what."""

    log: Log
    compared: tuple[Compared, ...]
    estimate: Estimate | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "engine": self.log.engine,
            "options": dict(self.log.options),
            "figures": [{f.name: getattr(c, f.name) for f in fields(c)} for c in self.compared],
            "estimate": self.estimate.to_dict() if self.estimate else None,
            "warnings": list(self.warnings),
            "error": None,
        }


Figure = Callable[[Estimate], int | float | None]


def _serving(name: str) -> Figure:
    return lambda e: getattr(e.serving, name) if e.serving else None


def _half(e: Estimate) -> int | None:
    """Keys of the pool, or values: they are alike wherever an engine prints the two."""
    return e.serving.kv_pool_bytes // 2 if e.serving and e.serving.kv_pool_bytes else None


VLLM: Final[Mapping[str, tuple[Figure, str]]] = {
    "weights": (_serving("loaded_bytes"), "weights and buffers as they stand"),
    "activations": (_serving("activation_bytes"), "while profiling"),
    "not PyTorch's": (_serving("non_torch_bytes"), "NCCL, kernels"),
    "pool": (_serving("kv_pool_bytes"), "what --gpu leaves"),
    "tokens": (_serving("kv_tokens"), "as the engine prints it"),
    "blocks": (_serving("blocks"), ""),
    "blocks in 4 GiB of CPU memory": (
        lambda e: 4 * GiB // e.serving.block_bytes if e.serving and e.serving.block_bytes else None,
        "4 GiB ÷ bytes of a block",
    ),
    "CUDA graphs": (_serving("graph_bytes"), ""),
    "concurrency": (
        _serving("max_concurrency"),
        "requests of ctx tokens",
    ),
}
SGLANG: Final[Mapping[str, tuple[Figure, str]]] = {
    "weights": (_serving("loaded_bytes"), "as reserved: the log's is what the device lost"),
    "pool": (_serving("kv_pool_bytes"), "what --gpu leaves"),
    "keys": (_half, "half of the pool"),
    "values": (_half, "half of the pool"),
    "tokens": (_serving("kv_tokens"), "as the engine prints it"),
    "states in the pool": (_serving("state_slots"), ""),
    "CUDA graphs": (_serving("graph_bytes"), ""),
    "NCCL": (
        lambda e: max(0, e.serving.non_torch_bytes - CONTEXT_BYTES) if e.serving else None,
        "beside the CUDA context",
    ),
}
PYTORCH: Final[Mapping[str, tuple[Figure, str]]] = {
    "allocated with the one that failed": (lambda e: e.peak_allocated_bytes, "the estimate's peak"),
    "reserved": (lambda e: e.peak_reserved_bytes, "the estimate's peak"),
    "on the device": (lambda e: e.device_bytes, "the estimate's, context and kernels included"),
    "capacity": (lambda e: e.fit.capacity_bytes if e.fit else None, ""),
}
STATES: Final = "cache: recurrent states"


def _states(e: Estimate) -> int:
    return e.serving.state_bytes * (e.serving.state_slots or 0) if e.serving else 0


def _gpu(category: str, states: bool = False) -> Figure:
    """Items of a category on the GPU; of the caches either the recurrent states or all else."""
    return lambda e: sum(i.bytes for i in e.items if i.category == category and (i.name == STATES) == states)


def _cpu(category: str) -> Figure:
    return lambda e: sum(x.bytes for x in e.offloaded if x.category == category and x.place == "cpu")


LLAMA: Final[Mapping[str, tuple[Figure, str]]] = {
    "cache": (lambda e: e.cache_bytes - _states(e), "keys and values of all cells"),
    "states": (_states, "recurrent states of all slots"),
    "cells": (_serving("kv_tokens"), ""),
    "weights on GPU": (_gpu("weights"), ""),
    "weights on CPU": (_cpu("weights"), "embeddings, and layers that are not offloaded"),
    "cache on GPU": (_gpu("cache"), ""),
    "cache on CPU": (_cpu("cache"), ""),
    "states on GPU": (_gpu("cache", states=True), ""),
    "compute buffer on GPU": (_gpu("activations"), "differs between builds"),
}
HOST: Final = ("CPU", "CPU_Mapped", "CPU_REPACK")
FIGURES: Final = {"vllm": VLLM, "sglang": SGLANG, "PyTorch": PYTORCH, "llama.cpp": LLAMA}


def against(
    path: str, model: str | None, given: Mapping[str, Any], notes: tuple[str, ...] = (), **source: Any
) -> LogAnswer:
    """The log at `path` against the estimate; the model and the options given win over those that the log tells.

    Raises `io` and `usage` for the log, and whatever the estimate raises.
    """
    log = engine_log.read(path)
    warnings = [*notes, *log.notes]
    named = model or log.model
    if model and log.model and model != log.model:
        warnings.append(f"the model is {printable(model, 80)}, in place of the log's {printable(log.model, 80)}")
    request = _request(log, given)
    estimate = None
    if named is None:
        warnings.append("the log names no model: hfvram measure --read-log FILE MODEL sets its figures against one")
    else:
        estimate, said = _estimated(log, named, request, source, ours=model is not None)
        warnings += said
    if log.engine in ENGINES and "gpu" not in {**log.options, **given}:
        warnings.append("the log does not say how large the GPU is: with --gpu the pool is estimated, too")
    if log.engine == "PyTorch":
        warnings += list(_verdict(log, estimate))
    return LogAnswer(log=log, compared=tuple(_compared(log, estimate)), estimate=estimate, warnings=tuple(warnings))


def _estimated(
    log: Log, model: str, request: Request, source: Mapping[str, Any], ours: bool
) -> tuple[Estimate | None, list[str]]:
    """The estimate. A GGUF file that the log names and that is elsewhere is no reason to tell nothing of the log."""
    try:
        found = Session().estimate(model, request, **source)
    except HfvramError as error:
        if ours or log.engine != "llama.cpp":
            raise
        return None, [f"llama.cpp's figures stand alone: {error.message}"]
    return found, list(found.warnings)


def _request(log: Log, given: Mapping[str, Any]) -> Request:
    engine: dict[str, Any] = {} if log.engine == "PyTorch" else {"engine": log.engine}
    if log.engine == "llama.cpp":
        slots, unified = log.options.get("n_seq_max"), log.options.get("kv_unified")
        engine |= {"max_num_seqs" if unified else "batch": slots} if slots else {}
    known = Request().to_dict()
    told = {k: v for k, v in log.options.items() if k in known}
    return Request.from_dict({**engine, **told, **given})


def _compared(log: Log, estimate: Estimate | None) -> list[Compared]:
    figures = FIGURES[log.engine]
    printed = [*log.printed, *_sums(log)]
    found = []
    for p in printed:
        figure, why = figures.get(_known(p.name, printed), (None, ""))
        value = figure(estimate) if figure and estimate else None
        exact = value is not None and abs(value - p.value) * 2 <= p.digit
        shown = Compared(
            name=p.name,
            line=p.line or None,
            printed=p.text,
            unit=p.unit,
            logged=p.value,
            estimated=value,
            exact=exact,
            why=why if value is not None else "",
        )
        found.append(shown)
    return found + _a_token(log, estimate)


def _known(name: str, printed: list[Printed]) -> str:
    """The name under which a figure is estimated: llama.cpp's devices are the one GPU, or the CPU.

    >>> _known("cache on CUDA0", []), _known("compute buffer on CUDA_Host", []), _known("weights on CPU_Mapped", [])
    ('cache on GPU', 'compute buffer on CUDA_Host', 'weights on CPU')
    """
    what, on, device = name.partition(" on ")
    if not on or device == "the device" or device.endswith("_Host"):
        return name
    if device in HOST:
        return f"{what} on CPU"
    same = {p.name for p in printed if p.name.startswith(f"{what} on ") and not p.name.endswith((*HOST, "_Host"))}
    return name if len(same) > 1 else f"{what} on GPU"


def _sums(log: Log) -> list[Printed]:
    """What PyTorch's message means together: the allocation that failed on top of what stood."""
    by = {p.name: p for p in log.printed}
    if log.engine != "PyTorch":
        return []
    sums = []
    for name, parts in (
        ("allocated with the one that failed", ("allocated", "asked for last")),
        ("reserved", ("allocated", "reserved, unallocated")),
    ):
        if all(part in by for part in parts) and name not in by:
            total = sum(by[part].value for part in parts)
            digit = sum(by[part].digit for part in parts)
            sums.append(Printed(name=name, line=0, text=gib(total), value=total, digit=digit))
    return sums


def _a_token(log: Log, estimate: Estimate | None) -> list[Compared]:
    """Bytes of the cache a token, of the pool and its tokens: what needs no GPU to be compared."""
    by = {p.name: p for p in log.printed}
    tokens = by.get("tokens")
    parts = [by[n] for n in ("pool", "keys", "values") if n in by]
    if log.engine not in ENGINES or not tokens or not tokens.value or not parts or "sliding tokens" in by:
        return []
    total, digit = sum(p.value for p in parts), sum(p.digit for p in parts)
    logged = round(total / tokens.value)
    estimated = estimate.serving.kv_bytes_per_token if estimate and estimate.serving else None
    near = estimated is not None and abs(estimated - logged) <= digit / tokens.value + 16 * logged / tokens.value + 1
    why = "pool ÷ tokens"
    return [
        Compared(
            name="cache a token",
            line=None,
            printed=f"{logged:,} B",
            unit="bytes",
            logged=logged,
            estimated=estimated,
            exact=near,
            why=why,
        )
    ]


def _verdict(log: Log, estimate: Estimate | None) -> list[str]:
    """What the message says of the GPU, and whether the estimate agrees that it had to run out."""
    by = {p.name: p.value for p in log.printed}
    said = []
    if {"capacity", "free", "on the device"} <= set(by):
        others = by["capacity"] - by["free"] - by["on the device"]
        if others > GiB // 4:
            said.append(f"other processes hold {gib(others)} of the GPU")
    if estimate and "capacity" in by:
        over = estimate.device_bytes - by["capacity"]
        words = f"{gib(abs(over))} {'more than' if over > 0 else 'less than'} the GPU's {gib(by['capacity'])}"
        more = "" if over > 0 else ": the run that failed was larger than the request, or its memory was in pieces"
        said.append(f"the estimate takes {words}{more}")
    return said
