"""A model placed over several GPUs, CPU memory and disk by a device map: what stands and what runs on each GPU.

Each layer runs where its weights are, and hidden states are copied from GPU to GPU; what is in CPU memory or on disk
runs on the first GPU that holds anything, a module at a time (`offload.py`). Its buffers stay there. Each GPU keeps the
cache of the layers that it runs. Counted on each are rotary angles and masks, which accelerate copies for every layer.
Left out: what NCCL or peer access take, and the rest of a split layer: it runs where most of it stands.

Source: accelerate 1.15, big_modeling.py `dispatch_model`; transformers 5.17, integrations/accelerate.py.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from hfvram.errors import HfvramError
from hfvram.memory.forward import Forward, Stage
from hfvram.memory.offload import HOOKS
from hfvram.memory.timeline import Elsewhere, Standing, Tag
from hfvram.memory.weights import tensors
from hfvram.model.architecture import Architecture
from hfvram.model.layers import Layer, Param
from hfvram.request import Request

Device = int | Elsewhere
DeviceMap = Mapping[str, Device]
"""Modules (or parameters) by their path, `""` for the whole model, as transformers has it in `hf_device_map`."""
PLACED = Tag("modules", "weights", "P·e", HOOKS, "exact")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One GPU: what stands on it, and the layers that it runs."""

    gpu: int
    standing: Standing
    runs: Architecture | None
    stage: Stage
    away: frozenset[int]
    elsewhere: tuple[tuple[Elsewhere, Tag, int], ...]
    """What the process keeps outside of all GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A device, the modules that landed there in words, and their weights."""

    device: Device
    modules: str
    weights_bytes: int


def check(architecture: Architecture, request: Request) -> None:
    """Raises `usage` for what can't be placed."""
    what = None
    if architecture.task == "seq2seq":
        what = f"{architecture.class_name}, an encoder with a decoder,"
    elif architecture.adapter:
        what = "a model with an adapter"
    elif architecture.stored_sizes and request.quant in ("auto", architecture.quantization):
        what = f"the {architecture.quantization} checkpoint, of which only sizes are known,"
    if what:
        raise HfvramError("usage", f"--gpus {request.gpus}: {what} can't be placed by this version, valid is --gpus 1")
    if "experts" in request.offload:
        raise HfvramError("usage", f"--offload experts with --gpus {request.gpus}: valid is --offload layers")


def device_of(name: str, device_map: DeviceMap) -> Device:
    """Where a parameter or module stands. Raises `usage` where the map does not say.

    >>> device_of("model.layers.1.mlp.up_proj.weight", {"model.layers.1": 0, "model.layers.10": 1})
    0
    """
    path = name
    while path and path not in device_map:
        path = path.rpartition(".")[0]
    if path not in device_map:
        raise HfvramError("usage", f"the model's own code has no {name}, so that it can't be placed: valid is --gpus 1")
    return device_map[path]


def places(
    architecture: Architecture, device_map: DeviceMap, gpus: int, dtype: str, quant: str, double: bool
) -> tuple[Place, ...]:
    """Every GPU, and CPU and disk where something landed there; the weights add up to the model's."""
    weights: dict[Device, int] = dict.fromkeys(range(gpus), 0)
    pieces: dict[Device, list[tuple[str, int | None]]] = {}
    for param, sizes in tensors(architecture, dtype, quant, double):
        if param.kind != "buffer":
            device = device_of(param.name, device_map)
            weights[device] = weights.get(device, 0) + sum(nbytes for nbytes, _ in sizes)
            pieces.setdefault(device, []).append(_piece(architecture, param.name))
    head = _head(architecture, device_map)
    if architecture.tied_head and head in pieces:
        pieces[head].append(("head (tied)", None))
    order = sorted(weights, key=lambda d: d if isinstance(d, int) else gpus + ("cpu", "disk").index(d))
    return tuple(Place(device=d, modules=_words(pieces.get(d, ())), weights_bytes=weights[d]) for d in order)


def _piece(architecture: Architecture, name: str) -> tuple[str, int | None]:
    """What a parameter belongs to: a stack's layer, or a module beside the layers."""
    main = architecture.text.prefix
    for stack in architecture.stacks:
        if stack.prefix and name.startswith(f"{stack.prefix}."):
            index = name[len(stack.prefix) + 1 :].partition(".")[0]
            if index.isdigit():
                return "layers" if stack.prefix == main else _below(stack.prefix, main), int(index)
    return _below(name, main).split(".")[0], None


def _below(name: str, main: str) -> str:
    """A path without the parents that it shares with the main stack's layers.

    >>> _below("model.language_model.norm.weight", "model.language_model.layers")
    'norm.weight'
    """
    parts, shared = name.split("."), main.split(".")
    while len(parts) > 1 and shared and parts[0] == shared[0]:
        parts, shared = parts[1:], shared[1:]
    return ".".join(parts)


def _words(pieces: Iterable[tuple[str, int | None]]) -> str:
    """Modules in a few words.

    >>> _words([("embed_tokens", None), ("layers", 0), ("layers", 1), ("layers", 3), ("norm", None)])
    'embed_tokens, layers 0–1, 3, norm'
    """
    told: list[tuple[str, list[list[int]]]] = []
    for label, index in dict.fromkeys(pieces):
        if not told or told[-1][0] != label:
            told.append((label, []))
        if index is not None:
            runs = told[-1][1]
            if runs and runs[-1][1] == index - 1:
                runs[-1][1] = index
            else:
                runs.append([index, index])
    words = []
    for label, runs in told:
        only = label == "layers" and len(runs) == 1 and runs[0][0] == runs[0][1]
        numbers = ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)
        words.append(f"{'layer' if only else label} {numbers}".rstrip())
    return ", ".join(words) or "nothing"


