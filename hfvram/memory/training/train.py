"""Two training steps by formula: forward, backward, clipping and update, as a training loop runs them.

The loop is the exact engine's (`memory/exact/training.py`): the first step makes the optimizer's states, the second has
them from its start; of accumulated batches the second stands for all later ones.
"""

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from hfvram.errors import HfvramError
from hfvram.memory.bitsandbytes import ON_LOADING
from hfvram.memory.forward import Forward
from hfvram.memory.generation import generation
from hfvram.memory.inference import symbols
from hfvram.memory.mesh import mesh_of
from hfvram.memory.pipeline_parallel import Stage, chunks, rank_of, schedule, stage_of
from hfvram.memory.tensor_parallel import NO_PLAN
from hfvram.memory.timeline import Standing, Tag, Timeline
from hfvram.memory.training import decoder, encoder, seq2seq
from hfvram.memory.training import operators as op
from hfvram.memory.training.adapters import Training
from hfvram.memory.training.blocks import unknown
from hfvram.memory.training.classify import judges
from hfvram.memory.training.classify import labels as class_labels
from hfvram.memory.training.data_parallel import Units, units
from hfvram.memory.training.fsdp import replicas_and_shards
from hfvram.memory.training.kinds import ENCODED, kind_of
from hfvram.memory.training.optimizers import Optimizer
from hfvram.memory.training.states import States, single_stack, towers
from hfvram.memory.training.stretch import TEMPLATE, copies, plan, stretch
from hfvram.memory.training.tape import FLOWING, SCRATCH, Input, Tape
from hfvram.memory.training.tensors import Storage, Tensor, contiguous
from hfvram.memory.weights import sharded, standing
from hfvram.model.architecture import Architecture
from hfvram.model.layers import Attention, GatedDeltaNet, LatentAttention, Layer, Param
from hfvram.request import Request

PADDING = Tag("padding mask", "inputs", "b·s·8", "the batch", "exact")
STEPS = 2
ALONE: Final = Stage()
FORWARD: Final = {"causal": decoder.forward, "encoder": encoder.forward, "seq2seq": seq2seq.forward}
SCALE = Tag("loss scale", "activations", "4", "PyTorch 2.11: torch/amp/grad_scaler.py")
INPUTS = Tag("inputs of layers", "activations", "b·s·h·e", "PyTorch 2.11: autograd/graph.py save_on_cpu")
PIPELINE = "PyTorch 2.13: distributed/pipelining/stage.py"
RECEIVED = Tag("hidden states of the stage before", "activations", "b·s·h·e", PIPELINE)
RETURNED = Tag("gradients of the stage after", "activations", "b·s·h·e", PIPELINE)
TRAINER = "transformers 5.17: trainer.py _prepare_context_parallel_inputs"
PLACES = Tag("positions", "inputs", "b·s·8", TRAINER, "exact")
SHIFTED = Tag("shifted labels", "inputs", "b·s·8", TRAINER, "exact")
IDS = Tag("token ids", "inputs", "b·s·8", "the batch", "exact")


