"""Two training steps by formula: forward, backward, clipping and update, as a training loop runs them.

The loop is the exact engine's (`memory/exact/training.py`): the first step makes the optimizer's states, the second has
them from its start; of accumulated batches the second stands for all later ones.
"""

from collections.abc import Iterable

from hfvram.errors import HfvramError
from hfvram.memory.forward import Forward
from hfvram.memory.generation import generation
from hfvram.memory.inference import symbols
from hfvram.memory.timeline import Tag, Timeline
from hfvram.memory.training import operators as op
from hfvram.memory.training.blocks import unknown
from hfvram.memory.training.data_parallel import Units, units
from hfvram.memory.training.decoder import forward
from hfvram.memory.training.fsdp import mesh
from hfvram.memory.training.optimizers import Optimizer, kept_bytes, managed_bytes
from hfvram.memory.training.states import Leaf, States, single_stack
from hfvram.memory.training.step import clip
from hfvram.memory.training.stretch import TEMPLATE, copies, plan, stretch
from hfvram.memory.training.tape import FLOWING, SCRATCH, Tape
from hfvram.memory.training.tensors import Tensor
from hfvram.memory.weights import standing
from hfvram.model.architecture import Architecture
from hfvram.model.layers import Attention, Layer
from hfvram.request import Request

STEPS = 2
SCALE = Tag("loss scale", "activations", "4", "PyTorch 2.11: torch/amp/grad_scaler.py")
IDS = Tag("token ids", "inputs", "b·s·8", "the batch", "exact")


def timeline(architecture: Architecture, request: Request, on_meta: bool = False, whole: bool = False) -> Timeline:
    """Training of one request that leaves nothing open (`answer/resolve.py`), on one GPU.

    `on_meta` follows PyTorch on the meta device where it differs from CUDA, `whole` writes every layer: for tests.
    Raises `usage` for kinds of layers and options that have no formula yet.
    """
    refuse(architecture, request)
    layers, groups = plan(architecture.text.layers)
    if whole:
        layers, groups = [(x, None) for x in architecture.text.layers], 0
    ranks = mesh(request.gpus or 1, request.fsdp == "hybrid_shard")[1] if request.fsdp else 1
    t = Timeline(standing(architecture, request.dtype, "none", False, ranks))
    tape = Tape(t, generation(request.compute_capability), on_meta)
    ids = tape.new((request.batch, request.ctx or 1), "int64", None, IDS)
    states = States(architecture, request.dtype, layers)
    parts = units(tape, states, request, groups)
    tape.units = parts if type(parts) is not Units else None
    t.restart()
    optimizer = Optimizer(request.optimizer, tape, parts.leaves)
    _steps(tape, architecture, states, layers, ids, optimizer, parts, request)
    t.events = t.events[:]  # what dies with this function is no part of the run
    t.symbols = symbols(architecture, Forward(batch=request.batch, tokens=request.ctx or 1, dtype=request.dtype))
    _count(t, states.trained(), parts.leaves, optimizer, groups)
    if groups:
        return stretch(t, tape.segments, groups) or timeline(architecture, request, on_meta, whole=True)
    return t


def refuse(architecture: Architecture, request: Request) -> None:
    """Raises `usage` for what has no formula yet."""
    single_stack(architecture)
    if request.mode != "train":
        raise unknown(f"--mode {request.mode}")
    if architecture.task != "causal" or not architecture.generates or architecture.adapter:
        raise unknown(architecture.class_name)
    quant = architecture.quantization if request.quant == "auto" else request.quant
    if quant not in (None, "none"):
        raise unknown(f"--quant {quant}")
    mixers = (m for layer in architecture.text.layers for m in layer.mixers)
    if any(isinstance(m, Attention) and not m.causal for m in mixers):
        raise unknown(f"attention in both directions of {architecture.class_name}")
    if request.mixed_precision == "fp16" and request.dtype == "fp16":
        raise HfvramError("usage", "--mixed-precision fp16 can't train fp16 weights: valid are --dtype fp32 and bf16")
    if request.padding:
        raise unknown("--padding")
    if request.attention not in ("sdpa", "eager"):
        raise unknown(f"--attention {request.attention}")


def _steps(
    tape: Tape,
    architecture: Architecture,
    states: States,
    layers: list[tuple[Layer, int | None]],
    ids: Tensor,
    optimizer: Optimizer,
    parts: Units,
    request: Request,
) -> None:
    t, leaves = tape.timeline, parts.leaves
    precision = None if request.mixed_precision == "no" or request.fsdp else request.mixed_precision
    scale = tape.new((), "fp32", None, SCALE) if precision == "fp16" else None
    tensors = sum(p.kind != "buffer" for p in architecture.all_params)
    for _ in range(STEPS):
        for missing in reversed(range(min(request.grad_accum, 2))):
            parts.last = not missing
            tape.mark("forward")
            parts.enter_model()
            tape.autocast = precision
            loss, logits = forward(tape, architecture, states, layers, ids, request)
            parts.leave_model((loss, logits))
            scaled = loss if scale is None else op.mul(tape, loss, scale, SCALE)
            tape.autocast = None
            tape.casts.clear()
            _label(t, t.live(len(t.events)), "saved activations")
            tape.mark("backward")
            before = len(t.sizes)
            tape.backward(scaled)
            tape.enter(None)
            _label(t, range(before, len(t.sizes)), "recomputed")
            del loss, logits, scaled
        tape.mark("clipping")
        clip(tape, leaves, tensors)
        tape.mark("optimizer step")
        optimizer.step(tape, leaves)
        parts.forget_gradients()
    tape.mark("end")


def _label(t: Timeline, handles: Iterable[int], what: str) -> None:
    """Add to the names of these activations what they are."""
    tags, labelled = t.tags, dict[Tag, Tag]()
    for handle in handles:
        tag = tags[handle]
        if tag.category == "activations" and tag not in (FLOWING, SCRATCH) and not tag.name.endswith(")"):
            if tag not in labelled:
                labelled[tag] = tag._replace(name=f"{tag.name} ({what})")
            tags[handle] = labelled[tag]


def _count(t: Timeline, trained: list[Leaf], leaves: list[Leaf], optimizer: Optimizer, groups: int) -> None:
    """Gradients and states in raw sizes, and the parameters that they are of, in all layers."""
    for leaf in trained:
        t.trainable_parameters += (copies(groups) if leaf.segment == TEMPLATE else 1) * leaf.tensor.numel
    for leaf in leaves:
        times = copies(groups) if leaf.segment == TEMPLATE else 1
        managed = managed_bytes(optimizer.name, leaf.tensor.numel)
        t.gradients_bytes += times * leaf.tensor.nbytes
        t.managed_bytes += times * managed
        t.optimizer_bytes += times * (kept_bytes(optimizer.kept, leaf) + managed)
