"""A request to a serving engine: what it may ask, what it leaves open, and what the engine is then started with."""

from typing import Any, Final

from hfvram.answer import llama_options, paged
from hfvram.answer.gpus import Gpu
from hfvram.answer.quantization import AS_IF
from hfvram.answer.resolve import DEFAULT_CTX
from hfvram.errors import HfvramError
from hfvram.memory.forward import ELEMENT_BYTES
from hfvram.memory.mesh import mesh_of
from hfvram.memory.serving import paged as pages
from hfvram.memory.serving import sglang, vllm
from hfvram.memory.serving.layers import recurrent
from hfvram.memory.serving.options import Options
from hfvram.memory.serving.plan import Plan, Requests
from hfvram.memory.serving.weights import Stage, standing
from hfvram.memory.weights import scheme_of
from hfvram.model import caching, rope
from hfvram.model.architecture import Architecture
from hfvram.model.identify import Model
from hfvram.model.packing import is_known
from hfvram.read import engine_line
from hfvram.request import CHOICES, Request, lengths
from hfvram.units import gib

ENGINES: Final = ("vllm", "sglang", "llama.cpp")
NAMES: Final = {"vllm": "vLLM", "sglang": "SGLang", "transformers": "transformers"}
PLANS: Final = {"vllm": vllm.plan, "sglang": sglang.plan, "transformers": pages.plan}
SHARED: Final = ("max_num_seqs", "max_num_batched_tokens", "engine_args")
POOLED: Final = (*SHARED, "enforce_eager", "requests", "draft")
OWN: Final = {
    "vllm": (*POOLED, "gpu_memory_utilization"),
    "sglang": (*POOLED, "mem_fraction_static"),
    "llama.cpp": (*SHARED, *llama_options.OWN),
}
"""The options of serving engines that each takes."""
NO_USE: Final = (
    *("padding", "cache", "attention", "kernels", "cp", "sp", "zero", "fsdp", "offload"),
    "expandable_segments",
)
"""Options that mean nothing to a serving engine, or that are not answered for one yet."""
MADE: Final = ("fp8", "nf4", *AS_IF)
"""What weights may be in that are stored whole: made while loading, or as if the checkpoint were so."""
NOT_LOADED: Final = ("mlx", "eetq", "quanto", "aqlm", "bitnet", "hqq")
"""Formats that neither vLLM nor SGLang loads (model_executor/layers/quantization/__init__.py)."""
NEARLY: Final = 0.03
"""So much of the weights may engines' copies and padding be."""
CACHE_BYTES: Final = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


def check(request: Request) -> None:
    """Raises `usage` for what a serving engine can't do, and for its options without it."""
    for name in dict.fromkeys(n for names in OWN.values() for n in names):
        taken = paged.OWN if paged.is_paged(request) else OWN.get(request.engine, ())
        if getattr(request, name) not in (None, False) and name not in taken:
            owners = [e for e in ENGINES if name in OWN[e]]
            raise HfvramError("usage", f"--{name.replace('_', '-')} goes with --engine {' or '.join(owners)}")
    if paged.is_paged(request):
        paged.check(request)
    if request.engine not in ENGINES:
        return
    default = Request()
    if request.engine == llama_options.ENGINE:
        llama_options.check(request)
    for name in NO_USE:
        if name == "attention" and request.engine == llama_options.ENGINE:
            continue
        if getattr(request, name) != getattr(default, name):
            flag = f"--{name.replace('_', '-')}"
            raise HfvramError("usage", f"{flag} is not supported with --engine {request.engine}")
    if request.ep > 1 and request.engine != "vllm":
        raise HfvramError("usage", f"--ep is not supported with --engine {request.engine}: valid is 1")
    for name, valid in (("mode", ("inference",)), ("phase", (None, "generate")), ("method", ("auto", "formula"))):
        if (value := getattr(request, name)) not in valid:
            raise HfvramError("usage", f"--{name} {value} is not supported with --engine {request.engine}")
    if request.requests and (request.max_ctx or request.max_batch):
        raise HfvramError("usage", "--max-ctx and --max-batch ask about requests of one length: leave --requests out")