def timeline(
    architecture: Architecture,
    request: Request,
    on_meta: bool = False,
    whole: bool = False,
    stage: Stage = ALONE,
    cp_rank: int = 0,
) -> Timeline:
    """Training of one request that leaves nothing open (`answer/resolve.py`), on one GPU: of a pipeline, on one stage;
    of those that share a sequence, on the one of number `cp_rank`.

    `on_meta` follows PyTorch on the meta device where it differs from CUDA, `whole` writes every layer: for tests.
    Raises `usage` for kinds of layers and options that have no formula yet.
    """
    refuse(architecture, request)
    request = precision(request)
    model = architecture
    if stage.of > 1:
        architecture = rank_of(model, stage)
    training = Training(architecture, request)
    layers, groups = plan(training.layers, request.checkpoint_every)
    tower = architecture.stacks[0] if architecture.task == "seq2seq" else None
    beside, others = plan(tower.layers) if tower else (layers, groups)
    moe = architecture.moe
    shared_loss = bool(moe and moe.auxiliary)  # a loss of all layers' routers does not repeat with them
    if whole or stage.chunks > 1 or others != groups or shared_loss:
        layers, groups = [(x, None) for x in training.layers], 0
        beside = [(x, None) for x in tower.layers] if tower else layers
    t = Timeline(stands(architecture, request))
    parted = request.fsdp or request.zero == 3
    casts = training.stands(t, architecture) if training.adapted and not parted else []
    tape = Tape(t, generation(request.compute_capability), on_meta)
    tape.sp, tape.regathers = request.tp if request.sp else 1, architecture.model_type in NO_PLAN
    tape.ring = request.cp, cp_rank
    shape = request.batch, request.ctx or 1
    if stage.first or stage.last:
        ids = tape.new(shape, "int64", None, IDS)
    else:
        ids = Tensor(Storage(), shape, contiguous(shape), "int64")
    if request.cp > 1:  # what is shared keeps its storage
        places, labels = tape.new(shape, "int64", None, PLACES), tape.new(shape, "int64", None, SHIFTED)
        shape = shape[0], shape[1] // request.cp
        ids, *shared = [x.as_(shape, contiguous(shape)) for x in (ids, places, labels)]
        tape.given = shared[0], shared[1]
        del places, labels, shared
    hides = tape.new(ids.shape, "int64", None, PADDING) if request.padding else None
    judged = class_labels(tape, architecture, request.batch, request.dtype) if judges(architecture) else None
    first = States(architecture, beside, training.make, stack=tower) if tower else None
    states = States(architecture, layers, training.make, training.head, encoder=first)
    parts = units(tape, states, request, groups, architecture.hidden_size)
    tape.units = parts if type(parts) is not Units else None
    if training.adapted:
        training.adapt(tape, casts, held(request))
    t.restart()
    optimizer = Optimizer(request.optimizer, tape, parts.leaves)
    runs = _runs(model, architecture, states, layers, stage)
    _steps(tape, architecture, runs, ids, optimizer, parts, request, training, stage)
    del runs
    del hides, judged
    t.events = t.events[:]  # what dies with this function is no part of the run
    t.symbols = symbols(architecture, Forward(batch=request.batch, tokens=request.ctx or 1, dtype=request.dtype))
    tape.given = None
    parts.count(optimizer, groups)
    if stage.of > 1 and not training.adapted:
        t.trainable_parameters = model.parameters
    for tower in towers(architecture):  # asked for gradients, and given none
        kept = (p for p in tower.params() if p.kind != "buffer" and p.name not in training.frozen)
        t.trainable_parameters += sum(p.numel for p in kept)
    for segment, nbytes in tape.moved.values():
        t.elsewhere += [("cpu", INPUTS, nbytes)] * (copies(groups) if segment == TEMPLATE else 1)
    if groups:
        return stretch(t, tape.segments, groups) or timeline(model, request, on_meta, True, stage, cp_rank)
    return t


def precision(request: Request) -> Request:
    """DeepSpeed casts the whole model to the precision that it trains in: no autocast, and masters in fp32."""
    if not request.zero:
        return request
    dtype = request.dtype if request.mixed_precision == "no" else request.mixed_precision
    return request.with_(dtype=dtype, mixed_precision="no", adapter_dtype=dtype)


def held(request: Request) -> Callable[[Param], Param]:
    """What one GPU holds of a parameter."""
    if request.fsdp:
        _, shards = replicas_and_shards(request)
        return lambda param: sharded(param, shards)
    ranks = mesh_of(request).data
    return (lambda param: sharded(param, ranks, flat=True)) if request.zero == 3 else lambda param: param


