"""`Estimate`: the answer, as data. Renderers show it and compute nothing."""

from dataclasses import dataclass
from typing import Any, Literal

from hfvram.memory.timeline import Category, Certainty, Elsewhere
from hfvram.request import Request

Method = Literal["formula", "simulate", "guide"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Headline facts of a model; a figure that does not apply is None."""

    id: str
    commit: str | None
    source: str
    architecture: str
    model_type: str
    parameters: int
    active_parameters: int
    trainable_parameters: int
    parameters_from: str
    dtype: str
    layers: int
    hidden_size: int
    attention_heads: int | None
    kv_heads: int | None
    head_dim: int | None
    experts: int | None
    experts_per_token: int | None
    state_size: int | None
    layer_kinds: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """Bytes that are live at the peak, under one name: a formula in words with its numbers, and where that is from."""

    name: str
    category: Category
    bytes: int
    formula: str
    source: str
    certainty: Certainty


@dataclass(frozen=True, slots=True, kw_only=True)
class Offloaded:
    """Bytes that one GPU's process keeps in CPU memory, on NVMe or on disk, under one name."""

    name: str
    category: Category
    place: Elsewhere
    bytes: int
    formula: str
    source: str
    certainty: Certainty


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """What each GPU of one kind takes, where several GPUs share the work: `gpus` of them are alike."""

    name: str
    gpus: int
    weights_bytes: int
    cache_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    device_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A device (`GPU 0`, `cpu`, `disk`) and the modules that `device_map="auto"` puts there, in words."""

    device: str
    modules: str
    weights_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveTensor:
    """A tensor that is live at the peak: the module or parameter that it is of, what it is, and what made it.

    `bytes` are one tensor's; `count` of them stand there that differ only in the numbers of their paths.
    """

    path: str
    what: str
    category: Category
    operator: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasePeak:
    """The most that is live at once in one phase of training, and the most activations: raw sizes, no rounding."""

    name: str
    live_bytes: int
    activations_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Where `device_bytes` probably lies: the errors of the measured cases most like this one, applied to it."""

    low_bytes: int
    high_bytes: int
    basis: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleOfThumb:
    """What people quote for it, so that its error can be seen."""

    bytes: int
    formula: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A change of the request with which it fits, and what it would then take on each GPU."""

    change: str
    device_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The verdict on one GPU; `max_ctx` and `max_batch` with all else as asked, 0 where not even 1 fits.

    A model that is placed over several GPUs fits where each GPU's peak does and none of its weights landed in CPU
    memory or on disk, unless `--offload layers` asks for that; else those that did are what is missing
    (`headroom_bytes`).
    """

    gpu: str
    capacity_bytes: int
    fits: bool
    headroom_bytes: int
    max_ctx: int | None
    max_batch: int | None
    ways: tuple[Way, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommended:
    """A GPU that runs the request, the smallest of its vendor and tier; where one is not enough, how many of them, and
    with which options."""

    gpu: str
    capacity_bytes: int
    gpus: int = 1
    options: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """A serving engine's pool for the cache on each GPU; None where no GPU is named, which decides it.

    `kv_tokens` is its size as the engine prints it, `kv_bytes_per_token` the pool over that, `max_concurrency` the
    requests of `ctx` tokens that it holds. Below: what the pool consists of, and the parts that it leaves room for.
    """

    kv_bytes_per_token: int
    kv_pool_bytes: int | None
    kv_tokens: int | None
    max_concurrency: float | None
    waste_bytes: int
    """Of `cache_bytes`: the rest of blocks in which there is no token."""
    blocks: int | None
    block_bytes: int
    sliding_bytes: int
    """Of a token in SGLang's pool for sliding layers."""
    state_bytes: int
    """Of the recurrent layers, a request; 0 where states are in the blocks."""
    state_slots: int | None
    loaded_bytes: int
    activation_bytes: int
    non_torch_bytes: int
    graph_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a request takes on one GPU. `items` stand at the peak and add up to `peak_allocated_bytes` exactly.

    Of several GPUs that is the fullest; `ranks` has each kind of them, where a formula answers for all.
    `offloaded` is what each GPU's process keeps elsewhere; it adds up to `cpu_bytes`, `nvme_bytes` and `disk_bytes`.
    `placement` is where the modules are of a model that is placed over GPUs, which one process drives.
    """

    model: ModelFacts
    request: Request
    method: Method
    versions: dict[str, str]
    items: tuple[Item, ...]
    peak_phase: str
    weights_bytes: int
    cache_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    device_bytes: int
    cpu_bytes: int = 0
    nvme_bytes: int = 0
    disk_bytes: int = 0
    offloaded: tuple[Offloaded, ...] = ()
    interval: Interval
    guide: RuleOfThumb
    serving: Serving | None = None
    fit: Fit | None = None
    recommended: tuple[Recommended, ...] = ()
    largest_tensors: tuple[LiveTensor, ...] = ()
    phases: tuple[PhasePeak, ...] = ()
    ranks: tuple[Rank, ...] = ()
    placement: tuple[Placement, ...] = ()
    components: tuple[tuple[str, "Estimate"], ...] = ()
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of the answer: whole bytes, the unit in the name."""
        out = _shallow(self)
        for name in ("model", "interval", "guide"):
            out[name] = _shallow(out[name])
        out["request"] = self.request.to_dict()
        out["items"] = [_shallow(item) for item in self.items]
        out["offloaded"] = [_shallow(item) for item in self.offloaded]
        out["largest_tensors"] = [_shallow(tensor) | {"shape": list(tensor.shape)} for tensor in self.largest_tensors]
        out["phases"] = [_shallow(phase) for phase in self.phases]
        out["ranks"] = [_shallow(rank) for rank in self.ranks]
        out["placement"] = [_shallow(place) for place in self.placement]
        out["serving"] = self.serving and _shallow(self.serving)
        out["fit"] = self.fit and {**_shallow(self.fit), "ways": [_shallow(way) for way in self.fit.ways]}
        out["recommended"] = [_shallow(r) for r in self.recommended]
        out["components"] = [{"name": n, **e.to_dict()} for n, e in self.components]
        out["warnings"] = list(self.warnings)
        out["error"] = None
        return out


def _shallow(value: Any) -> dict[str, Any]:
    """One slotted dataclass as a dict: eight times as fast as `dataclasses.asdict`, which `batch` would notice."""
    return {name: getattr(value, name) for name in value.__slots__}


def error_dict(kind: str, message: str) -> dict[str, Any]:
    """The JSON object of a failure."""
    return {"model": None, "request": None, "items": [], "warnings": [], "error": {"kind": kind, "message": message}}
