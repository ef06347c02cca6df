"""Two training steps on the meta device: forward, backward, clipping, optimizer step, as a training loop runs them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from hfvram.errors import HfvramError
from hfvram.memory.exact.build import DTYPES
from hfvram.memory.exact.data_dependent import legible
from hfvram.memory.exact.inputs import inputs
from hfvram.memory.exact.labels import name_gradients, name_states
from hfvram.memory.exact.optimizers import fused_on_meta, optimizer, states
from hfvram.memory.exact.run import Run
from hfvram.model.parts import frozen
from hfvram.request import Request

STEPS = 2
"""The first step makes the optimizer's states, the second has them from its start."""


def train(run: Run, model: Any, request: Request) -> None:
    """Train a built model for two steps. The peaks start anew before the first."""
    given = inputs(run, model, request)
    if request.padding and "input_ids" in given:
        given["attention_mask"] = padding_mask(run, given["input_ids"])
    model.train()
    if request.gradient_checkpointing:
        model.gradient_checkpointing_enable(every_n_layers=request.checkpoint_every)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    if request.mode in ("lora", "qlora"):
        from hfvram.memory.exact.adapters import adapt

        trained = adapt(run, model, request)
    else:
        trained = model
        if request.freeze:
            means = frozen((name for name, _ in model.named_parameters()), request.freeze)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name not in means)
    if run.mesh is not None:
        from hfvram.memory.exact.ranks import place

        trained = place(run, trained, request)
    run.stands()
    parameters = [p for p in trained.parameters() if p.requires_grad]
    with run.on_cuda(model), run.autocast.stands_in(), legible():
        steps(run, trained, given, parameters, request)


def padding_mask(run: Run, ids: Any) -> Any:
    """The mask of sequences that are not all of one length; without one, attention needs none."""
    run.tracker.unpadded = False
    with run.tracker, run.tracker.making("inputs"):
        return torch.ones_like(ids)


def steps(run: Run, model: Any, given: dict[str, Any], parameters: list[Any], request: Request) -> None:
    """Forward, backward and update, twice. FSDP has a precision of its own, and needs no autocast."""
    tracker, timeline = run.tracker, run.timeline
    held = [own(p) for p in parameters]
    names = {id(p): n for n, p in model.named_parameters()}
    named = [(names[id(p)], h) for p, h in zip(parameters, held, strict=True)]
    timeline.trainable_parameters = sum(p.numel() for p in parameters)  # of all ranks
    opt = optimizer(request.optimizer, held, linear(model, parameters))
    autocast = request.mixed_precision != "no" and request.fsdp is None
    scale = loss_scale(parameters) if autocast and request.mixed_precision == "fp16" else None
    for _ in range(STEPS):
        for missing in reversed(range(min(request.grad_accum, 2))):  # later ones are as the second
            with unsynced(model) if missing else contextlib.nullcontext():
                timeline.mark("forward")
                with run.autocast.region(DTYPES.get(request.mixed_precision), autocast):
                    out = model(**given)
                    loss = loss_of(out)
                    loss = loss if scale is None else loss * scale
                timeline.mark("backward")
                torch.autograd.backward([loss])
                del out, loss
        for p, h in zip(parameters, held, strict=True):
            h.grad = part(p.grad)
        name(run, named, opt)
        timeline.mark("clipping")
        with tracker.making("activations", "gradient clipping"):
            clip(held)
        timeline.mark("optimizer step")
        with tracker.making("optimizer", "temporaries of the optimizer step"), fused_on_meta():
            opt.step()
        name(run, named, opt)
        for p in (*parameters, *held):
            p.grad = None
    timeline.mark("end")


def linear(model: Any, parameters: list[Any]) -> list[bool]:
    """Which parameters are weights of linear layers, the head's left out: those that Muon, GaLore and APOLLO treat."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else getattr(model, "module", model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    head = getattr(head, "original_module", head), *getattr(head, "modules_to_save", {}).values()
    weights = {id(m.weight) for m in inner.modules() if isinstance(m, torch.nn.Linear) and m not in head}
    return [id(p) in weights and p.dim() == 2 for p in parameters]


def loss_of(out: Any) -> Any:
    """The model's loss; of a model that has none, the sum of its first output."""
    loss = getattr(out, "loss", None)
    return out[0].sum() if loss is None else loss


def loss_scale(parameters: list[Any]) -> Any:
    """The scale of `GradScaler`, which refuses gradients in fp16. Raises `usage`."""
    if any(p.dtype == torch.float16 for p in parameters):
        raise HfvramError("usage", "--mixed-precision fp16 can't train fp16 weights: valid are --dtype fp32 and bf16")
    return torch.full((), 65536.0, dtype=torch.float32, device="meta")


def name(run: Run, parameters: list[tuple[str, Any]], opt: Any) -> None:
    """Say which tensors are gradients and which are the optimizer's, and how many bytes each are in all."""
    name_gradients(run.tracker, parameters)
    name_states(run.tracker, parameters, opt)
    timeline, kept = run.timeline, list(states(opt))
    grads = [p.grad for _, p in parameters if p.grad is not None]
    timeline.gradients_bytes = sum(g.numel() * g.element_size() for g in grads)
    timeline.managed_bytes = getattr(opt, "managed_bytes", 0)
    own_bytes = sum(v.numel() * v.element_size() for _, v in kept if v.device.type == "meta")
    timeline.optimizer_bytes = own_bytes + timeline.managed_bytes


def own(parameter: Any) -> Any:
    """The parameter, of a DTensor the part that this rank holds: clipping and optimizers work on that alone."""
    local = part(parameter)
    return parameter if local is parameter else torch.nn.Parameter(local)


def part(tensor: Any) -> Any:
    """This rank's part of a DTensor, once it has arrived; any other tensor as it is."""
    local = getattr(tensor, "_local_tensor", tensor)
    return getattr(local, "elem", local)


@contextlib.contextmanager
def unsynced(model: Any) -> Iterator[None]:
    """Gradients stay on their rank until the last of the accumulated steps, as accelerate's `no_sync` has it."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    else:
        with model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext():
            yield


def clip(parameters: list[Any]) -> None:
    """`torch.nn.utils.clip_grad_norm_` as it runs on CUDA."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = [torch.linalg.vector_norm(g) for g in grads]
    total = torch.linalg.vector_norm(torch.stack([n.to(torch.float32) for n in norms]))
    factor = (1.0 / (total + 1e-6)).clamp(max=1.0)
    for g in grads:
        g.mul_(factor)
