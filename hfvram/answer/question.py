"""The road from a name and a request to an `Estimate`."""

from dataclasses import replace
from importlib.util import find_spec

from hfvram import __version__
from hfvram.answer import caches, guide, llama_cpp, llama_options, paged, pipeline, placing, serving, serving_options
from hfvram.answer.estimate import Estimate, Fit, Interval, Rank, Recommended
from hfvram.answer.facts import facts, guide_items
from hfvram.answer.fit import judge
from hfvram.answer.gpus import Gpu, find_gpu
from hfvram.answer.interval import interval
from hfvram.answer.items import derived
from hfvram.answer.peak import AtPeak, at_peak
from hfvram.answer.recommending import recommended
from hfvram.answer.resolve import resolve
from hfvram.answer.supported import by_code, check, simulated_by_default
from hfvram.errors import HfvramError
from hfvram.memory.allocator import replay
from hfvram.memory.device import device_bytes, kernels_bytes
from hfvram.memory.formula import Share, mask_bytes
from hfvram.memory.mesh import mesh_of
from hfvram.model.bound import bound, by_its_code, can_run
from hfvram.model.gguf import identify_gguf
from hfvram.model.identify import Model, identify, identify_components, needs_headers
from hfvram.model.infer import infer
from hfvram.model.layers import Mamba1, Mamba2
from hfvram.model.mtp import mtp
from hfvram.read import cache
from hfvram.read.checkpoint import Checkpoint
from hfvram.read.open import read_all_headers, read_checkpoint
from hfvram.request import Request
from hfvram.units import gib

MODELLED = {"transformers": "5.17", "torch": "2.11"}
"""The versions whose code the formulas follow, and with which they were measured."""


INEXACT = "by formula: with pip install 'hfvram[exact]' the model's own code says it exactly"


MTP = "mtp"
"""`--draft` of a model's own heads."""


class Session:
    """Answers questions, and reads each model once; with `local=False` none that lies on this machine."""

    def __init__(self, *, local: bool = True) -> None:
        self._local = local
        self._models: dict[tuple[object, ...], Model | HfvramError] = {}

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
        asked = request.method
        request, notes, without = settled(request)
        if request.engine == "transformers" and llama_options.means_llama(model, request):
            request, without = request.with_(engine=llama_options.ENGINE, method=asked), False
            notes.append(llama_options.SAID_OF_FILES if model.endswith(".gguf") else llama_options.SAID_OF_OPTIONS)
        serving_options.check(request)
        if request.engine not in serving_options.ENGINES:
            check(request)
        known = self._read(model, request, revision, token, offline, file)
        if known.checkpoint.gguf is not None and request.engine != llama_options.ENGINE:
            if request.engine != "transformers":
                raise HfvramError("usage", f"{known.checkpoint.id} is a GGUF file: valid is --engine llama.cpp")
            request, without = request.with_(engine=llama_options.ENGINE, method=asked), False
            notes.append(llama_options.SAID_OF_FILES)
            serving_options.check(request)
        if request.draft:
            known = replace(known, draft=self._draft(known, request, token, offline))
        found = answer(known, request)
        if notes:
            found = replace(found, warnings=(*found.warnings, *notes))
        return replace(found, warnings=(*found.warnings, INEXACT)) if without else found

    def model(
        self,
        name: str,
        request: Request,
        *,
        revision: str | None = None,
        token: str | None = None,
        offline: bool = False,
        file: str | None = None,
    ) -> Model:
        """The model that `estimate` of these answers about, read once for both."""
        return self._read(name, settled(request)[0], revision, token, offline, file)

    def _draft(self, model: Model, request: Request, token: str | None, offline: bool) -> Model:
        """What speculates: another model, or the model's own heads for multi-token prediction."""
        if request.draft != MTP:
            return self._read(request.draft or "", request, None, token, offline, None)
        return replace(model, architecture=mtp(model.architecture, model.checkpoint.config))

    def _read(
        self, model: str, request: Request, revision: str | None, token: str | None, offline: bool, file: str | None
    ) -> Model:
        """A model that is read once, or fails once."""
        allowed = (request.allow_unknown, request.trust_remote_code, request.method)
        key = (model, revision, token, offline, file, *allowed)
        if key not in self._models:
            try:
                checkpoint = read_checkpoint(
                    model, revision=revision, token=token, offline=offline, file=file, local=self._local
                )
                self._models[key] = understand_or_forget(checkpoint, request, token, offline)
            except HfvramError as error:
                self._models[key] = error
        known = self._models[key]
        if isinstance(known, HfvramError):
            raise known
        return known


