"""The formula engine: an architecture and a request → the timeline, in milliseconds and without torch."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

from hfvram.memory import context_parallel, expert_parallel, inference, pipeline_parallel, placement, seq2seq
from hfvram.memory.forward import ELEMENT_BYTES, Forward
from hfvram.memory.generation import generation
from hfvram.memory.mesh import mesh_of
from hfvram.memory.offload import divide
from hfvram.memory.placement import DeviceMap
from hfvram.memory.tensor_parallel import check_modes, check_sequence, part_of
from hfvram.memory.timeline import Timeline
from hfvram.memory.weights import computed, standing
from hfvram.model.architecture import Architecture
from hfvram.model.layers import Attention
from hfvram.request import Request


class Share(NamedTuple):
    """What each GPU of one kind holds and runs: all of them, or those of one stage."""

    name: str
    gpus: int
    timeline: Timeline


def shares(architecture: Architecture, request: Request) -> tuple[Share, ...]:
    """The GPUs of a request by what they hold: one share for each kind that differs. Raises `usage` as `timeline`."""
    mesh = mesh_of(request)
    if mesh.tp > 1:
        check_modes(architecture, request)
    if request.sp:
        check_sequence(request)
    if mesh.pp > 1:
        return tuple(_stages(architecture, request, mesh.gpus // mesh.pp))
    part = part_of(expert_parallel.part_of(architecture, mesh.ep), mesh.tp)
    if mesh.cp > 1:
        return tuple(_parts_of_sequence(architecture, part, request, mesh.gpus // mesh.cp))
    found = timeline(part, request)
    if mesh.model > 1 and request.mode == "train":
        found.trainable_parameters = architecture.parameters
    elif mesh.model > 1 and request.mode != "inference":
        found.trainable_parameters = adapters_parameters(architecture, request)
    return (Share("all", mesh.gpus, found),)


def adapters_parameters(architecture: Architecture, request: Request) -> int:
    """Of the whole model's adapters, of which each rank may have a part."""
    from hfvram.memory.training.adapters import Training

    return sum(param.numel for param in Training(architecture, request).params)


def _parts_of_sequence(architecture: Architecture, part: Architecture, request: Request, gpus: int) -> Iterator[Share]:
    """The ranks that share a sequence, those together that are alike; `gpus` of each."""
    from hfvram.memory.training import train

    context_parallel.check(architecture, request)
    for name, count, rank in context_parallel.kinds(request.cp):
        t = train.timeline(part, request, cp_rank=rank)
        if request.mode == "train":
            t.trainable_parameters = architecture.parameters
        yield Share(name, gpus * count, t)


def _stages(architecture: Architecture, request: Request, gpus: int) -> Iterator[Share]:
    """The stages of a pipeline, those together that are alike; `gpus` of each."""
    from hfvram.memory.training import train

    pipeline_parallel.check(architecture, request)
    parameters, architecture = architecture.parameters, part_of(architecture, request.tp)

    def alike(stage: pipeline_parallel.Stage) -> tuple[object, ...]:
        part = pipeline_parallel.rank_of(architecture, stage)
        return stage.in_flight, stage.first, stage.last, [id(x) for x in part.text.layers]

    made = []
    for _, alikes in groupby(pipeline_parallel.stages(request), alike):
        first, *more = alikes
        name = f"stages {first.index + 1} to {more[-1].index + 1}" if more else f"stage {first.index + 1}"
        t = train.timeline(architecture, request, stage=first)
        made.append((Share(f"{name} of {request.pp}", gpus * (1 + len(more)), t), 1 + len(more)))
    if request.mode != "train":  # adapters of all stages
        parameters = sum(share.timeline.trainable_parameters * count for share, count in made)
    for share, _ in made:
        share.timeline.trainable_parameters = parameters
        yield share