def stands(architecture: Architecture, request: Request) -> Standing:
    """The weights that one GPU holds."""
    ranks = mesh_of(request).data
    flat = request.zero == 3
    if request.fsdp:
        _, ranks = replicas_and_shards(request)
    elif not flat:
        ranks = 1
    found = standing(architecture, request.dtype, "none", False, ranks, flat)
    if {"params", "params=nvme"} & set(request.offload):
        return Standing(tuple(x for x in found.tensors if x[1].category == "buffers"))
    return found


def refuse(architecture: Architecture, request: Request) -> None:
    """Raises `usage` for what has no formula yet."""
    if architecture.task == "seq2seq":
        _refuse_seq2seq(architecture, request)
    else:
        single_stack(architecture)
    if request.checkpoint_every > 1 and (len(architecture.stacks) > 1 or request.zero == 3 or request.pp > 1):
        why = f" of {architecture.class_name}" if len(architecture.stacks) > 1 else " with --zero 3 or --pp"
        raise unknown(f"--checkpoint-every {request.checkpoint_every}{why}")
    if towers(architecture) and request.mode != "train":
        raise unknown(f"--mode {request.mode} of {architecture.class_name}")
    if towers(architecture) and (request.fsdp or request.zero or mesh_of(request).gpus > 1):
        raise unknown(f"{architecture.class_name} over several GPUs")
    judged = judges(architecture)
    if architecture.task not in FORWARD or not (architecture.generates or judged) or architecture.adapter:
        raise unknown(architecture.class_name)
    if judged and (request.mode != "train" or mesh_of(request).gpus > 1 or request.fsdp or request.zero):
        raise unknown(f"adapters or several GPUs of {architecture.class_name}")
    encodes = kind_of(architecture).embedding in ENCODED
    masked = architecture.class_name.endswith("ForMaskedLM")
    if encodes != (architecture.task == "encoder") or (encodes and not masked and not judged):
        raise unknown(architecture.class_name)
    if encodes:
        _refuse_encoder(architecture, request)
    quant = architecture.quantization if request.quant == "auto" else request.quant
    if quant not in (None, "none") and not (request.mode != "train" and quant in ON_LOADING):
        raise unknown(f"--quant {quant}")
    mixers = [m for layer in architecture.text.layers for m in layer.mixers]
    apart = (isinstance(m, GatedDeltaNet) or (isinstance(m, Attention) and (m.sinks or m.output_gate)) for m in mixers)
    if request.tp * request.cp > 1 and any(apart):
        raise unknown(f"--tp or --cp of {architecture.class_name}")
    if architecture.task == "causal" and any(isinstance(m, Attention) and not m.causal for m in mixers):
        raise unknown(f"attention in both directions of {architecture.class_name}")
    _refuse_flash(architecture, request)
    trained = request.dtype if request.mode == "train" else request.adapter_dtype
    if request.mixed_precision == "fp16" and trained == "fp16":
        raise HfvramError("usage", "--mixed-precision fp16 can't train fp16 weights: valid are --dtype fp32 and bf16")
    if quant in ON_LOADING and (request.fsdp or request.zero == 3):
        raise unknown(f"--quant {quant} with parameters that are sharded")
    if request.mode != "train":
        _refuse_adapters(architecture, request)
    _refuse_parts(architecture, request)


def _refuse_parts(architecture: Architecture, request: Request) -> None:
    """Raises `usage` for parts that are frozen or trained whole where that was not held against the exact engine."""
    asked = {"--freeze": request.freeze, "--modules-to-save": request.modules_to_save, "--dora": request.dora}
    option = next((name for name, value in asked.items() if value), None)
    if option and (mesh_of(request).gpus > 1 or request.zero or request.fsdp or request.offload):
        raise unknown(f"{option} over several GPUs, sharded or offloaded,")
    mixers = (m for layer in architecture.text.layers for m in layer.mixers)
    if option and (architecture.task == "seq2seq" or not all(isinstance(m, Attention) for m in mixers)):
        raise unknown(f"{option} of {architecture.class_name}")


