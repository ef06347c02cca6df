"""The exact engine from end to end: a configuration and a request → what the model's own code allocates."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from hfvram.memory.exact.build import build, name_tensors
from hfvram.memory.exact.inference import infer
from hfvram.memory.exact.quantized import quantize
from hfvram.memory.exact.run import Run
from hfvram.memory.exact.state_space import fused
from hfvram.memory.timeline import Timeline
from hfvram.request import Request


def simulate(config: Mapping[str, Any], class_name: str | None, request: Request) -> Timeline:
    """The timeline of a request that leaves nothing open (`answer.resolve`), by running the model on meta.

    Raises `missing_extra`, `unknown_architecture`, `bad_config` as building the model does, `usage` for what this
    engine can't run.
    """
    run = Run()
    model = build(run.tracker, config, class_name, request.dtype, request.attention)
    quantize(run, model, request)
    name_tensors(run.tracker, model)
    run.stands()
    inference = request.mode == "inference"
    with fused(run, model, gradients=not inference) if request.kernels == "fused" else nullcontext():
        if inference:
            infer(run, model, request)
        else:
            from hfvram.memory.exact.training import train

            train(run, model, request)
    return run.timeline
