"""One measurement from end to end."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from hfvram.errors import HfvramError
from hfvram.memory.measure.meter import Meter, Reading, cuda_reading
from hfvram.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured; peaks are those after building, over the whole request."""

    parameters: int
    trainable_parameters: int | None
    built_allocated_bytes: int
    weights_bytes: int
    buffers_bytes: int
    cache_bytes: int | None
    gradients_bytes: int
    optimizer_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    context_bytes: int
    device_bytes: int
    phases: Mapping[str, int]
    """The peak of each phase alone."""
    peaks: Mapping[str, int]
    allocated: Mapping[str, int]
    environment: Mapping[str, str]
    summary: str
    """`torch.cuda.memory_summary()` at the end."""


def ready() -> None:
    """Raises `missing_extra` without torch, `no_gpu` where it finds no CUDA device."""
    try:
        import torch
    except ImportError as error:
        raise HfvramError("missing_extra", "measuring needs torch: pip install 'hfvram[exact]'") from error
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if not torch.cuda.is_available():
        raise HfvramError(
            "no_gpu", "PyTorch finds no CUDA GPU on this machine: hfvram measure needs one, or --read-log"
        )


def capability() -> str:
    """The local GPU's generation, as `compute_capability` has it."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def measure(
    config: Mapping[str, Any],
    class_name: str | None,
    request: Request,
    *,
    device: str = "cuda",
    read: Callable[[], Reading] = cuda_reading,
    snapshot: str | None = None,
) -> Measured:
    """Build the model on the device, run the resolved request there, and read memory.

    `snapshot`: a file for PyTorch's viewer of memory. Raises `usage`, `missing_extra` and what building raises;
    `no_gpu` where the GPU's memory runs out.
    """
    import torch

    meter = Meter(read)
    try:
        return _measured(config, class_name, request, meter, device, snapshot)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or isinstance(error.__cause__, torch.OutOfMemoryError):
            last = next(reversed(meter.marks), "start")
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            raise HfvramError("no_gpu", f"the GPU's memory ran out after {last}: {reason}") from error
        raise
    finally:
        if snapshot and device == "cuda":
            _write(snapshot)


def _measured(
    config: Mapping[str, Any],
    class_name: str | None,
    request: Request,
    meter: Meter,
    device: str,
    snapshot: str | None,
) -> Measured:
    import torch

    from hfvram.memory.measure.build import build, held_bytes
    from hfvram.memory.measure.inference import infer
    from hfvram.memory.measure.training import prepare, train

    torch.manual_seed(0)
    meter.mark("start")
    if snapshot and device == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    model = build(config, class_name, request, device)
    count = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    meter.mark("built")
    start, cache, trained = "built", None, None
    if request.mode == "inference":
        weights, buffers = held_bytes(model)
        cache = infer(model, request, meter, device)
    else:
        model = prepare(model, request, device)
        if request.mode in ("lora", "qlora"):
            start = "adapted"
            meter.mark(start)
        weights, buffers = held_bytes(model)
        trained = train(model, request, meter, device)
    after = meter.after(start)
    return Measured(
        parameters=count,
        trainable_parameters=trained.parameters if trained else None,
        built_allocated_bytes=meter.marks["built"].allocated_bytes,
        weights_bytes=weights,
        buffers_bytes=buffers,
        cache_bytes=cache,
        gradients_bytes=trained.gradients_bytes if trained else 0,
        optimizer_bytes=trained.optimizer_bytes if trained else 0,
        peak_allocated_bytes=max(r.peak_allocated_bytes for r in after.values()),
        peak_reserved_bytes=max(r.peak_reserved_bytes for r in after.values()),
        context_bytes=meter.marks["start"].device_bytes,
        device_bytes=list(after.values())[-1].device_bytes,
        phases={name: r.peak_allocated_bytes for name, r in after.items()},
        peaks=meter.running_peaks(start),
        allocated={name: r.allocated_bytes for name, r in meter.marks.items() if name != "start"},
        environment=_environment(device),
        summary=torch.cuda.memory_summary() if device == "cuda" else "",
    )


def _environment(device: str) -> dict[str, str]:
    import torch

    found = {"device": torch.cuda.get_device_name() if device == "cuda" else device}
    for package in ("torch", "transformers", "peft", "bitsandbytes", "hfvram"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _write(path: str) -> None:
    """The snapshot, for pytorch.org/memory_viz."""
    import torch

    try:
        torch.cuda.memory._dump_snapshot(path)
    except OSError as error:
        raise HfvramError("io", f"{path}: {error.strerror}") from error
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