HELD: Final = ("granitemoe", "qwen2_moe")
"""Mixtures of experts that PEFT leaves alone, and whose other adapters were held against its code, with `all-linear`.
"""
WRAPPED: Final = ("mixtral", "olmoe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite")
"""Those whose experts it wraps, held against its code."""


def _refuse_adapters(architecture: Architecture, request: Request) -> None:
    """Raises `usage` where adapters were not held against PEFT's code: of other mixtures, and beside scans."""
    held = WRAPPED + (HELD if request.lora_targets == "all-linear" else ())
    plain = architecture.moe is None or architecture.model_type in held
    mixers = [m for layer in architecture.text.layers for m in layer.mixers]
    if request.dora and request.lora_dropout and request.mixed_precision != "no":
        raise unknown("--dora with --lora-dropout and --mixed-precision")
    attends = all(isinstance(m, (Attention, LatentAttention)) for m in mixers)
    if architecture.task != "causal" or not plain or not attends:
        raise unknown(f"--mode {request.mode} of {architecture.class_name}")


def _refuse_seq2seq(architecture: Architecture, request: Request) -> None:
    """Raises `usage` for what was not held against the code of an encoder with a decoder."""
    name = architecture.class_name
    if kind_of(architecture).layer != "relative" or not name.endswith("ForConditionalGeneration"):
        raise unknown(name)
    if request.attention != "sdpa":
        raise unknown(f"{name} with --attention {request.attention}")
    if request.dtype == "fp16":
        raise unknown(f"{name} in fp16")
    if mesh_of(request).gpus > 1 or request.fsdp or request.zero or request.offload:
        raise unknown(f"{name} on several GPUs or offloaded")
    if not architecture.text.layers[0].dropout.residual:
        raise unknown(f"{name} without dropout")
    _refuse_encoder(architecture, request)


def _refuse_encoder(architecture: Architecture, request: Request) -> None:
    """Raises `usage` for what was not held against the code of an encoder, alone or with a decoder."""
    if request.padding or request.attention not in ("sdpa", "eager"):
        raise unknown(f"{architecture.class_name} with --padding or --attention {request.attention}")


def _refuse_flash(architecture: Architecture, request: Request) -> None:
    """Raises `usage` where flash attention is asked for and can't run, or is given a padding mask."""
    if (flash := request.attention) != "flash_attention_2":
        return
    name = architecture.class_name
    parts = (m for layer in architecture.text.layers for m in layer.mixers if isinstance(m, Attention))
    if any(flash not in m.implementations for m in parts):
        raise HfvramError("usage", f"{name} can't run --attention {flash}: valid are sdpa and eager")
    if request.dtype == "fp32" and request.mixed_precision == "no":
        raise HfvramError("usage", f"--attention {flash} computes in fp16 and bf16: valid for --dtype fp32 is sdpa")
    if request.padding:
        raise unknown(f"--padding with --attention {flash}")


class Run(NamedTuple):
    """What one pass goes through: a model, or a chunk of a stage's."""

    architecture: Architecture
    states: States
    layers: list[tuple[Layer, int | None]]
    stage: Stage


def _runs(
    model: Architecture,
    architecture: Architecture,
    states: States,
    layers: list[tuple[Layer, int | None]],
    stage: Stage,
) -> list[Run]:
    """The chunks of a rank, of whose layers `layers` are all."""
    if stage.chunks == 1:
        return [Run(architecture, states, layers, stage)]
    found, at = [], 0
    for part in chunks(stage):
        own = stage_of(model, part.index, part.of)
        end = at + len(own.text.layers)
        found.append(Run(own, states.part(at, end, part.first, part.last), layers[at:end], part))
        at = end
    return found