def settled(request: Request) -> tuple[Request, list[str], bool]:
    """A request with its engine's line read and its method chosen, what that says, and whether the models' own code
    would answer it but isn't installed."""
    request, notes = serving_options.from_line(request)
    without = False
    if request.method == "auto" and simulated_by_default(request):
        needed = ("torch", "transformers", *(("peft",) if request.mode in ("lora", "qlora") else ()))
        without = request.mode != "inference" and not all(map(find_spec, needed))
        request = request.with_(method="formula" if without else "simulate")
    return request, notes, without


def understand_or_forget(checkpoint: Checkpoint, request: Request, token: str | None, offline: bool) -> Model:
    """`understand`, after which nothing stays in the cache of what can't be understood."""
    try:
        return understand(checkpoint, request, token, offline)
    except HfvramError as error:
        if checkpoint.commit and error.kind in ("bad_config", "bad_header", "unknown_architecture"):
            cache.forget(checkpoint.id)
        raise


def understand(checkpoint: Checkpoint, request: Request, token: str | None = None, offline: bool = False) -> Model:
    """The model of a checkpoint; what is unknown about it is bounded where the request allows that."""
    if checkpoint.components:
        return identify_components(checkpoint)
    if checkpoint.gguf is not None:
        return identify_gguf(checkpoint)
    try:
        architecture = infer(checkpoint.config, generation=checkpoint.generation_config)
    except HfvramError as error:
        if error.kind != "unknown_architecture":
            raise
        bounded = request.allow_unknown or request.trust_remote_code
        if request.method == "simulate" or (request.method == "auto" and not bounded and can_run(checkpoint.config)):
            return identify(checkpoint, by_its_code(checkpoint, error))
        if not bounded:
            raise
        checkpoint = read_all_headers(checkpoint, token=token, offline=offline)
        return identify(checkpoint, bound(checkpoint, error, request.trust_remote_code))
    if needs_headers(checkpoint, architecture):
        checkpoint = read_all_headers(checkpoint, token=token, offline=offline)
    return identify(checkpoint, architecture)


def answer(model: Model, asked: Request) -> Estimate:
    """The estimate of a model that was read already, with the verdict where a GPU is named."""
    gpu, note = find_gpu(asked.gpu) if asked.gpu else (None, None)
    served = asked.engine in serving_options.ENGINES or paged.is_paged(asked)
    capability = asked.compute_capability
    if gpu and not asked.compute_capability and not served:
        asked = asked.with_(compute_capability=gpu.capability)
    if asked.engine == llama_options.ENGINE:
        found = llama_cpp.estimate(model, asked, gpu)
    else:
        found = serving.estimate(model, asked, gpu) if served else estimate_of(model, asked)
    notes: list[str] = []
    if asked.recommend and not served:
        found = replace(found, recommended=_recommended(model, found, capability))
    if gpu:
        notes += [note] if note else []
    if gpu and not served:
        fit, said = verdict(model, found, gpu)
        found, notes = replace(found, fit=fit), notes + said
    return replace(found, warnings=(*found.warnings, *notes, *_assumptions(model, found)))


def _recommended(model: Model, found: Estimate, capability: str | None) -> tuple[Recommended, ...]:
    """The smallest GPUs, and how many, by formula wherever there is one; `capability` is what was asked for itself."""
    request, needed = found.request.with_(compute_capability=capability), found.device_bytes
    if placing.is_placed(request):  # on others it would be placed otherwise: what a single one takes decides
        request = request.with_(gpus=None, gpu=None)
        needed = taken(model, request)
    formed = formula_of(model, request)
    if formed is None and not model.components:
        only = request.with_(compute_capability=capability or "9.0")  # each further run would take seconds
        return recommended(_unanswered, only, needed)
    return recommended(lambda r: taken(model, r), formed or request, needed)


