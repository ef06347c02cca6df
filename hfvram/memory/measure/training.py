"""Two training steps as measured: forward, backward, clipping, update; LoRA and QLoRA by PEFT."""

import contextlib
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from hfvram.errors import HfvramError
from hfvram.memory import bitsandbytes
from hfvram.memory.exact.adapters import package, prepared, wrapped
from hfvram.memory.exact.build import DTYPES
from hfvram.memory.exact.optimizers import optimizer, states
from hfvram.memory.exact.training import STEPS, linear, loss_of
from hfvram.memory.measure.build import clean
from hfvram.memory.measure.inference import mask, tokens
from hfvram.memory.measure.meter import Meter
from hfvram.model.parts import frozen
from hfvram.request import Request

BITSANDBYTES = {"adamw": "AdamW", "ademamix": "AdEMAMix", "lion": "Lion", "rmsprop": "RMSprop"}
"""Its classes, which transformers makes with `optim_bits` and `is_paged`, by the start of the optimizer's name."""
UNMEASURED = ("galore_adamw", "apollo_adamw")


@dataclass(slots=True)
class Trained:
    """What a training keeps, in raw bytes."""

    parameters: int
    gradients_bytes: int = 0
    optimizer_bytes: int = 0


def prepare(model: Any, request: Request, device: str) -> Any:
    """The model as it is trained: checkpointed, frozen in parts, with adapters. Raises `usage`, `missing_extra`."""
    model.train()
    if request.gradient_checkpointing:
        every = {"every_n_layers": request.checkpoint_every} if request.checkpoint_every > 1 else {}
        model.gradient_checkpointing_enable(**every)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    if request.mode in ("lora", "qlora"):
        peft = package()
        with warnings.catch_warnings(action="ignore"):
            model = wrapped(peft, prepared(peft, model, request), request)
    elif request.freeze:
        means = frozen((name for name, _ in model.named_parameters()), request.freeze)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in means)
    clean(device)
    return model


def real_optimizer(request: Request, parameters: list[Any], model: Any) -> Any:
    """The optimizer itself. Raises `usage` for those of which there are only stand-ins, `missing_extra`."""
    if request.optimizer in UNMEASURED:
        raise HfvramError("usage", f"--optimizer {request.optimizer} is not measured: it needs a package of its own")
    if request.optimizer in bitsandbytes.OPTIMIZERS:
        try:
            import bitsandbytes as bnb
        except ImportError as error:
            message = f"--optimizer {request.optimizer} on a GPU needs: pip install bitsandbytes"
            raise HfvramError("missing_extra", message) from error
        _, bits, paged = bitsandbytes.OPTIMIZERS[request.optimizer]
        kind = request.optimizer.removeprefix("paged_").partition("_")[0]
        options = {"optim_bits": bits} | ({"is_paged": True} if paged else {})
        return getattr(bnb.optim, BITSANDBYTES[kind])(parameters, lr=1e-6, **options)
    return optimizer(request.optimizer, parameters, linear(model, parameters))


def train(model: Any, request: Request, meter: Meter, device: str) -> Trained:
    """Two steps of a prepared model; `grad_accum` forward and backward passes in each."""
    ids = tokens(model.get_base_model() if hasattr(model, "get_base_model") else model, request, device)
    given = {"input_ids": ids, "labels": ids, **mask(ids, request)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = Trained(parameters=sum(p.numel() for p in parameters))
    opt = real_optimizer(request, parameters, model)
    mixed = request.mixed_precision != "no"
    scaler = torch.amp.GradScaler(device) if request.mixed_precision == "fp16" and device == "cuda" else None
    for step in range(STEPS):
        for _ in range(request.grad_accum):
            region = torch.autocast(device, DTYPES[request.mixed_precision]) if mixed else contextlib.nullcontext()
            with region:
                loss = loss_of(model(**given))
            meter.mark(f"fwd{step}")
            (scaler.scale(loss) if scaler else loss).backward()
            del loss
            meter.mark(f"bwd{step}")
        if scaler:
            scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        meter.mark(f"clip{step}")
        found.gradients_bytes = sum(p.grad.numel() * p.grad.element_size() for p in parameters if p.grad is not None)
        if scaler:
            scaler.step(opt)
            scaler.update()
        else:
            opt.step()
        meter.mark(f"step{step}")
        found.optimizer_bytes = sum(t.numel() * t.element_size() for _, t in states(opt) if t.device.type == device)
        for parameter in parameters:
            parameter.grad = None
    meter.mark("train")
    return found
