"""Whether a serving engine's pool holds a request, the most that it would, and which of its flags make it fit."""

from collections.abc import Iterator
from itertools import combinations
from typing import Any, Final

from hfvram.answer.estimate import Fit, Way
from hfvram.answer.fit import LEAST_CTX, MOST_WAYS, difference
from hfvram.answer.gpus import Gpu
from hfvram.answer.serving_options import asked_for, plan
from hfvram.errors import HfvramError
from hfvram.memory.device import CONTEXT_BYTES
from hfvram.memory.serving import vllm
from hfvram.memory.serving.plan import Plan
from hfvram.model.identify import Model
from hfvram.request import Request

FLAGS: Final = {
    "transformers": {"ctx": "--ctx", "quant": "--quant", "max_num_batched_tokens": "--max-num-batched-tokens"},
    "vllm": {
        "ctx": "--max-model-len",
        "kv_dtype": "--kv-cache-dtype",
        "quant": "--quantization",
        "tp": "--tensor-parallel-size",
        "pp": "--pipeline-parallel-size",
        "gpu_memory_utilization": "--gpu-memory-utilization",
        "max_num_seqs": "--max-num-seqs",
        "max_num_batched_tokens": "--max-num-batched-tokens",
    },
    "sglang": {
        "ctx": "--context-length",
        "kv_dtype": "--kv-cache-dtype",
        "quant": "--quantization",
        "tp": "--tp-size",
        "pp": "--pp-size",
        "mem_fraction_static": "--mem-fraction-static",
        "max_num_batched_tokens": "--chunked-prefill-size",
        "max_num_seqs": "--max-running-requests",
    },
}
"""What each engine calls an option. `--ctx` with a batch above 1 has no flag: the batch is the clients'."""


def verdict(model: Model, request: Request, gpu: Gpu, found: Plan) -> Fit:
    """Whether the pool holds the request; the longest that it would, and how many; flags with which it does."""
    requests = asked_for(request)
    needed, pool = found.cache_bytes(requests), found.pool_bytes or 0
    fits = found.holds(requests)
    limits: dict[str, int | None] = {"max_ctx": None, "max_batch": None}
    if not request.requests:
        longest = max(request.ctx or 1, model.architecture.max_positions or 10**7)
        limits = {"max_ctx": _longest(found, request.batch, longest), "max_batch": _most(found, request.ctx or 1)}
    return Fit(
        gpu=gpu.name,
        capacity_bytes=gpu.memory_bytes,
        fits=fits,
        headroom_bytes=pool - needed
        if found.room_bytes is None or found.room_bytes >= 0
        else found.room_bytes - needed,
        ways=() if fits else ways(model, request, gpu, limits["max_ctx"]),
        **limits,
    )


def _longest(found: Plan, batch: int, most: int) -> int:
    """The largest context at which `batch` requests fit."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = found.holds(((batch, middle),))
        low, high = (middle, high) if fits else (low, middle)
    return low


def _most(found: Plan, ctx: int) -> int:
    """How many requests of this length fit."""
    if found.room_bytes is None or found.room_bytes < 0:
        return 0
    return min((p.units // p.needs(ctx) for p in found.pools if p.units is not None and p.needs(ctx)), default=10**9)


def ways(model: Model, request: Request, gpu: Gpu, longest: int | None) -> tuple[Way, ...]:
    """Changes of the engine's flags, and pairs of them where neither alone is enough, the mildest first."""
    singles = list(_changes(request, longest))
    enough: set[int] = set()
    found: list[Way] = []
    for count in (1, 2):
        for parts in combinations(range(len(singles)), count):
            wider = [i for i in parts if "tp" in singles[i]]
            widths = [singles[i]["tp"] for i in enough if "tp" in singles[i]]
            if (
                enough.intersection(parts)
                or len(wider) > 1
                or (wider and singles[wider[0]]["tp"] >= min(widths, default=99))
            ):
                continue
            changed = request.with_(**{k: v for i in parts for k, v in singles[i].items()})
            try:
                planned = plan(model, changed, gpu)
            except HfvramError:
                continue
            if planned.holds(asked_for(changed)):
                enough.update(parts if count == 1 else ())
                found.append(Way(change=flags(request, changed), device_bytes=device_bytes(planned)))
    return tuple(found[:MOST_WAYS])


def device_bytes(found: Plan, needed: int = 0) -> int:
    """What the engine takes of the device: vLLM's figure outside PyTorch comes on top of the CUDA context."""
    pool = needed if found.pool_bytes is None else found.pool_bytes
    whole = found.loaded_bytes + found.activation_bytes + pool + found.graph_bytes
    return whole + found.non_torch_bytes + (CONTEXT_BYTES if found.engine == "vllm" else 0)


def _changes(request: Request, longest: int | None) -> Iterator[dict[str, Any]]:
    """What could be changed, from what costs the least."""
    if request.engine == "vllm" and (request.gpu_memory_utilization or vllm.UTILIZATION) < 0.95:
        yield {"gpu_memory_utilization": 0.95}
    if request.engine == "sglang" and request.mem_fraction_static and request.mem_fraction_static < 0.9:
        yield {"mem_fraction_static": 0.9}
    if (request.max_num_seqs or 257) > 256 and request.engine == "vllm":
        yield {"max_num_seqs": 256}
    if (request.max_num_batched_tokens or 8192) > 2048:
        yield {"max_num_batched_tokens": 2048}
    if request.kv_dtype != "fp8":
        yield {"kv_dtype": "fp8"}
    if request.quant in ("none", "auto"):
        yield {"quant": "fp8"}
    if not request.requests and longest and longest >= LEAST_CTX:
        yield {"ctx": longest}
    for times in (2, 4, 8)[: 4 - request.tp.bit_length()]:
        yield {"tp": request.tp * times, "gpus": (request.gpus or 1) * times}


def flags(asked: Request, changed: Request) -> str:
    """The options that differ, as the engine has them.

    >>> flags(Request(engine="vllm"), Request(engine="vllm", kv_dtype="fp8", tp=2, gpus=2))
    '--kv-cache-dtype fp8 --tensor-parallel-size 2'
    """
    names = FLAGS[asked.engine]
    words = difference(asked, changed).split()
    pairs = zip(words[::2], words[1::2], strict=True)
    named = ((names.get(o.removeprefix("--").replace("-", "_")), v) for o, v in pairs)
    fp8 = "fp8" if asked.engine == "vllm" else "fp8_e4m3"
    return " ".join(f"{n} {fp8 if n == '--kv-cache-dtype' else v}" for n, v in named if n)