def _unanswered(request: Request) -> int:
    raise HfvramError("usage", "only the models' own code answers it")


def verdict(model: Model, found: Estimate, gpu: Gpu) -> tuple[Fit, list[str]]:
    """Whether an estimate fits, the limits, and ways; of several GPUs for the fullest.

    Limits and ways are searched by formula wherever there is one: the models' own code takes seconds for each.
    """
    request, notes = found.request, []
    if by_code(request) and (formed := formula_of(model, request)):
        request, notes = formed, ["limits and ways to make it fit are searched by formula"]
    known = {} if placing.is_placed(request) else {request: found.device_bytes}
    needed = (lambda m, r: estimate_of(m, r).device_bytes) if by_code(request) else taken
    fit = judge(
        lambda r: known[r] if r in known else needed(model, r),
        request,
        gpu,
        max_positions=model.architecture.max_positions,
    )
    return fit, notes


def formula_of(model: Model, request: Request) -> Request | None:
    """The request as a formula answers it; None where only the model's own code does."""
    if model.components or not model.architecture.closed_form or request.method == "guide":
        return None
    formed = request.with_(method="formula")
    try:
        check(formed)
        taken(model, formed)
    except HfvramError:
        return None
    return formed


def estimate_of(model: Model, asked: Request) -> Estimate:
    """What a request takes, without a verdict."""
    if model.components:
        if placing.is_placed(asked):
            raise HfvramError(
                "usage", f"--gpus {asked.gpus}: a pipeline's components can't be placed, valid is --gpus 1"
            )
        alone = asked.with_(phase=None, gpu=None, max_ctx=False, max_batch=False)
        parts = tuple((name, estimate_of(part, alone)) for name, part in model.components)
        return pipeline.total(model.checkpoint.id, parts, model.warnings)
    moved = asked.cache in caches.MOVED and not caches.has_formula(model.architecture)
    if asked.method == "auto" and (moved or not model.architecture.closed_form):
        asked = asked.with_(method="simulate")  # no formula knows it
    request, notes = resolve(model.architecture, asked)
    if request.method == "guide":
        return _ruled(model, request, notes)
    if request.method == "simulate":
        from hfvram.answer.simulated import simulated, versions

        found = simulated(model, request)
        stands = derived(found.items) if request.compute_capability else found.items
        return replace(_estimate(model, request, found, notes), method="simulate", versions=versions(), items=stands)
    return _by_formula(model, request, notes)


def _by_formula(model: Model, request: Request, notes: list[str]) -> Estimate:
    """The fullest GPU's estimate, and a row for each kind of GPU where there are several."""
    kinds = [
        (share, _estimate(model, request, at_peak(share.timeline, request.expandable_segments), notes))
        for share in placing.shares_of(model, request)
    ]
    if mesh_of(request).model > 1 or placing.is_placed(request):  # nothing of that kind was measured
        kinds = [(share, replace(found, items=derived(found.items))) for share, found in kinds]
    fullest = max((found for _, found in kinds), key=lambda found: found.device_bytes)
    where = placing.placements(model, request)
    notes = [*notes, *placing.notes(request, where, fullest)]
    if (request.gpus or 1) == 1:
        return fullest
    warnings = (*model.warnings, *notes)
    ranks = tuple(_rank(share, found) for share, found in kinds)
    return replace(fullest, ranks=ranks, placement=where, warnings=warnings)


def _rank(share: Share, found: Estimate) -> Rank:
    sums = ("weights", "cache", "gradients", "optimizer", "activations", "peak_allocated", "peak_reserved", "device")
    return Rank(name=share.name, gpus=share.gpus, **{f"{n}_bytes": getattr(found, f"{n}_bytes") for n in sums})


