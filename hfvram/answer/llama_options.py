"""A request to llama.cpp: what it may ask, what it leaves open, and what the program is then started with."""

import re
from typing import Any, Final

from hfvram.answer.resolve import DEFAULT_CTX
from hfvram.errors import HfvramError, printable
from hfvram.memory.serving.llama_cache import TYPES, UBATCH, Cells
from hfvram.memory.serving.llama_cpp import LlamaPlan, Options, plan
from hfvram.memory.serving.llama_quant import quantized
from hfvram.model.gguf_names import converted
from hfvram.model.gguf_names import tensors as named
from hfvram.model.identify import Model
from hfvram.model.layers import RGLRU, Attention, CompressedAttention, LightningAttention
from hfvram.read.checkpoint import StoredTensor
from hfvram.request import GGUF_CACHES, GGUF_QUANTS, Request

ENGINE: Final = "llama.cpp"
OWN: Final = ("n_gpu_layers", "n_cpu_moe", "override_tensor", "swa_full", "mmproj")
KEPT: Final = {"auto": "f16", "fp16": "f16", "int8": "q8_0", "int4": "q4_0"}
"""What `--kv-dtype` means here, where it isn't llama.cpp's own word."""
LONGEST_PATTERN: Final = 500
_RUNAWAY = re.compile(r"\([^()]*[+*{|][^()]*\)[+*{]|\(.*\(.*\)[+*{]")  # could take for ever on a name
SAID_OF_FILES: Final = "GGUF files are answered for llama.cpp (--engine llama.cpp)"
SAID_OF_OPTIONS: Final = "answered for llama.cpp (--engine llama.cpp): nothing else runs what is asked for"
NO_LAYERS: Final = (RGLRU, LightningAttention, CompressedAttention)
PLAIN: Final = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}


def means_llama(model: str, request: Request) -> bool:
    """Whether a request can only be one to llama.cpp: a .gguf file, its options, its quantizations."""
    words = request.quant in GGUF_QUANTS or request.kv_dtype in GGUF_CACHES
    return model.endswith(".gguf") or words or any(getattr(request, name) not in (None, False) for name in OWN)


def check(request: Request) -> None:
    """Raises `usage` for what can't be asked of llama.cpp."""
    if request.tp > 1 or request.pp > 1 or (request.gpus or 1) > 1:
        raise HfvramError("usage", "--engine llama.cpp is answered for one GPU: leave --gpus, --tp and --pp out")
    if request.attention not in ("sdpa", "eager"):
        raise HfvramError("usage", "--attention with --engine llama.cpp: valid are sdpa (-fa auto) and eager (-fa off)")
    if request.kv_dtype not in KEPT and request.kv_dtype not in TYPES:
        valid = ", ".join(("auto", *TYPES))
        raise HfvramError("usage", f"--kv-dtype {request.kv_dtype} with --engine llama.cpp: valid are {valid}")
    patterns(request)


