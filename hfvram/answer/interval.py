"""Where the true figure probably lies, by the errors of the measured cases most like the question."""

import json
from functools import cache
from pathlib import Path

from hfvram.answer.estimate import Interval
from hfvram.memory.generation import MEASURED
from hfvram.model.architecture import Architecture
from hfvram.model.layers import Attention, LatentAttention
from hfvram.request import Request

MARGIN = 0.01
"""Nothing is claimed to be nearer than this: other drivers and library versions move the last per cent."""


def interval(architecture: Architecture, request: Request, device_bytes: int) -> Interval:
    """`device_bytes` divided by one plus the largest and smallest error of the group's measured cases."""
    name = group(architecture, request)
    errors = _accuracy()["simulate" if request.method == "simulate" else "formula"].get(name)
    if errors is None:
        return Interval(
            low_bytes=int(device_bytes * 0.9),
            high_bytes=int(device_bytes * 1.1),
            basis="no measured case is like this one: ±10 %",
        )
    low, high = min(errors["low"], -MARGIN), max(errors["high"], MARGIN)
    basis = f"{errors['cases']} measured cases ({name}, H100): {errors['low']:+.1%} to {errors['high']:+.1%}"
    return Interval(low_bytes=int(device_bytes / (1 + high)), high_bytes=int(device_bytes / (1 + low)), basis=basis)


def group(architecture: Architecture, request: Request) -> str:
    """The group of measured cases that a question belongs to, as `scripts/score.py` names them."""
    if not architecture.closed_form:
        return "layers of unknown kinds"
    if request.mode != "inference" and architecture.task != "seq2seq" and len(architecture.stacks) > 1:
        return f"{request.mode} of a model with towers"
    if request.cache in ("offloaded", "quantized") or request.attention == "flash_attention_2":
        return f"{request.mode} with {request.cache} cache and {request.attention}"
    if request.offload:
        return f"{request.mode} with offloading"
    if request.expandable_segments or request.compute_capability not in (None, MEASURED):
        return f"{request.mode} with another allocator or GPU"
    if request.fsdp or request.tp > 1 or ((request.gpus or 1) > 1 and request.mode != "inference"):
        return "fsdp" if request.fsdp and request.tp == 1 else f"{request.mode} on {request.gpus} GPUs"
    if request.mode in ("lora", "qlora"):
        return request.mode
    quant = architecture.quantization if request.quant == "auto" else request.quant
    if quant not in (None, "none"):
        return f"{request.mode}-quantized" if quant in ("nf4", "fp4", "int8") else f"{request.mode} in {quant}"
    attention = (Attention, LatentAttention)
    if any(not isinstance(m, attention) for layer in architecture.text.layers for m in layer.mixers):
        kind = "ssm" if request.kernels == "fused" else "ssm-fallback"
    else:
        kind = "moe" if architecture.moe else "dense"
    return f"{request.mode}-{kind}" + ("-ckpt" if request.gradient_checkpointing else "")


@cache
def _accuracy() -> dict[str, dict[str, dict[str, float]]]:
    """Errors of the engines' device figures by group, written by `scripts/score.py --accuracy`."""
    found: dict[str, dict[str, dict[str, float]]]
    found = json.loads(Path(__file__).with_name("accuracy.json").read_text())
    return found