def _steps(
    tape: Tape,
    architecture: Architecture,
    runs: list[Run],
    ids: Tensor,
    optimizer: Optimizer,
    parts: Units,
    request: Request,
    training: Training,
    stage: Stage,
) -> None:
    t = tape.timeline
    precision = None if request.mixed_precision == "no" or request.fsdp else request.mixed_precision
    scale = tape.new((), "fp32", None, SCALE) if precision == "fp16" else None
    beside = {p.name for tower in towers(architecture) for p in tower.params()} | training.frozen
    tensors = sum(p.kind != "buffer" and p.name not in beside for p in architecture.all_params)
    if training.adapted:
        tensors = len(training.params)
    order = schedule(stage, request.grad_accum)
    flying: dict[tuple[int, int], tuple[Tensor, list[Tensor]]] = {}
    for _ in range(STEPS):
        for forward, batch, chunk in order:
            run = runs[chunk]
            parts.last = batch == order[-1][1]
            if forward:
                began = len(t.events) if flying else 0
                tape.mark("forward")
                held = _receive(tape, run, ids, request)
                parts.enter_model()
                tape.autocast = precision
                out, found = _forward(tape, run, ids, request, *held)
                held += [out, *found]
                del found
                parts.leave_model(held)
                root = out if scale is None or not run.stage.last else op.mul(tape, out, scale, SCALE)
                tape.autocast = None
                tape.casts.clear()
                _label(t, _alive(t, began), "saved activations")
                flying[batch, chunk] = root, held
                del out, held, root
                continue
            tape.mark("backward")
            before = len(t.sizes)
            root, held = flying.pop((batch, chunk))
            tape.backward(root, None if run.stage.last else RETURNED)
            tape.enter(None)
            _label(t, range(before, len(t.sizes)), "recomputed")
            del root, held
            tape.held.clear()
        tape.mark("clipping")
        parts.clip(tensors)
        tape.mark("optimizer step")
        parts.step(optimizer)
        parts.forget_gradients()
    tape.mark("end")


def _receive(tape: Tape, run: Run, ids: Tensor, request: Request) -> list[Tensor]:
    """The hidden states that a later stage starts from."""
    if run.stage.first:
        return []
    architecture = run.architecture
    wide = any(layer.residual_fp32 for layer in architecture.text.layers)
    b, s = ids.shape
    hidden = tape.new((b, s // tape.sp, architecture.hidden_size), "fp32" if wide else request.dtype, None, RECEIVED)
    hidden.node = Input(hidden)
    return [hidden]


def _forward(tape: Tape, run: Run, ids: Tensor, request: Request, *received: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The loss, or what a stage sends to the next one; and what the model's output holds beside it."""
    architecture, states, layers, stage = run
    if stage.of == 1:
        return FORWARD[architecture.task](tape, architecture, states, layers, ids, request)
    through = decoder.forward if stage.last else decoder.decode
    out, held = through(tape, architecture, states, layers, ids, request, *received)
    if not stage.last and out.dtype != ("fp32" if layers[0][0].residual_fp32 else request.dtype):
        raise unknown(f"--pp of {architecture.class_name}, whose hidden states are in another dtype")
    return out, held


def _alive(t: Timeline, since: int) -> Iterable[int]:
    """What was made since then and still stands."""
    found = dict[int, None]()
    for event in t.events[since:]:
        if event >= 0:
            found[event] = None
        else:
            found.pop(~event, None)
    return found


def _label(t: Timeline, handles: Iterable[int], what: str) -> None:
    """Add to the names of these activations what they are."""
    tags, labelled = t.tags, dict[Tag, Tag]()
    for handle in handles:
        tag = tags[handle]
        if tag.category == "activations" and tag not in (FLOWING, SCRATCH, RETURNED) and not tag.name.endswith(")"):
            if tag not in labelled:
                labelled[tag] = tag._replace(name=f"{tag.name} ({what})")
            tags[handle] = labelled[tag]