def patterns(request: Request) -> tuple[str, ...]:
    """The patterns of `--override-tensor` that name CPU memory. Raises `usage`."""
    found = []
    for part in filter(None, (request.override_tensor or "").split(",")):
        pattern, equals, place = part.rpartition("=")
        if not equals or not pattern or not place.upper().startswith(("CPU", "CUDA0")):
            shown = printable(part, 80)
            raise HfvramError("usage", f"--override-tensor {shown}: as in '\\.ffn_.*_exps\\.=CPU', several with commas")
        if len(pattern) > LONGEST_PATTERN or _RUNAWAY.search(pattern):
            raise HfvramError(
                "usage", f"--override-tensor {printable(pattern, 80)}: too long, or it repeats a repetition"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise HfvramError("usage", f"--override-tensor {printable(pattern, 80)} is no pattern: {error}") from None
        if place.upper().startswith("CPU"):
            found.append(pattern)
    return tuple(found)


def resolve(model: Model, request: Request) -> tuple[Request, list[str]]:
    """The request with nothing left open, and warnings. Raises `usage`."""
    a, warnings = model.architecture, []
    if model.checkpoint.gguf is None and (not a.closed_form or a.task == "seq2seq"):
        what = "its layers are not known here" if not a.closed_form else "an encoder with a decoder"
        raise HfvramError("usage", f"{a.class_name} is not supported with --engine llama.cpp: {what}")
    if model.checkpoint.gguf is None and any(isinstance(m, NO_LAYERS) for x in a.text.layers for m in x.mixers):
        raise HfvramError("usage", f"{a.class_name} has layers that llama.cpp doesn't know")
    limit = a.max_positions
    ctx = request.ctx or min(DEFAULT_CTX, limit or DEFAULT_CTX)
    if limit and ctx > limit:
        warnings.append(f"{ctx:,} tokens are over the model's limit of {limit:,}")
    if a.adapter:
        warnings.append(
            f"the adapter's {len(a.adapter)} tensors are left out: llama.cpp loads them from a file of their own"
        )
    changes: dict[str, Any] = {"ctx": ctx, "gpus": 1, "method": "formula", "phase": "generate"}
    if a.task == "encoder":
        changes["phase"] = "encode"
    if request.mmproj and not model.checkpoint.projector:
        raise HfvramError("usage", f"--mmproj: {model.checkpoint.id} has no GGUF file of a projector beside its model")
    changes["kv_dtype"] = KEPT.get(request.kv_dtype, request.kv_dtype)
    _check_blocks(model, changes["kv_dtype"])
    if model.checkpoint.gguf is not None:
        if request.quant not in ("auto", a.dtype):
            raise HfvramError("usage", f"--quant {request.quant}: the file is {a.dtype} already, valid is auto")
    else:
        changes["quant"], notes = _mixture(model, request)
        warnings += notes
    if len(a.stacks) > 1:
        warnings.append("towers for images and sound are another file's (--mmproj of llama.cpp): they are left out")
    if request.n_gpu_layers is None and not request.gpu:
        warnings.append("all layers on the GPU; llama.cpp itself moves layers to the CPU where they don't fit (--fit)")
    return request.with_(**changes), warnings


def _check_blocks(model: Model, kind: str) -> None:
    """Raises `usage` where a head isn't whole blocks of the cache's type."""
    block = TYPES[kind][0]
    for layer in model.architecture.text.layers:
        for mixer in layer.mixers:
            if isinstance(mixer, Attention) and (mixer.head_dim % block or mixer.value_dim % block):
                size = mixer.head_dim if mixer.head_dim % block else mixer.value_dim
                raise HfvramError("usage", f"--kv-dtype {kind}: heads of {size} are not whole blocks of {block}")


def _mixture(model: Model, request: Request) -> tuple[str, list[str]]:
    """What a checkpoint of transformers is converted to."""
    a, own = model.architecture, model.architecture.quantization
    if request.quant in GGUF_QUANTS:
        return request.quant, [f"no GGUF file was read: {request.quant} as llama-quantize makes it of this model"]
    if request.quant not in ("auto", "none"):
        valid = ", ".join(("auto", "none", *GGUF_QUANTS[:12])) + ", …"
        raise HfvramError("usage", f"--quant {request.quant} with --engine llama.cpp: valid are {valid}")
    plain = PLAIN[request.dtype if request.dtype != "auto" else a.dtype]
    if own == "mxfp4" and request.quant == "auto":
        return "MXFP4_MOE", ["no GGUF file was read: experts in MXFP4, the rest in Q8_0, as ggml-org publishes it"]
    notes = [f"no GGUF file was read: converted to {plain}; --quant Q4_K_M and others say what quantizing makes of it"]
    return plain, notes + ([f"llama.cpp's converter turns {own} weights into {plain}"] if own else [])


def stored(model: Model, request: Request) -> tuple[StoredTensor, ...]:
    """The tensors of the file, or of the one that a checkpoint would be converted to."""
    if model.checkpoint.gguf is not None:
        return model.checkpoint.tensors or ()
    a = model.architecture
    plain = request.quant if request.quant in PLAIN.values() else PLAIN[a.dtype]
    return quantized(named(a), a, request.quant, plain)


def options(request: Request) -> Options:
    """What llama.cpp is started with. Several sequences have a stream each, `--max-num-seqs` slots share one cache."""
    slots = request.max_num_seqs
    cells = Cells(
        ctx=(request.ctx or 1) * (request.batch if slots else 1),
        sequences=slots or request.batch,
        unified=slots is not None,
        ubatch=request.max_num_batched_tokens or UBATCH,
        swa_full=request.swa_full,
    )
    return Options(
        cells=cells,
        keys=request.kv_dtype,
        values=request.kv_dtype,
        gpu_layers=request.n_gpu_layers,
        cpu_moe=request.n_cpu_moe or 0,
        overrides=patterns(request),
        scores=request.attention == "eager",
    )


def planned(model: Model, request: Request) -> LlamaPlan:
    """The plan for a resolved request."""
    projector = model.checkpoint.projector if request.mmproj else ()
    a = model.architecture if model.checkpoint.gguf is not None else converted(model.architecture)
    return plan(a, (*stored(model, request), *projector), options(request))
