"""Inference with layers or experts in CPU memory: what stays on the GPU, and what comes to it for the moment it runs.

Layers come one module at a time, as accelerate's hooks bring them (accelerate 1.15, hooks.py `AlignDevicesHook` on each
module that owns parameters): counted is the largest module of a layer, for as long as the layer runs. Of experts,
`resident_experts` of each layer stay on the GPU; those that a pass needs beside them come for the time of their layer,
b·s·k at most, all of a layer's where the prompt is long. Nothing is fetched ahead, nothing stays for the next token.
"""

from collections.abc import Iterator

from hfvram.errors import HfvramError
from hfvram.memory.forward import Forward
from hfvram.memory.timeline import Standing, Tag, Timeline
from hfvram.memory.weights import param_bytes, scheme_of, tensors
from hfvram.model.architecture import Architecture
from hfvram.model.layers import Layer, MixtureOfExperts, Param
from hfvram.model.packing import is_known
from hfvram.request import Request

HOOKS = "accelerate 1.15: hooks.py AlignDevicesHook"
LAYERS = Tag("layers", "weights", "P·e", HOOKS, "exact")
EXPERTS = Tag("experts", "weights", "P·e", "experts that are not resident", "exact")
BROUGHT_LAYER = Tag("weights brought from CPU memory", "workspace", "", HOOKS)
BROUGHT_EXPERTS = Tag(
    "experts brought from CPU memory", "workspace", "", "all that one layer needs: min(E − resident, b·s·k) experts"
)


def check(architecture: Architecture, request: Request) -> None:
    """Raises `usage` for what can't be offloaded so."""
    moe = architecture.moe
    if "experts" in request.offload and moe is None:
        raise HfvramError("usage", f"--offload experts: {architecture.class_name} has none, valid is layers")
    if {"experts", "layers"} <= set(request.offload):
        raise HfvramError("usage", "--offload experts,layers: layers hold their experts, valid is one of them")
    if request.resident_experts and ("experts" not in request.offload or moe is None):
        raise HfvramError("usage", "--resident-experts goes with --offload experts")
    if moe and request.resident_experts >= moe.experts:
        valid = f"valid are 0 to {moe.experts - 1}"
        raise HfvramError("usage", f"--resident-experts {request.resident_experts} of {moe.experts}: {valid}")
    own = request.quant in ("auto", architecture.quantization)
    if architecture.stored_sizes and own and not is_known(scheme_of(architecture, architecture.quantization or "none")):
        raise HfvramError("usage", f"--offload: of the {architecture.quantization} checkpoint only sizes are known")


def divide(architecture: Architecture, request: Request, dtype: str, quant: str) -> tuple[Standing, int, Tag]:
    """What stands on the GPU; the bytes that stand in CPU memory, and what they are."""
    layers = "layers" in request.offload
    prefix, moe = f"{architecture.text.prefix}.", architecture.moe
    stays: list[tuple[int, Tag]] = []
    away = 0
    for param, sizes in tensors(architecture, dtype, quant, request.double_quant):
        inside = param.name.startswith(prefix) and param.kind != "buffer"
        if not inside or not (layers or param.kind == "experts"):
            stays += sizes
            continue
        for nbytes, tag in sizes:
            resident = 0 if layers or moe is None else nbytes * request.resident_experts // moe.experts
            stays.append((resident, tag))
            away += nbytes - resident
    return Standing(tuple(x for x in stays if x[0])), away, LAYERS if layers else EXPERTS


def brought_layer(t: Timeline, f: Forward, layer: Layer) -> Iterator[int]:
    """The largest module of an offloaded layer, while the layer runs."""
    if id(layer) not in f.away:
        return
    modules: dict[str, int] = {}
    for param in layer.all_params():
        if param.kind != "buffer":
            owner = param.name.rpartition(".")[0]
            modules[owner] = modules.get(owner, 0) + _bytes(param, f)
    yield t.alloc(max(modules.values(), default=0), BROUGHT_LAYER)


def brought_experts(t: Timeline, f: Forward, part: MixtureOfExperts) -> Iterator[int]:
    """The experts of a layer that a pass needs beside the resident ones, while they run."""
    if f.resident_experts is None:
        return
    needed = min(part.experts - f.resident_experts, f.rows * part.top_k)
    each = sum(_bytes(p, f) for p in part.params if p.kind == "experts") // part.experts
    yield t.alloc(needed * each, BROUGHT_EXPERTS)


def _bytes(param: Param, f: Forward) -> int:
    return sum(nbytes for nbytes, _ in param_bytes(param, f.dtype, f.quant, f.double_quant))