def _ruled(model: Model, request: Request, notes: list[str]) -> Estimate:
    """The rule of thumb as an answer: it knows nothing of the allocator or the device."""
    ruled = guide_items(model, request)
    total = sum(i.bytes for i in ruled)
    cache = sum(i.bytes for i in ruled if i.category == "cache")
    found = AtPeak(items=ruled, allocated_bytes=total, reserved_bytes=total, cache_bytes=cache)
    interval = Interval(low_bytes=total, high_bytes=total, basis="a rule of thumb has no error of its own")
    return replace(_estimate(model, request, found, notes), method="guide", device_bytes=total, interval=interval)


def taken(model: Model, asked: Request) -> int:
    """Device bytes alone, for searches: the same road without the items, by formula even for `simulate`."""
    if model.components or asked.method == "guide":
        return estimate_of(model, asked).device_bytes
    request, _ = resolve(model.architecture, asked)
    shares = placing.shares_of(model, request)
    timelines = [share.timeline for share in shares]
    held = max(replay(t, request.expandable_segments).reserved_bytes + t.managed_bytes for t in timelines)
    total = device_bytes(held, kernels_bytes(request.mode, request.fsdp is not None))
    return placing.bytes_to_fit(shares, request, total)


def _estimate(model: Model, request: Request, found: AtPeak, notes: list[str]) -> Estimate:
    """An estimate by formula, whose items are the whole of it."""
    kernels = kernels_bytes(request.mode, request.fsdp is not None)
    device = device_bytes(found.reserved_bytes + found.managed_bytes, kernels)
    return Estimate(
        model=replace(facts(model), trainable_parameters=found.trainable_parameters),
        request=request,
        method="formula",
        versions={"hfvram": __version__, **MODELLED},
        items=found.items,
        peak_phase=found.phase,
        weights_bytes=sum(i.bytes for i in found.items if i.category == "weights"),
        cache_bytes=found.cache_bytes,
        gradients_bytes=found.gradients_bytes,
        optimizer_bytes=found.optimizer_bytes,
        activations_bytes=sum(i.bytes for i in found.items if i.category == "activations"),
        peak_allocated_bytes=found.allocated_bytes,
        peak_reserved_bytes=found.reserved_bytes,
        device_bytes=device,
        cpu_bytes=sum(x.bytes for x in found.offloaded if x.place == "cpu"),
        nvme_bytes=sum(x.bytes for x in found.offloaded if x.place == "nvme"),
        disk_bytes=sum(x.bytes for x in found.offloaded if x.place == "disk"),
        offloaded=found.offloaded,
        interval=interval(model.architecture, request, device),
        guide=guide.rule(guide_items(model, request)),
        warnings=(*model.warnings, *notes),
        largest_tensors=found.largest_tensors,
        phases=found.phases,
    )


def _fullest_bytes(model: Model, request: Request) -> int:
    return max(share.timeline.fullest_bytes() for share in placing.shares_of(model, request))


def _assumptions(model: Model, found: Estimate) -> list[str]:
    """What the same request takes where an assumption that people can't see does not hold."""
    request = found.request
    if found.serving or model.components or request.method == "guide" or not model.architecture.closed_form:
        return []
    inference, simulated = request.mode == "inference", request.method == "simulate"

    def added(**changes: str | bool) -> int:
        """Live bytes at the peak that the changed request has more by formula, without the allocator's part."""
        other = _fullest_bytes(model, request.with_(**changes))
        if simulated:
            return other - _fullest_bytes(model, request)
        return other - sum(i.bytes for i in found.items if i.category != "rounding")

    said = []
    if request.batch > 1 and not request.padding and (more := mask_bytes(model.architecture, request)):
        words = f"up to {gib(more)}"
        if inference and simulated:
            more = max(added(padding=True), 0)
            words = f"about {gib(more)}"
        if more:
            said.append(f"sequences of unequal length would add {words} for their padding mask (--padding)")
    mixers = [m for layer in model.architecture.text.layers for m in layer.mixers]
    if inference and any(isinstance(m, (Mamba1, Mamba2)) for m in mixers):
        other, words = ("fallback", "without") if request.kernels == "fused" else ("fused", "with")
        total = gib(found.device_bytes + added(kernels=other))
        said.append(f"{words} the mamba-ssm and causal-conv1d kernels it takes about {total} (--kernels {other})")
    return said
