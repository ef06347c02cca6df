"""The exact engine from end to end: a configuration and a request → what the model's own code allocates."""

import gc
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import transformers

from hfvram.errors import HfvramError, printable
from hfvram.memory.exact.build import build
from hfvram.memory.exact.flash_attention import ask_for_flash, flash_kernels
from hfvram.memory.exact.fp8 import fp8_kernels, load_fp8
from hfvram.memory.exact.inference import infer
from hfvram.memory.exact.labels import name_tensors
from hfvram.memory.exact.quantized import quantize
from hfvram.memory.exact.run import Run
from hfvram.memory.exact.state_space import fused
from hfvram.memory.generation import generation
from hfvram.memory.timeline import Timeline
from hfvram.request import Request


def simulate(config: Mapping[str, Any], class_name: str | None, request: Request) -> Timeline:
    """The timeline of a request that leaves nothing open (`answer.resolve`), by running the model on meta.

    Raises `missing_extra`, `unknown_architecture`, `bad_config` as building the model does, `unknown_architecture` too
    where its code can't run on meta, `usage` for what this engine can't run.
    """
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"):
            run = Run(gpu=generation(request.compute_capability))
            with frozen(), ranks_of(run, request):
                _simulate(run, config, class_name, request)
            return run.timeline
    except HfvramError:
        raise
    except Exception as error:  # the values are anyone's, and so is what the model's code does with them
        if os.environ.get("HFVRAM_DEBUG") == "1":
            raise
        kind, reason = printable(str(config.get("model_type")), 60), printable(" ".join(str(error).split()), 200)
        message = (
            f"the code of {kind} can't run on the meta device ({type(error).__name__}: {reason}): --method formula"
        )
        raise HfvramError("unknown_architecture", message) from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def _simulate(run: Run, config: Mapping[str, Any], class_name: str | None, request: Request) -> None:
    model = build(run.tracker, config, class_name, request.dtype, request.attention)
    if request.attention == "flash_attention_2":
        ask_for_flash(model, request)
    if request.quant == "fp8":
        load_fp8(run, model, config, request)
    else:
        quantize(run, model, request)
    name_tensors(run.tracker, model)
    if request.tp > 1:
        from hfvram.memory.exact.ranks import split

        split(run, model, request)
    run.stands()
    inference = request.mode == "inference"
    with ExitStack() as kernels:
        if request.kernels == "fused":
            kernels.enter_context(fused(run, model, gradients=not inference))
        if request.quant == "fp8":
            kernels.enter_context(fp8_kernels())
        if request.attention == "flash_attention_2":
            kernels.enter_context(flash_kernels())
        if inference:
            infer(run, model, request)
        else:
            from hfvram.memory.exact.training import train

            train(run, model, request)


@contextmanager
def frozen() -> Iterator[None]:
    """What is imported is left out of garbage collections: half a second each with torch and transformers."""
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def ranks_of(run: Run, request: Request) -> AbstractContextManager[None]:
    """The ranks of a request on several GPUs. Replicas that don't train have nothing in common."""
    alone = request.tp == 1 and request.fsdp is None and not request.sp
    if alone and (request.mode == "inference" or request.gpus in (None, 1)):
        return nullcontext()
    from hfvram.memory.exact.ranks import ranks

    return ranks(run, request)