def mask_bytes(architecture: Architecture, request: Request) -> int:
    """The most that a padding mask adds with SDPA: b·s·s booleans, and in a layer the same as a bias (rows padded to a
    multiple of 8) and its keys and values repeated for every head. A prefill holds that of one layer at a time;
    training keeps that of each for its backward, unless it computes them again. `--padding` is exact.

    Source: transformers 5.17, integrations/sdpa_attention.py; measured (fixtures/measured, cases with padding).
    """
    part = architecture.attention
    training = request.mode != "inference"
    if part is None or request.attention != "sdpa" or not (training or request.phase == "generate"):
        return 0
    tokens = (request.ctx or 1) - (request.new_tokens or 0)
    e, square = ELEMENT_BYTES[request.dtype], request.batch * tokens
    heads = part.heads - part.kv_heads if training or part.heads == part.kv_heads else part.heads
    layer = square * -(-tokens // 8) * 8 * e + heads * (part.head_dim + part.value_dim) * square * e
    attending = [m for x in architecture.text.layers for m in x.mixers if isinstance(m, Attention)]
    return square * tokens + layer * (len(attending) if training and not request.gradient_checkpointing else 1)


def timeline(architecture: Architecture, request: Request) -> Timeline:
    """One request that leaves nothing open (`answer/resolve.py`). Raises `usage` for what has no formula."""
    if request.mode != "inference":
        from hfvram.memory.training import train

        return train.timeline(architecture, request)
    dtype = request.dtype
    quant = computed(architecture, request)
    if request.offload:
        stands, away, what = divide(architecture, request, dtype, quant)
        t = Timeline(stands)
        t.elsewhere.append(("cpu", what, away))
    else:
        t = Timeline(standing(architecture, dtype, quant, request.double_quant))
    _run(t, architecture, _forward(architecture, request, quant), request)
    return t


def placed(architecture: Architecture, request: Request, device_map: DeviceMap) -> tuple[Share, ...]:
    """The GPUs on which parts of a model were placed: each what stands there, and what runs there. Raises `usage`."""
    placement.check(architecture, request)
    quant = computed(architecture, request)
    f = _forward(architecture, request.with_(offload=()), quant)
    parts = placement.parts(architecture, device_map, request.gpus or 1, f)
    found = []
    for part in parts:
        t = Timeline(part.standing)
        t.elsewhere += part.elsewhere
        if part.runs:
            _run(t, part.runs, replace(f, stage=part.stage, away=part.away), request)
        found.append(Share(f"GPU {part.gpu}", 1, t))
    return tuple(found)


def _forward(architecture: Architecture, request: Request, quant: str) -> Forward:
    """The pass over the prompt."""
    ctx, new = request.ctx or 1, request.new_tokens or 0
    return Forward(
        batch=request.batch,
        tokens=ctx - new if request.phase == "generate" else ctx,
        dtype=request.dtype,
        attention=request.attention,
        kernels=request.kernels,
        masked=request.padding,
        mask_of_ones=request.phase == "generate",
        quant=quant,
        double_quant=request.double_quant,
        resident_experts=request.resident_experts if "experts" in request.offload else None,
        away=frozenset(map(id, architecture.text.layers)) if "layers" in request.offload else frozenset(),
        gpu=generation(request.compute_capability),
        cache=request.cache,
        cache_bits=8 if request.kv_dtype == "int8" else 4,
        static_length=ctx - 1 if request.cache == "static" and request.phase == "generate" else 0,
    )


def _run(t: Timeline, architecture: Architecture, f: Forward, request: Request) -> None:
    new = request.new_tokens or 0
    road = seq2seq if architecture.task == "seq2seq" else inference
    if request.phase == "encode":
        road.encode(t, architecture, f)
    elif request.phase == "prefill" or not new:
        keeps = request.phase == "prefill" or architecture.generates_cache
        road.prefill(t, architecture, replace(f, use_cache=keeps))
    else:
        road.generate(t, architecture, f, new)
