"""The road from a name and a request to an `Estimate`."""

from hfvram import __version__
from hfvram.answer import guide
from hfvram.answer.estimate import Estimate, Fit, ModelFacts, Recommended
from hfvram.answer.fit import judge
from hfvram.answer.gpus import find_gpu, recommend
from hfvram.answer.interval import interval
from hfvram.answer.items import items
from hfvram.answer.resolve import resolve
from hfvram.answer.supported import check
from hfvram.memory.allocator import replay
from hfvram.memory.device import device_bytes
from hfvram.memory.formula import timeline
from hfvram.model.architecture import Architecture
from hfvram.model.identify import Model, identify, needs_headers
from hfvram.model.layers import GatedDeltaNet, LatentAttention, Mamba1, Mamba2
from hfvram.read.open import read_all_headers, read_checkpoint
from hfvram.request import Request
from hfvram.units import gib


class Session:
    """Answers questions, and reads each model once."""

    def __init__(self) -> None:
        self._models: dict[tuple[object, ...], Model] = {}

    def estimate(
        self,
        model: str,
        request: Request,
        *,
        revision: str | None = None,
        token: str | None = None,
        offline: bool = False,
        file: str | None = None,
    ) -> Estimate:
        """What `request` takes of one GPU. Raises `HfvramError` of every kind of SPEC's table."""
        check(request)
        return answer(self.model(model, revision, token, offline, file), request)

    def model(self, name: str, revision: str | None, token: str | None, offline: bool, file: str | None) -> Model:
        """The model of a name, read once."""
        key = (name, revision, token, offline, file)
        if key not in self._models:
            checkpoint = read_checkpoint(name, revision=revision, token=token, offline=offline, file=file)
            model = identify(checkpoint)
            if needs_headers(checkpoint, model.architecture):
                model = identify(read_all_headers(checkpoint, token=token, offline=offline))
            self._models[key] = model
        return self._models[key]


def estimate(
    model: str,
    request: Request,
    *,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    file: str | None = None,
) -> Estimate:
    """One question, one answer: `Session().estimate`."""
    return Session().estimate(model, request, revision=revision, token=token, offline=offline, file=file)


def answer(model: Model, asked: Request) -> Estimate:
    """The estimate of a model that was read already."""
    architecture = model.architecture
    request, notes = resolve(architecture, asked)
    written = timeline(architecture, request)
    peaks = replay(written)
    found = items(written, peaks)
    device = device_bytes(peaks.reserved_bytes)
    totals = {category: 0 for category in ("weights", "activations")}
    for item in found:
        if item.category in totals:
            totals[item.category] += item.bytes
    rule = guide.rule(_guide_items(model, request))
    fit, fit_notes = _fit(architecture, request, device) if request.gpu else (None, [])
    recommended = recommend(device) if request.recommend else ()
    return Estimate(
        model=_facts(model),
        request=request,
        method="formula",
        versions={"hfvram": __version__, "transformers": "5.17", "torch": "2.11"},
        items=found,
        peak_phase=written.phase_at(peaks.event),
        weights_bytes=totals["weights"],
        cache_bytes=written.cache_bytes,
        gradients_bytes=0,
        optimizer_bytes=0,
        activations_bytes=totals["activations"],
        peak_allocated_bytes=peaks.allocated_bytes,
        peak_reserved_bytes=peaks.reserved_bytes,
        device_bytes=device,
        interval=interval(architecture, request, device),
        guide=rule,
        fit=fit,
        recommended=tuple(Recommended(gpu=g.name, capacity_bytes=g.memory_bytes) for g in recommended),
        warnings=(*model.warnings, *notes, *fit_notes, *_alternatives(architecture, request, device)),
    )


def taken(architecture: Architecture, asked: Request) -> int:
    """Device bytes alone, for searches: the same road without the items."""
    request, _ = resolve(architecture, asked)
    return device_bytes(replay(timeline(architecture, request)).reserved_bytes)


def _fit(architecture: Architecture, request: Request, device: int) -> tuple[Fit, list[str]]:
    gpu, note = find_gpu(request.gpu or "")
    known = {request: device}
    found = judge(
        lambda r: known[r] if r in known else taken(architecture, r), request, gpu, max_positions=architecture.max_positions
    )
    return found, [note] if note else []


def _alternatives(architecture: Architecture, request: Request, device: int) -> list[str]:
    """What the same request takes where an assumption that people can't see does not hold."""
    said = []
    if request.batch > 1 and not request.padding and request.phase == "generate":
        padded = taken(architecture, request.with_(padding=True)) - device
        if padded > 0:
            said.append(f"sequences of unequal length would add {gib(padded)} for their padding mask (--padding)")
    if any(isinstance(m, (Mamba1, Mamba2)) for layer in architecture.text.layers for m in layer.mixers):
        other = "fallback" if request.kernels == "fused" else "fused"
        words = "not installed" if other == "fallback" else "installed"
        total = gib(taken(architecture, request.with_(kernels=other)))
        said.append(f"with the mamba-ssm and causal-conv1d kernels {words} (--kernels {other}) it takes {total}")
    return said


def _facts(model: Model) -> ModelFacts:
    a, checkpoint = model.architecture, model.checkpoint
    mixers = [m for layer in a.text.layers for m in layer.mixers]
    attention, moe = a.attention, a.moe
    latent = next((m for m in mixers if isinstance(m, LatentAttention)), None)
    states = (m.d_state if isinstance(m, (Mamba1, Mamba2)) else m.key_dim for m in mixers if isinstance(m, (Mamba1, Mamba2, GatedDeltaNet)))
    return ModelFacts(
        id=checkpoint.id,
        commit=checkpoint.commit,
        source=checkpoint.source,
        architecture=a.class_name,
        model_type=a.model_type,
        parameters=model.parameters,
        active_parameters=model.parameters - (a.parameters - a.active_parameters),
        trainable_parameters=0,
        parameters_from=model.parameters_from,
        dtype=a.dtype,
        layers=len(a.text.layers),
        hidden_size=a.hidden_size,
        attention_heads=attention.heads if attention else latent.heads if latent else None,
        kv_heads=attention.kv_heads if attention else latent.heads if latent else None,
        head_dim=attention.head_dim if attention else latent.qk_nope_head_dim + latent.qk_rope_head_dim if latent else None,
        experts=moe.experts if moe else None,
        experts_per_token=moe.top_k if moe else None,
        state_size=next(states, None),
        layer_kinds=a.layer_kinds,
    )


def _guide_items(model: Model, request: Request) -> tuple[guide.Item, ...]:
    facts = _facts(model)
    mamba = next((m for layer in model.architecture.text.layers for m in layer.mixers if isinstance(m, (Mamba1, Mamba2))), None)
    return guide.inference_items(
        model.parameters,
        batch=request.batch,
        ctx=request.ctx or 1,
        layers=facts.layers,
        heads=facts.attention_heads if request.phase != "encode" else None,
        head_dim=facts.head_dim,
        d_state=facts.state_size,
        d_inner=mamba.d_inner if mamba else None,
    )
