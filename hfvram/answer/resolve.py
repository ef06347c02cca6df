"""What a request leaves open, decided by the model: context, phase, dtypes; what goes against it, and what was never
measured, is told."""

from hfvram.answer import caches, quantization
from hfvram.answer.placing import is_placed
from hfvram.errors import HfvramError
from hfvram.memory import offload
from hfvram.memory.attention import implementation
from hfvram.memory.bitsandbytes import ON_LOADING
from hfvram.memory.forward import ELEMENT_BYTES, Forward
from hfvram.memory.generation import MEASURED, generation
from hfvram.memory.mesh import mesh_of
from hfvram.memory.tensor_parallel import NO_PLAN
from hfvram.memory.training.deepspeed import buckets
from hfvram.model.adapter import defaults
from hfvram.model.architecture import Architecture
from hfvram.model.layers import Attention, GatedDeltaNet
from hfvram.request import CHOICES, Request
from hfvram.units import gib

DEFAULT_CTX = 4096
PIPELINE = (
    "--batch is one microbatch, --grad-accum how many there are; hidden states are received when their turn comes: "
    "PyTorch's own pipelining makes the buffers of all microbatches beforehand"
)
CHUNKS = (
    "--pp-chunks as Megatron-LM interleaves: (pp − rank − 1)·2 + (chunks − 1)·pp + 1 passes through chunks are in "
    "flight; derived, not measured"
)
EXPERTS = "each rank of --ep has a batch of its own; routing is taken to be balanced: as many tokens come as are sent"
OFFLOADED = "what is offloaded comes for its own moment alone: nothing is fetched ahead or kept for the next token"
RING = (
    "--cp as PyTorch's context_parallel and accelerate run it: ring attention by all-gather, each rank with two pieces "
    "of --ctx tokens; derived from their code, not measured"
)
DELTA_RULE = (
    "the gated delta rule trains as transformers computes it without flash-linear-attention: what that package's "
    "kernels keep for a backward pass is not known"
)
SEQUENCE_KEPT = (
    "--sp as PyTorch's DTensor runs it: what attention and MLP gather stays for the backward pass, "
    "where Megatron-LM gathers again"
)
SEQUENCE_AGAIN = (
    "--sp as Megatron-LM runs it: a part of the sequence stays for the backward pass, and is gathered again"
)
DEFAULT_NEW_TOKENS = 8


def resolve(architecture: Architecture, request: Request) -> tuple[Request, list[str]]:
    """The request with nothing left open, and warnings."""
    warnings = []
    if architecture.adapter and request.mode != "inference":
        raise HfvramError("usage", f"--mode {request.mode}: this is an adapter, valid is its base model")
    limit = architecture.max_positions
    ctx = request.ctx or min(DEFAULT_CTX, limit or DEFAULT_CTX)
    if limit and ctx > limit:
        warnings.append(f"ctx {ctx:,} is over the model's limit of {limit:,} tokens")
    if architecture.text.pixels:
        tokens = architecture.text.tokens or 0
        warnings.append(f"an image is {tokens:,} tokens at the configured image_size: --ctx doesn't apply")
    encoder = architecture.task == "encoder"
    bare = architecture.task == "causal" and not architecture.generates
    phase = request.phase or ("encode" if encoder or bare else "generate")
    if encoder and phase != "encode":
        raise HfvramError("usage", f"--phase {phase}: {architecture.class_name} keeps no cache, valid is encode")
    new = request.new_tokens or min(DEFAULT_NEW_TOKENS, ctx - 1)
    if phase == "generate" and (new >= ctx > 1 or (request.new_tokens and ctx == 1)):
        valid = f"valid are 1 to {ctx - 1}" if ctx > 1 else "leave it out"
        raise HfvramError("usage", f"--new-tokens {new} leaves no prompt in --ctx {ctx}: {valid}")
    dtype = architecture.dtype if request.dtype == "auto" else request.dtype
    own = architecture.quantization or "none"
    kept_in = caches.check(architecture, request, phase, dtype)
    if kept_in == "int8":
        warnings.append("a cache in 8 bits as HQQ's backend keeps it: read in its source, not measured")
    warnings += quantization.check(architecture, request)
    capability = request.compute_capability or MEASURED
    if capability != MEASURED and request.attention == "sdpa":
        warnings.append(_derived(capability, dtype))
    if request.expandable_segments:
        warnings.append("expandable segments as PyTorch's source has them, not measured")
    nets = (isinstance(m, GatedDeltaNet) for x in architecture.text.layers for m in x.mixers)
    if request.mode != "inference" and request.kernels == "fused" and any(nets):
        warnings.append(DELTA_RULE)
    if request.mode == "inference" and (request.offload or request.resident_experts):
        offload.check(architecture, request)
        warnings.append(OFFLOADED)
    if (gpus := mesh_of(request).gpus) > 1:
        warnings += _several(architecture, request, gpus)
    if request.zero:
        warnings += _deepspeed(architecture, request, dtype)
    if request.lora_targets == "default" and request.mode in ("lora", "qlora"):
        request = request.with_(lora_targets=tuple(defaults(architecture.model_type)))
        warnings.append(f"PEFT's own targets for {architecture.model_type}: {', '.join(request.lora_targets)}")
    attention = _attention(architecture, request)
    if attention != request.attention:
        warnings.append(
            f"{architecture.class_name} can't run --attention {request.attention}: {attention} runs instead"
        )
    training = request.mode != "inference"
    if request.mode == "qlora":
        if request.quant == "auto" and own not in ("none", "nf4", "fp4"):
            raise HfvramError("usage", f"--mode qlora: the checkpoint is {own} already, valid is --quant none")
        if request.quant in ("auto", "none"):
            request = request.with_(quant=own if request.quant == "auto" and own != "none" else "nf4")
    warnings += _left_out(architecture, request, dtype)
    return request.with_(
        ctx=ctx,
        phase=None if training else phase,
        new_tokens=(new or None) if phase == "generate" and not training else None,
        dtype=dtype,
        quant=own if request.quant == "auto" and own in CHOICES["quant"] else request.quant,
        kv_dtype=kept_in if kept_in in CHOICES["kv_dtype"] else "auto",
        attention=attention,
        compute_capability=None if capability == MEASURED else capability,
        gpus=gpus,
        method="formula" if request.method == "auto" else request.method,
    ), warnings