def parts(architecture: Architecture, device_map: DeviceMap, gpus: int, f: Forward) -> tuple[Part, ...]:
    """What every GPU holds and runs."""
    main = min((d for d in device_map.values() if isinstance(d, int)), default=0)
    standing: dict[int, list[tuple[int, Tag]]] = {g: [] for g in range(gpus)}
    away: dict[Elsewhere, int] = {}
    owned: dict[str, tuple[Device, int]] = {}
    for param, sizes in tensors(architecture, f.dtype, f.quant, f.double_quant):
        device = device_of(param.name, device_map)
        total = sum(nbytes for nbytes, _ in sizes)
        owned[param.name] = device, total
        if isinstance(device, int) or param.kind == "buffer":
            standing[device if isinstance(device, int) else main] += sizes
        else:
            away[device] = away.get(device, 0) + total
    elsewhere = tuple((place, PLACED, nbytes) for place, nbytes in away.items())
    where = _layers(architecture, owned)
    embedding = next((p for p in architecture.text.before if p.kind == "embedding"), None)
    embedded_at = owned[embedding.name][0] if embedding else main
    tables_away = max(_tables_away(architecture, owned).values(), default=0)
    head_at = _head(architecture, device_map)
    head_bytes = sum(owned[p.name][1] for p in _head_params(architecture))
    norms = [owned[p.name][0] for p in architecture.text.after if p.kind == "norm"]
    norm_at = norms[-1] if norms else where[-1] if where else main
    copies: dict[int, Layer] = {}
    found = []
    for gpu in range(gpus):

        def here(device: Device, gpu: int = gpu) -> bool:
            return device == gpu or (gpu == main and not isinstance(device, int))

        layers, brought = [], set()
        for layer, device in zip(architecture.text.layers, where, strict=True):
            if here(device) and not isinstance(device, int):
                layer = copies.setdefault(id(layer), replace(layer))
                brought.add(id(layer))
            if here(device):
                layers.append(layer)
        starts, heads, ends = here(embedded_at), here(head_at), here(norm_at)
        stage = Stage(
            first=gpu == main,
            receives=not starts,
            ends=ends,
            generates=architecture.generates,
            tables_away_bytes=tables_away if gpu == main else 0,
            head_away_bytes=0 if isinstance(head_at, int) else head_bytes,
        )
        text = replace(
            architecture.text,
            layers=tuple(layers),
            repeated=frozenset(),
            after=architecture.text.after if heads else (),
        )
        runs = replace(
            architecture,
            stacks=tuple(text if s.name == architecture.main else s for s in architecture.stacks),
            head=architecture.head if heads else (),
            tied_head=architecture.tied_head and heads,
            final_norm=architecture.final_norm if ends else None,
        )
        busy = bool(layers) or starts or heads or ends or gpu == main
        found.append(
            Part(
                gpu=gpu,
                standing=Standing(tuple(standing[gpu])),
                runs=runs if busy else None,
                stage=stage,
                away=frozenset(brought),
                elsewhere=elsewhere,
            )
        )
    return tuple(found)


def _tables_away(architecture: Architecture, owned: Mapping[str, tuple[Device, int]]) -> dict[str, int]:
    """Modules beside the main stack's layers, but for head and norms, that are not on a GPU; by path, in bytes."""
    modules: dict[str, int] = {}
    for param in (*architecture.text.before, *architecture.text.after):
        device, nbytes = owned[param.name]
        if not isinstance(device, int) and param.kind not in ("buffer", "head", "norm"):
            path = param.name.rpartition(".")[0]
            modules[path] = modules.get(path, 0) + nbytes
    return modules


def _layers(architecture: Architecture, owned: Mapping[str, tuple[Device, int]]) -> list[Device]:
    """Where each layer of the main stack runs: where most of its weights are. One without weights of its own runs where
    the one before it does."""
    by_layer: list[dict[Device, int]] = [{} for _ in architecture.text.layers]
    prefix = f"{architecture.text.prefix}."
    for name, (device, nbytes) in owned.items():
        index = name[len(prefix) :].partition(".")[0] if name.startswith(prefix) else ""
        if index.isdigit():
            sums = by_layer[int(index)]
            sums[device] = sums.get(device, 0) + nbytes
    where: list[Device] = []
    for sums in by_layer:
        where.append(max(sums, key=lambda d: sums[d]) if sums else where[-1] if where else 0)
    return where


def _head_params(architecture: Architecture) -> list[Param]:
    """The head's weights: the embedding's where it is tied."""
    if architecture.tied_head:
        return [p for p in architecture.text.before if p.kind == "embedding"][:1]
    return [p for p in (*architecture.head, *architecture.text.after) if p.kind == "head"] or [*architecture.head]


def _head(architecture: Architecture, device_map: DeviceMap) -> Device:
    """Where logits are made: tied, accelerate keeps the head beside its embedding."""
    params = _head_params(architecture)
    return (
        device_of(params[0].name, device_map)
        if params
        else min((d for d in device_map.values() if isinstance(d, int)), default=0)
    )
