"""A request to transformers' continuous batching (`--cache paged`): what it may ask, and what it leaves open."""

from typing import Any, Final

from hfvram.answer import quantization
from hfvram.answer.resolve import DEFAULT_CTX
from hfvram.errors import HfvramError
from hfvram.memory.serving.paged import layout
from hfvram.memory.weights import computed
from hfvram.model.identify import Model
from hfvram.request import Request, lengths

CACHE: Final = "paged"
OWN: Final = ("requests", "max_num_batched_tokens")
"""Options of serving engines that it takes: the second is its `max_batch_tokens`."""
NO_USE: Final = (
    "padding",
    "kernels",
    "offload",
    "expandable_segments",
    "tp",
    "pp",
    "ep",
    "cp",
    "sp",
    "zero",
    "fsdp",
    "gpus",
)


def is_paged(request: Request) -> bool:
    """Whether this is a question about continuous batching."""
    return request.engine == "transformers" and request.cache == CACHE


def check(request: Request) -> None:
    """Raises `usage` for what does not go with it."""
    default = Request()
    for name in NO_USE:
        if getattr(request, name) != getattr(default, name):
            raise HfvramError("usage", f"--{name.replace('_', '-')} is not supported with --cache paged")
    for name, valid in (("mode", ("inference",)), ("phase", (None, "generate")), ("method", ("auto", "formula"))):
        if (value := getattr(request, name)) not in valid:
            raise HfvramError("usage", f"--{name} {value} is not supported with --cache paged")
    if request.attention == "eager":
        raise HfvramError("usage", "--attention eager with --cache paged: valid are sdpa and flash_attention_2")


def resolve(model: Model, request: Request) -> tuple[Request, list[str]]:
    """The request with nothing left open, and warnings. Raises `usage`."""
    a = model.architecture
    if a.task != "causal" or not a.generates or not a.closed_form:
        raise HfvramError("usage", f"--cache paged: {a.class_name} is no decoder that is known here, valid is dynamic")
    layout(a)
    limit = a.max_positions
    longest = max((n for _, n in lengths(request.requests)), default=0) if request.requests else 0
    ctx = request.ctx or longest or min(DEFAULT_CTX, limit or DEFAULT_CTX)
    warnings = quantization.check(a, request)
    if limit and max(ctx, longest) > limit:
        warnings.append(f"{max(ctx, longest):,} tokens are over the model's limit of {limit:,}")
    if longest > ctx:
        raise HfvramError("usage", f"--requests has one of {longest:,} tokens, more than --ctx {ctx:,}")
    dtype = a.dtype if request.dtype == "auto" else request.dtype
    if request.kv_dtype not in ("auto", dtype):
        raise HfvramError("usage", f"--kv-dtype {request.kv_dtype} with --cache paged: valid is {dtype}")
    warnings.append("continuous batching as transformers' source has it, not measured")
    changes: dict[str, Any] = {"ctx": ctx, "dtype": dtype, "kv_dtype": "auto", "phase": "generate", "gpus": 1}
    quant = computed(a, request.with_(dtype=dtype))
    return request.with_(**changes, method="formula", quant=quant if quant == "none" else request.quant), warnings
