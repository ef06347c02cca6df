"""What a request was predicted to take, and what it took on this machine's GPU, item by item and phase by phase."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final

from hfvram.answer.estimate import Estimate
from hfvram.answer.question import Session
from hfvram.errors import HfvramError
from hfvram.memory.measure import run
from hfvram.memory.measure.meter import Reading, cuda_reading
from hfvram.memory.measure.run import Measured
from hfvram.memory.mesh import mesh_of
from hfvram.model.identify import Model
from hfvram.model.layers import Mamba1, Mamba2
from hfvram.request import CHOICES, Request
from hfvram.units import GiB, gib

PHASES: Final = {"fwd": "forward", "bwd": "backward", "clip": "clipping", "step": "optimizer step"}
"""Marks of a training step, and the phases of an estimate."""
DEFAULTS: Final = Request().to_dict()
NOT_SAVED: Final = ("gpu", "method", "max_ctx", "max_batch", "recommend", "allow_unknown", "trust_remote_code", "gpus")


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """One figure, predicted and measured; either is None where there is none."""

    name: str
    kind: str
    predicted_bytes: int | None
    measured_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A prediction and a measurement of the same request, beside each other."""

    estimate: Estimate
    measured: Measured
    config: Mapping[str, Any]
    beside: tuple[Beside, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "figures": [{n: getattr(b, n) for n in Beside.__slots__} for b in self.beside],
            "measured": self.line()["measured"] | {"phases": dict(self.measured.phases)},
            "environment": dict(self.measured.environment),
            "estimate": self.estimate.to_dict(),
            "warnings": list(self.warnings),
            "error": None,
        }

    def line(self) -> dict[str, Any]:
        """The line that `--save` appends: what fixtures/measured has of a case."""
        e, m = self.estimate, self.measured
        asked = {k: v for k, v in e.request.to_dict().items() if k not in NOT_SAVED and v != DEFAULTS[k]}
        always = {k: getattr(e.request, k) for k in ("mode", "dtype", "batch", "ctx", "kernels")}
        name = f"{e.model.id.rpartition('/')[2].lower()}.{e.request.mode}.batch{e.request.batch}.seq{e.request.ctx}"
        keys = ["parameters", "trainable_parameters", "built_allocated_bytes", "cache_bytes", "peak_allocated_bytes"]
        keys += ["peak_reserved_bytes", "context_bytes", "device_bytes"]
        figures = {k: getattr(m, k) for k in keys} | {"peaks": dict(m.peaks), "allocated": dict(m.allocated)}
        return {
            "id": name,
            "config": dict(self.config),
            "request": {**always, **asked},
            "measured": figures,
            "environment": dict(m.environment),
        }


def measure(
    model: str,
    request: Request,
    *,
    snapshot: str | None = None,
    device: str = "cuda",
    read: Callable[[], Reading] = cuda_reading,
    notes: tuple[str, ...] = (),
    **source: Any,
) -> Measurement:
    """Predict a request, run it on this machine's GPU, and set the two beside each other.

    Raises `no_gpu` without one, before anything is read; `usage` for what one GPU can't run; whatever the estimate and
    building the model raise.
    """
    if device == "cuda":
        run.ready()
    check(request)
    if device == "cuda" and request.compute_capability is None and run.capability() in CHOICES["compute_capability"]:
        request = request.with_(compute_capability=run.capability())
    session = Session()
    known = session.model(model, request, **source)
    _check_model(known, request)
    request, said = _kernels(known, request)
    estimate = session.estimate(model, request, **source)
    found = run.measure(
        known.checkpoint.config,
        known.architecture.class_name,
        estimate.request,
        device=device,
        read=read,
        snapshot=snapshot,
    )
    if found.context_bytes > GiB:
        said.append(f"{gib(found.context_bytes)} of the GPU were in use before: figures of the device hold them, too")
    if found.parameters != estimate.model.parameters:
        said.append(f"{found.parameters:,} parameters were built, not {estimate.model.parameters:,}")
    return Measurement(
        estimate=estimate,
        measured=found,
        config=known.checkpoint.config,
        beside=tuple(compared(estimate, found)),
        warnings=(*notes, *estimate.warnings, *said),
    )


def check(request: Request) -> None:
    """Raises `usage` for what is not run on one GPU by transformers."""
    if request.engine != "transformers":
        raise HfvramError("usage", f"--engine {request.engine}: measured is transformers; --read-log reads its log")
    if mesh_of(request).gpus > 1 or request.fsdp or request.zero or request.offload or request.sp:
        raise HfvramError("usage", "measured is one GPU: leave out --gpus, --tp, --fsdp, --zero and --offload")
    if request.quant == "fp8":
        raise HfvramError("usage", "--quant fp8 is not measured: valid are none, nf4, fp4 and int8")


def _check_model(model: Model, request: Request) -> None:
    if model.components:
        raise HfvramError("usage", "a pipeline of several models is not measured: name one of them")
    if model.architecture.quantization and request.quant == "auto":
        own = model.architecture.quantization
        raise HfvramError("usage", f"the checkpoint is {own}, and no weights are read: --quant none measures its model")


def _kernels(model: Model, request: Request) -> tuple[Request, list[str]]:
    """The kernels that are installed, where a model has a use for them."""
    mixers = [m for layer in model.architecture.text.layers for m in layer.mixers]
    if not any(isinstance(m, (Mamba1, Mamba2)) for m in mixers):
        return request, []
    there = "fused" if find_spec("mamba_ssm") and find_spec("causal_conv1d") else "fallback"
    if there == request.kernels:
        return request, []
    return request.with_(kernels=there), [f"--kernels {there}: that is what is installed here"]


def compared(estimate: Estimate, found: Measured) -> list[Beside]:
    """Raw sizes of the whole, then the peaks, then each phase; items that are not measured alone are left out."""
    rows = [
        Beside(name=name, kind="item", predicted_bytes=predicted, measured_bytes=measured)
        for name, predicted, measured in (
            ("weights", estimate.weights_bytes, found.weights_bytes),
            ("buffers", _buffers(estimate), found.buffers_bytes),
            ("cache", estimate.cache_bytes, found.cache_bytes or 0),
            ("gradients", estimate.gradients_bytes, found.gradients_bytes),
            ("optimizer", estimate.optimizer_bytes, found.optimizer_bytes),
        )
        if predicted or measured
    ]
    peaks = ("peak_allocated_bytes", "peak_reserved_bytes", "device_bytes")
    rows += [
        Beside(
            name=name.removesuffix("_bytes").replace("_", " "),
            kind="peak",
            predicted_bytes=getattr(estimate, name),
            measured_bytes=getattr(found, name),
        )
        for name in peaks
    ]
    return rows + _phases(estimate, found)


def _buffers(estimate: Estimate) -> int:
    return sum(item.bytes for item in estimate.items if item.category == "buffers")


def _phases(estimate: Estimate, found: Measured) -> list[Beside]:
    """The peak of each phase, of the two steps the higher; predicted live, so without the allocator's rounding."""
    measured: dict[str, int] = {}
    for mark, peak in found.phases.items():
        name = PHASES.get(mark.rstrip("0123456789"))
        if name:
            measured[name] = max(measured.get(name, 0), peak)
    predicted = {p.name: p.live_bytes for p in estimate.phases}
    return [
        Beside(name=n, kind="phase", predicted_bytes=predicted.get(n), measured_bytes=peak)
        for n, peak in measured.items()
    ]
