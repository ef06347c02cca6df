"""What a serving engine takes for a request: its plan as an `Estimate`."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from hfvram import __version__
from hfvram.answer import guide
from hfvram.answer.estimate import Estimate, Interval, Item, Recommended, Serving
from hfvram.answer.facts import facts, guide_items
from hfvram.answer.gpus import Gpu, fewest
from hfvram.answer.items import ROUNDING, in_numbers
from hfvram.answer.recommending import COUNTS, over, told
from hfvram.answer.serving_fit import device_bytes, verdict
from hfvram.answer.serving_options import NAMES, asked_for, plan, resolve
from hfvram.errors import HfvramError
from hfvram.memory.serving import MODELLED
from hfvram.memory.serving.plan import Plan
from hfvram.model.identify import Model
from hfvram.request import Request
from hfvram.units import GiB, gib

SLACK_BYTES: Final = GiB // 2
LAYER: Final = "the sampler's logits or the widest layer, whichever is more"
PAGED: Final = "logits in fp32 or all keys and values read, whichever is more, with inputs and mask"
FILES: Final = {
    "vllm": ("v1/core/kv_cache_utils.py", "v1/worker/gpu_model_runner.py"),
    "sglang": ("mem_cache", "model_runner"),
    "transformers": ("continuous_batching/cache.py", "continuous_batching/cache.py"),
}
"""Where each engine makes its pool, and runs the model."""
BASIS: Final = "activations, CUDA graphs and NCCL of 34 runs of vLLM 0.19 on H100: ±0.5 GiB"


def estimate(model: Model, asked: Request, gpu: Gpu | None) -> Estimate:
    """The answer, with the verdict where a GPU is named. Raises `usage`."""
    if model.components:
        raise HfvramError("usage", f"--engine {asked.engine} runs no pipeline of several models")
    request, notes = resolve(model, asked)
    found = plan(model, request, gpu)
    requests = asked_for(request)
    needed = found.cache_bytes(requests)
    items = tuple(_items(found, needed))
    allocated = sum(i.bytes for i in items)
    reserved = allocated + found.graph_bytes
    device = device_bytes(found, needed)
    if found.room_bytes is not None and found.room_bytes <= 0:
        notes.append(f"{NAMES[request.engine]} has no room for a cache: it is {gib(-found.room_bytes)} short")
    if gpu is None:
        notes.append("the pool takes what a GPU leaves: --gpu says how much")
    return Estimate(
        model=facts(model),
        request=request,
        method="formula",
        versions={"hfvram": __version__, request.engine: MODELLED[request.engine]},
        items=items,
        peak_phase="serving",
        weights_bytes=found.loaded_bytes,
        cache_bytes=needed,
        gradients_bytes=0,
        optimizer_bytes=0,
        activations_bytes=found.activation_bytes,
        peak_allocated_bytes=allocated,
        peak_reserved_bytes=reserved,
        device_bytes=device,
        interval=_interval(request.engine, device),
        guide=guide.rule(guide_items(model, request)),
        serving=serving(found, request),
        fit=verdict(model, request, gpu, found) if gpu else None,
        recommended=_recommended(model, request) if request.recommend else (),
        warnings=(*model.warnings, *notes, *found.notes),
    )


def serving(found: Plan, request: Request) -> Serving:
    """The pool's figures as the engine prints them, and what it is made of."""
    first = found.pools[0] if found.pools else None
    concurrency = found.concurrency(request.ctx or 1)
    return Serving(
        kv_bytes_per_token=found.bytes_a_token,
        kv_pool_bytes=found.pool_bytes,
        kv_tokens=found.tokens,
        max_concurrency=None if concurrency is None else round(concurrency, 2),
        waste_bytes=found.waste_bytes(asked_for(request)),
        blocks=first.units if first else None,
        block_bytes=first.unit_bytes if first else 0,
        sliding_bytes=next((p.unit_bytes for p in found.pools if p.name == "sliding tokens"), 0),
        state_bytes=next((p.unit_bytes for p in found.pools if p.name == "states"), 0),
        state_slots=next((p.units for p in found.pools if p.name == "states"), None),
        loaded_bytes=found.loaded_bytes,
        activation_bytes=found.activation_bytes,
        non_torch_bytes=found.non_torch_bytes,
        graph_bytes=found.graph_bytes,
    )


def _interval(engine: str, device: int) -> Interval:
    """vLLM's by its logs; of SGLang no log says the whole."""
    if engine == "vllm":
        return Interval(low_bytes=max(0, device - SLACK_BYTES), high_bytes=device + SLACK_BYTES, basis=BASIS)
    return Interval(
        low_bytes=int(device * 0.9), high_bytes=int(device * 1.1), basis="no measured case is like this one: ±10 %"
    )


def _recommended(model: Model, request: Request) -> tuple[Recommended, ...]:
    """The smallest GPUs on which the engine's pool holds the requests, and how many."""
    alone = request.with_(gpu=None)

    def runs(gpu: Gpu, gpus: int) -> bool:
        changed = over(alone, gpus)
        try:
            return changed is not None and plan(model, changed, gpu).holds(asked_for(changed))
        except HfvramError:
            return False

    given = request.gpus or 1
    found = fewest(runs, COUNTS if given == 1 else (given,))
    return tuple(told(alone, gpu, gpus, over(alone, gpus) or alone) for gpu, gpus in found)


def _items(found: Plan, needed: int) -> Iterator[Item]:
    """Weights, rounding, activations and the pools, which add up to what is allocated."""
    project = f"{NAMES[found.engine]} {MODELLED[found.engine]}"
    standing = found.standing.bytes_by_tag
    rounding = found.loaded_bytes - sum(standing.values())
    made = [
        Item(
            name=tag.name,
            category=tag.category,
            bytes=total,
            formula=in_numbers(tag, total, 0, {}),
            source=tag.source,
            certainty=tag.certainty,
        )
        for tag, total in standing.items()
    ]
    for pool in found.pools:
        made.append(
            Item(
                name=f"cache: {pool.name}",
                category="cache",
                bytes=pool.pool_bytes if found.room_bytes is not None else needed,
                formula=pool.formula if pool.units is None else f"{pool.units:,} {pool.name}, {pool.formula}",
                source=f"{project}: {FILES[found.engine][0]}",
                certainty="exact" if pool.units is None else "calibrated",
            )
        )
        if found.room_bytes is None:
            break
    made.append(
        Item(
            name="activations",
            category="activations",
            bytes=found.activation_bytes,
            formula=PAGED if found.engine == "transformers" else LAYER,
            source=f"{project}: {FILES[found.engine][1]}",
            certainty="calibrated" if found.engine == "vllm" else "guess",
        )
    )
    yield from sorted(made, key=lambda item: -item.bytes)
    if rounding:
        yield replace(ROUNDING, bytes=rounding)
