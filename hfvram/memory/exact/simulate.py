"""The exact engine from end to end: a configuration and a request → what the model's own code allocates."""

from collections.abc import Mapping
from typing import Any

from hfvram.memory.exact.build import build
from hfvram.memory.exact.run import Run
from hfvram.memory.timeline import Timeline
from hfvram.request import Request


def simulate(config: Mapping[str, Any], class_name: str | None, request: Request) -> Timeline:
    """The timeline of a request that leaves nothing open (`answer.resolve`), by running the model on meta.

    Raises `missing_extra`, `unknown_architecture`, `bad_config` as building the model does, `usage` for what this
    engine can't run.
    """
    run = Run()
    model = build(run.tracker, config, class_name, request.dtype, request.attention)
    run.stands()
    if request.mode == "inference":
        from hfvram.memory.exact.inference import infer

        infer(run, model, request)
    else:
        from hfvram.memory.exact.training import train

        train(run, model, request)
    return run.timeline