def _left_out(architecture: Architecture, request: Request, dtype: str) -> list[str]:
    """What an answer does not hold, or holds where nobody expects it."""
    said = []
    towers = [s.name for s in architecture.stacks if s.name != architecture.main and architecture.task != "seq2seq"]
    if towers and request.mode != "inference":
        said.append(
            f"text alone is trained on: the {' and '.join(towers)} stack has no activations, gradients or states"
        )
    elif towers:
        said.append(f"the prompt is text alone: the {' and '.join(towers)} stack counts with its weights")
    if architecture.moe and request.quant in ON_LOADING:
        wide = ", which QLoRA casts to fp32" if request.mode == "qlora" else ""
        said.append(f"bitsandbytes quantizes linear layers: experts that are one tensor stay in {dtype}{wide}")
    if request.fsdp and request.mixed_precision != "no" and dtype != "fp32":
        said.append(
            f"the parameters are kept in {dtype}: accelerate makes them fp32 under mixed precision (--dtype fp32)"
        )
    return said


def _derived(capability: str, dtype: str) -> str:
    """What is said of a GPU on which nothing was measured."""
    gpu = generation(capability)
    said = f"attention kernels for {gpu.name} ({capability}) as PyTorch's source chooses them, not measured"
    return f"{said}; none of them takes bf16, as --dtype fp16 would allow" if dtype == "bf16" and not gpu.bf16 else said


def _several(architecture: Architecture, request: Request, gpus: int) -> list[str]:
    """What is assumed of several GPUs."""
    if request.mode == "inference" and mesh_of(request).model == 1:
        return _whole(request, gpus)
    which = "first" if request.method == "simulate" else "fullest"
    said = [f"per GPU: the {which} of {gpus}; NCCL's own memory is not counted"]
    if request.fsdp == "hybrid_shard":
        said.append("hybrid_shard shards within nodes of 8 GPUs and replicates over nodes")
    if request.pp > 1:
        said.append(PIPELINE)
    if request.pp_chunks > 1:
        said.append(CHUNKS)
    if request.tp > 1 and architecture.model_type in NO_PLAN and request.method != "simulate":
        said.append(f"--tp as Megatron-LM splits: transformers has no plan for {architecture.model_type}")
    if request.ep > 1:
        said.append(EXPERTS)
    if request.cp > 1:
        said.append(RING)
    if request.sp and request.mode != "inference":
        megatron = architecture.model_type in NO_PLAN and request.method != "simulate"
        said.append(SEQUENCE_AGAIN if megatron else SEQUENCE_KEPT)
    if request.fsdp and (request.mode == "qlora" or request.quant in ("nf4", "fp4")):
        said.append("4-bit weights packed into the computing dtype, so that FSDP shards them: not measured")
    return said


def _whole(request: Request, gpus: int) -> list[str]:
    """What several GPUs are without a way to split a model: places for its modules, or replicas."""
    if is_placed(request):
        return []
    if request.gpu and request.method == "simulate":
        valid = "--method formula, or --gpus 1"
        raise HfvramError(
            "usage", f"--gpus {gpus} with --gpu: only a formula answers for a placed model: valid is {valid}"
        )
    more = "" if request.gpu else "; with --gpu SIZE one model is placed over all of them"
    return [f"each of the {gpus} GPUs holds the whole model, for a batch of its own{more}"]


def _deepspeed(architecture: Architecture, request: Request, dtype: str) -> list[str]:
    """What is assumed of DeepSpeed: its defaults, and the one dtype that it trains in."""
    own = dtype if request.mixed_precision == "no" else request.mixed_precision
    e = ELEMENT_BYTES[own]
    chosen, auto = (gib(buckets(x, architecture.hidden_size).reduce * e) for x in (request.zero_bucket, "auto"))
    if request.zero_bucket:
        of = "auto, as transformers makes it" if request.zero_bucket == "auto" else f"{request.zero_bucket} elements"
        told = f"DeepSpeed's reduce bucket of {of}: {chosen}"
    else:
        told = (
            f"DeepSpeed's own defaults: a reduce bucket of 5e8 elements ({chosen}); reduce_bucket_size auto in a "
            f"configuration of transformers makes it {auto} (--zero-bucket auto)"
        )
    said = [
        told,
        f"DeepSpeed trains in {own} without autocast{', its master weights in fp32' if own != 'fp32' else ''}",
    ]
    if request.offload:
        said.append("CPU memory is per GPU's process: a node takes that of all its GPUs")
    return said


def _attention(architecture: Architecture, request: Request) -> str:
    parts = [m for layer in architecture.text.layers for m in layer.mixers if isinstance(m, Attention)]
    forward = Forward(batch=1, tokens=1, attention=request.attention)
    return implementation(forward, parts[0]) if parts else request.attention
