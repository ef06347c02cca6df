"""Whether llama.cpp's buffers fit a GPU, the most context and sequences that would, and flags that make them fit."""

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Final

from hfvram.answer.estimate import Fit, Way
from hfvram.answer.fit import LEAST_CTX, MOST_WAYS
from hfvram.answer.gpus import Gpu
from hfvram.answer.llama_options import planned
from hfvram.memory.serving.llama_cpp import LlamaPlan
from hfvram.model.identify import Model
from hfvram.request import Request

MOST_SEQUENCES: Final = 256
"""`LLAMA_MAX_SEQ`."""
Change = Callable[[Request], Request | None]


def verdict(model: Model, request: Request, gpu: Gpu, found: LlamaPlan) -> Fit:
    """Whether the buffers and the context fit; the longest context and the most sequences; flags with which they do."""
    capacity = gpu.memory_bytes
    fits = found.device_bytes <= capacity

    def taken(r: Request) -> int:
        return planned(model, r).device_bytes

    longest = max(request.ctx or 1, model.architecture.max_positions or 10**7)
    return Fit(
        gpu=gpu.name,
        capacity_bytes=capacity,
        fits=fits,
        headroom_bytes=capacity - found.device_bytes,
        max_ctx=largest(lambda n: taken(request.with_(ctx=n)) <= capacity, longest),
        max_batch=largest(lambda n: taken(request.with_(batch=n)) <= capacity, MOST_SEQUENCES),
        ways=() if fits else ways(model, request, capacity),
    )


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 on that fits, 0 where none does."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def ways(model: Model, request: Request, capacity: int) -> tuple[Way, ...]:
    """Changes of llama.cpp's flags, and pairs of them where neither alone is enough, the mildest first."""

    def taken(r: Request) -> int:
        return planned(model, r).device_bytes

    singles = list(_changes(model, request, lambda r: taken(r) <= capacity))
    enough: set[int] = set()
    found: list[Way] = []
    for count in (1, 2):
        for parts in combinations(range(len(singles)), count):
            if enough.intersection(parts):
                continue
            changed: Request | None = request
            for i in parts:
                changed = changed and singles[i](changed)
            if changed and (needed := taken(changed)) <= capacity:
                enough.update(parts if count == 1 else ())
                found.append(Way(change=flags(request, changed), device_bytes=needed))
    return tuple(found[:MOST_WAYS])


def _changes(model: Model, request: Request, fits: Callable[[Request], bool]) -> Iterator[Change]:
    """What could be changed, from what costs the least; one that is searched gives None where nothing fits so."""
    a = model.architecture
    if request.kv_dtype in ("f32", "f16", "bf16"):
        yield lambda r: r.with_(kv_dtype="q8_0")
    if a.moe:

        def experts(r: Request) -> Request | None:
            layers = len(a.text.layers)
            kept = largest(lambda n: fits(r.with_(n_cpu_moe=layers - n)), layers)
            moved = layers - kept
            return r.with_(n_cpu_moe=moved) if kept or fits(r.with_(n_cpu_moe=moved)) else None

        yield experts
    if model.checkpoint.gguf is None and request.quant in ("F32", "F16", "BF16", "Q8_0"):
        if request.quant != "Q8_0":
            yield lambda r: r.with_(quant="Q8_0")
        yield lambda r: r.with_(quant="Q4_K_M")

    def layers_on_gpu(r: Request) -> Request | None:
        most = len(a.text.layers) + 1
        n = largest(lambda k: fits(r.with_(n_gpu_layers=k)), min(most, r.n_gpu_layers or most))
        return r.with_(n_gpu_layers=n) if n or fits(r.with_(n_gpu_layers=0)) else None

    yield layers_on_gpu
    if (request.ctx or 0) > LEAST_CTX:

        def shorter(r: Request) -> Request | None:
            n = largest(lambda k: fits(r.with_(ctx=k)), r.ctx or LEAST_CTX)
            return r.with_(ctx=n // 256 * 256 or n) if n >= LEAST_CTX else None

        yield shorter


def flags(asked: Request, changed: Request) -> str:
    """The options that differ, as llama.cpp has them.

    >>> flags(Request(ctx=8192), Request(ctx=8192, kv_dtype="q8_0", n_gpu_layers=20))
    '-ctk q8_0 -ctv q8_0 -ngl 20'
    """
    words = []
    if asked.quant != changed.quant:
        words.append(f"--quant {changed.quant}")
    if asked.kv_dtype != changed.kv_dtype:
        words.append(f"-ctk {changed.kv_dtype} -ctv {changed.kv_dtype}")
    if asked.n_cpu_moe != changed.n_cpu_moe:
        words.append(f"--n-cpu-moe {changed.n_cpu_moe}")
    if asked.n_gpu_layers != changed.n_gpu_layers:
        words.append(f"-ngl {changed.n_gpu_layers}")
    if asked.ctx != changed.ctx:
        words.append(f"-c {(changed.ctx or 1) * changed.batch}")
    return " ".join(words)
