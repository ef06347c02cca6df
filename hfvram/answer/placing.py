"""Several GPUs of a named size without a way to split: the model is placed over them as `device_map="auto"` does."""

from hfvram.answer.estimate import Estimate, Placement
from hfvram.answer.gpus import find_gpu
from hfvram.memory import placement
from hfvram.memory.bitsandbytes import ON_LOADING
from hfvram.memory.device import CONTEXT_BYTES
from hfvram.memory.formula import Share, placed, shares
from hfvram.memory.mesh import mesh_of
from hfvram.memory.placement import DeviceMap
from hfvram.memory.weights import computed
from hfvram.model.identify import Model
from hfvram.request import Request
from hfvram.units import gib, parse_bytes


def is_placed(request: Request) -> bool:
    """Whether a request's GPUs hold one model's modules; else each holds the whole model, or a split's share."""
    several = request.mode == "inference" and (request.gpus or 1) > 1 and mesh_of(request).model == 1
    by_formula = request.engine == "transformers" and request.method in ("auto", "formula")
    return several and by_formula and request.gpu is not None


def device_map_of(model: Model, request: Request) -> DeviceMap | None:
    """The device map of a resolved request, None where nothing is placed. Free on a GPU is what its context leaves."""
    if not is_placed(request):
        return None
    placement.check(model.architecture, request)
    from hfvram.memory.exact.device_map import device_map

    free = max(find_gpu(request.gpu or "")[0].memory_bytes - CONTEXT_BYTES, 0)
    return device_map(
        model.architecture,
        model.checkpoint.config,
        request.dtype,
        _quant(model, request),
        request.double_quant,
        request.gpus or 1,
        free,
        parse_bytes(request.cpu_memory) if request.cpu_memory else None,
    )


def shares_of(model: Model, request: Request) -> tuple[Share, ...]:
    """`shares` of a resolved request, placed where that is asked."""
    found = device_map_of(model, request)
    return shares(model.architecture, request) if found is None else placed(model.architecture, request, found)


def placements(model: Model, request: Request) -> tuple[Placement, ...]:
    """Where the modules of a resolved request landed; nothing where it isn't placed."""
    found = device_map_of(model, request)
    if found is None:
        return ()
    quant = _quant(model, request)
    where = placement.places(model.architecture, found, request.gpus or 1, request.dtype, quant, request.double_quant)
    return tuple(
        Placement(
            device=f"GPU {x.device}" if isinstance(x.device, int) else x.device,
            modules=x.modules,
            weights_bytes=x.weights_bytes,
        )
        for x in where
    )


def bytes_to_fit(shares: tuple[Share, ...], request: Request, device_bytes: int) -> int:
    """What is held against a GPU's capacity: of a placed model whose weights landed outside of the GPUs, without anyone
    asking for that, the capacity and those weights."""
    if not is_placed(request) or not (away := sum(nbytes for _, _, nbytes in shares[0].timeline.elsewhere)):
        return device_bytes
    if "layers" in request.offload and request.quant not in ON_LOADING:
        return device_bytes
    return max(device_bytes, find_gpu(request.gpu or "")[0].memory_bytes + away)


def notes(request: Request, found: tuple[Placement, ...], fullest: Estimate) -> list[str]:
    """What is assumed of several GPUs, and what follows from where modules landed."""
    if not found:
        return []
    said = [
        f'placed as transformers\' device_map="auto" does on {request.gpus} empty GPUs: one works at a time; '
        "--tp splits every layer instead. Peaks of a placed model are not measured"
    ]
    away = [x for x in found if not x.device.startswith("GPU")]
    if not request.cpu_memory and away:
        said.append("CPU memory is taken to be enough (--cpu-memory SIZE: what is free of it)")
    if away and request.quant in ON_LOADING:
        said.append(f"transformers refuses {request.quant} where modules land on the CPU or the disk")
    elif away and "layers" not in request.offload:
        total = gib(sum(x.weights_bytes for x in away))
        said.append(
            f"{total} of weights come to the first GPU for every token; --offload layers says that this is meant"
        )
    if fullest.device_bytes > find_gpu(request.gpu or "")[0].memory_bytes:
        beside = gib(fullest.device_bytes - fullest.weights_bytes)
        said.append(
            f"the fullest GPU takes {beside} beside its weights: max_memory in from_pretrained can leave that free"
        )
    return said


def _quant(model: Model, request: Request) -> str:
    return computed(model.architecture, request)