def from_line(request: Request) -> tuple[Request, list[str]]:
    """The request with what its `engine_args` ask for, where it doesn't say otherwise itself; what isn't understood."""
    if request.engine_args is None:
        return request, []
    line = engine_line.parse(request.engine_args)
    if request.engine not in ("transformers", line.options["engine"]):
        raise HfvramError("usage", f"--engine {request.engine}, but --engine-args starts {line.options['engine']}")
    given, default = request.to_dict(), Request().to_dict()
    asked = {k: v for k, v in line.options.items() if k in given and given[k] == default[k]}
    notes = [f"not understood of --engine-args: {', '.join(line.unknown)}"] if line.unknown else []
    return Request.from_dict({**{k: v for k, v in given.items() if v != default[k]}, **asked}), notes


def resolve(model: Model, request: Request) -> tuple[Request, list[str]]:
    """The request with nothing left open but what the engine decides, and warnings."""
    if paged.is_paged(request):
        return paged.resolve(model, request)
    a, warnings = model.architecture, []
    if a.task != "causal" or not a.generates or not a.closed_form:
        what = "its layers are not known here" if not a.closed_form else "only decoders are"
        raise HfvramError("usage", f"{a.class_name} is not supported with --engine {request.engine}: {what}")
    limit = a.max_positions
    longest = max((n for _, n in lengths(request.requests)), default=0) if request.requests else 0
    ctx = request.ctx or longest or min(DEFAULT_CTX, limit or DEFAULT_CTX)
    if limit and max(ctx, longest) > limit:
        warnings.append(f"{max(ctx, longest):,} tokens are over the model's limit of {limit:,}")
    if longest > ctx:
        raise HfvramError("usage", f"--requests has one of {longest:,} tokens, more than --ctx {ctx:,}")
    dtype = request.dtype if request.dtype != "auto" else "fp16" if a.dtype == "fp16" else "bf16"
    own = a.quantization or "none"
    quant = own if request.quant == "auto" else request.quant
    warnings += _weights(a, request, own, quant)
    kv = request.kv_dtype if request.kv_dtype != "auto" else caching.cache_dtype(model.checkpoint.config) or dtype
    if kv not in CACHE_BYTES:
        valid = ", ".join(k for k in CHOICES["kv_dtype"] if k in ("auto", *CACHE_BYTES))
        raise HfvramError("usage", f"--kv-dtype {kv} with --engine {request.engine}: valid are {valid}")
    if request.ep > 1:
        if not a.moe or request.ep > a.moe.experts:
            valid = f"valid are 1 to {a.moe.experts}" if a.moe else f"{a.class_name} has no experts, valid is 1"
            raise HfvramError("usage", f"--ep {request.ep}: {valid}")
        warnings.append(
            f"--ep {request.ep} as --data-parallel-size {request.ep} --enable-expert-parallel: each rank has requests "
            "of its own; the buffers that tokens are exchanged by are not counted"
        )
    if len(a.stacks) > 1:
        warnings.append("images and sound take memory while they are encoded, which is roughly counted")
    if adapter := a.adapter:
        warnings.append(f"the adapter's {len(adapter)} tensors count as if they were merged into the model")
    changes: dict[str, Any] = {"ctx": ctx, "dtype": dtype, "gpus": mesh_of(request).gpus, "method": "formula"}
    changes |= {"phase": "generate", "kv_dtype": kv if kv in CHOICES["kv_dtype"] else "auto"}
    changes |= {"quant": quant if quant in CHOICES["quant"] else request.quant}
    if model.draft:
        b = model.draft.architecture
        heads = request.draft == "mtp"
        if heads and any(recurrent(layer) for layer in a.text.layers):
            warnings.append("states that are kept for each speculated token are not counted")
        elif any(recurrent(layer) for x in (a, b) for layer in x.text.layers):
            raise HfvramError("usage", "--draft with recurrent layers is not supported yet: valid is mtp")
        if b.vocab_size != a.vocab_size:
            warnings.append(f"the draft's vocabulary of {b.vocab_size:,} is not the model's of {a.vocab_size:,}")
        if b.quantization and not heads:
            warnings.append(f"the draft counts in {dtype}, not in its own {b.quantization}")
    return request.with_(**changes), warnings


def _weights(a: Architecture, request: Request, own: str, quant: str) -> list[str]:
    """Warnings about the weights' format. Raises `usage` for what the engine can't load or make."""
    engine = request.engine
    if quant not in ("none", own) and (own != "none" or quant not in MADE):
        valid = ", ".join(dict.fromkeys(("auto", "none", *(MADE if own == "none" else ()))))
        more = ": it makes mxfp4 of nothing, and loads gpt-oss so" if quant == "mxfp4" else ""
        raise HfvramError("usage", f"--quant {request.quant} with --engine {engine}: valid are {valid}{more}")
    if quant in ("nf4", "fp4") and a.moe and engine == "sglang":
        raise HfvramError("usage", f"--quant {quant}: SGLang packs no experts with bitsandbytes, valid is fp8")
    if quant != "none" and not is_known(scheme_of(a, quant)):
        if not a.stored_sizes or request.tp * request.pp > 1:
            alone = "" if a.stored_sizes else " without the headers of its files"
            valid = f"--quant none answers for {request.dtype if request.dtype != 'auto' else a.dtype}"
            raise HfvramError("usage", f"quantization {quant} is not supported yet{alone}: {valid}")
        return [f"quantization {quant} is not known here: weights count as they are stored, whatever is made of them"]
    if quant == own and (kind := quant.partition("-")[0]) in NOT_LOADED:
        return [f"{NAMES[engine]} loads no {kind} files: the weights count as they are stored"]
    if a.stored_sizes and quant == own and (said := _stored_otherwise(a, request, quant)):
        return [said]
    if own == "none" and quant in AS_IF:
        kind = quant.partition("-")[0].upper()
        return [f"as if the checkpoint were {kind} in 4 bits, groups of 128: embeddings, head and norms stay whole"]
    if own == "none" and quant == "nf4":
        return [f"bitsandbytes as {NAMES[engine]} has it: scales of 64 weights in fp32, not quantized themselves"]
    return []


def _stored_otherwise(a: Architecture, request: Request, quant: str) -> str | None:
    """What is said where the files are of another size than the method's own rule makes them."""
    dtype = a.dtype if request.dtype == "auto" else request.dtype
    count = len(a.text.layers)
    rule = sum(standing(a, dtype, quant, 1, Stage(0, count, count), ()).bytes_by_tag.values())
    stored = sum(a.stored_sizes)
    if abs(rule - stored) <= stored * NEARLY:
        return None
    said = f"the files hold {gib(stored)}, by the rule for {quant} the weights are {gib(rule)}"
    return f"{said}: the engine's are by the rule"


def options(model: Model, request: Request, gpu: Gpu | None) -> Options:
    """What the engine is started with."""
    values, a = model.checkpoint.config, model.architecture
    keys = ("mamba_ssm_dtype", "mamba_ssm_cache_dtype") if request.engine == "vllm" else ("mamba_ssm_dtype",)
    return Options(
        ctx=request.ctx or 1,
        dtype=request.dtype,
        quant=(a.quantization or "none") if request.quant == "auto" else request.quant,
        cache_element_bytes=CACHE_BYTES.get(request.kv_dtype, ELEMENT_BYTES[request.dtype]),
        tp=request.tp,
        pp=request.pp,
        ep=request.ep,
        gpu_bytes=gpu.memory_bytes if gpu else None,
        gpu_name=gpu.name if gpu else "",
        utilization=request.gpu_memory_utilization or request.mem_fraction_static,
        max_num_seqs=request.max_num_seqs,
        max_num_batched_tokens=request.max_num_batched_tokens,
        enforce_eager=request.enforce_eager,
        flash=request.attention == "flash_attention_2",
        state_dtype=caching.state_dtype(values, *keys),
    )


def plan(model: Model, request: Request, gpu: Gpu | None) -> Plan:
    """The engine's plan for a resolved request."""
    a = model.architecture
    draft = None
    if model.draft:
        b = model.draft.architecture
        own = request.draft == "mtp"  # which shares the model's rotary tables
        tables = () if own else rope.tables(b, model.draft.checkpoint.config)
        quant = options(model, request, gpu).quant if own and b.quantization == a.quantization else "none"
        draft = b, tables, quant
    return PLANS[request.engine](a, options(model, request, gpu), rope.tables(a, model.checkpoint.config), draft)


def asked_for(request: Request) -> Requests:
    """The concurrent requests."""
    return tuple(lengths(request.requests)) if request.requests else ((request.batch, request.ctx or 1),)
