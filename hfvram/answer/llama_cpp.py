"""What llama.cpp takes for a request: its buffers as an `Estimate`."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from hfvram import __version__
from hfvram.answer import guide
from hfvram.answer.estimate import Estimate, Interval, Item, Offloaded, Recommended, Serving
from hfvram.answer.facts import facts, guide_items
from hfvram.answer.gpus import Gpu, recommend
from hfvram.answer.items import ROUNDING
from hfvram.answer.llama_fit import verdict
from hfvram.answer.llama_options import ENGINE, options, planned, resolve
from hfvram.errors import HfvramError
from hfvram.memory.serving import MODELLED
from hfvram.memory.serving.llama_cache import Cache
from hfvram.memory.serving.llama_cpp import CONTEXT_BYTES, LARGEST_CONTEXT_BYTES, LlamaPlan
from hfvram.memory.timeline import Certainty
from hfvram.model.identify import Model
from hfvram.read.checkpoint import StoredTensor
from hfvram.request import Request
from hfvram.units import gib

PROJECT: Final = f"llama.cpp {MODELLED[ENGINE]}"
BASIS: Final = "weights and cache are exact; compute buffers differ between builds, the context between GPUs: a guess"
CACHE_SOURCES: Final = {
    "sliding window": "llama-kv-cache-iswa.cpp",
    "recurrent states": "llama-memory-recurrent.cpp",
    "indexer": "llama-kv-cache-dsa.cpp",
}
MOST_TYPES: Final = 4
"""Types of weights that are items of their own."""


def estimate(model: Model, asked: Request, gpu: Gpu | None) -> Estimate:
    """The answer, with the verdict where a GPU is named. Raises `usage`."""
    if model.components:
        raise HfvramError("usage", "--engine llama.cpp runs no pipeline of several models")
    request, notes = resolve(model, asked)
    found = planned(model, request)
    exact = model.checkpoint.gguf is not None
    items = tuple(_items(found, request, "exact" if exact else "derived"))
    allocated = sum(i.bytes for i in items)
    kept = found.gpu_caches + found.cpu_caches
    offloaded = tuple(_offloaded(found, request, "exact" if exact else "derived"))
    beside = allocated - found.compute_bytes
    return Estimate(
        model=facts(model),
        request=request,
        method="formula",
        versions={"hfvram": __version__, ENGINE: MODELLED[ENGINE]},
        items=items,
        peak_phase="serving",
        weights_bytes=sum(t.nbytes for t in (*found.on_gpu, *found.on_cpu)) - found.copied_bytes,
        cache_bytes=sum(c.nbytes for c in kept),
        gradients_bytes=0,
        optimizer_bytes=0,
        activations_bytes=found.compute_bytes,
        peak_allocated_bytes=allocated,
        peak_reserved_bytes=allocated,
        device_bytes=found.device_bytes,
        cpu_bytes=sum(x.bytes for x in offloaded),
        offloaded=offloaded,
        interval=Interval(
            low_bytes=beside + found.compute_low_bytes + CONTEXT_BYTES * 3 // 4,
            high_bytes=beside + found.compute_high_bytes + LARGEST_CONTEXT_BYTES,
            basis=BASIS,
        ),
        guide=guide.rule(guide_items(model, request)),
        serving=_serving(found),
        fit=verdict(model, request, gpu, found) if gpu else None,
        recommended=tuple(Recommended(gpu=g.name, capacity_bytes=g.memory_bytes) for g in recommend(found.device_bytes))
        if request.recommend
        else (),
        warnings=(*model.warnings, *notes),
    )


def _serving(found: LlamaPlan) -> Serving:
    """What a cell takes in all layers: bytes of a token in those that see all, of one within a window, of a state."""
    sums: Counter[str] = Counter()
    cells: dict[str, int] = {}
    for c in found.gpu_caches + found.cpu_caches:
        sums[c.kind] += c.cell_bytes
        cells[c.kind] = c.cells
    full = sums["full attention"] + sums["latent attention"] + sums["indexer"]
    window, state = sums["sliding window"], sums["recurrent states"]
    tokens = next((cells[k] for k in ("full attention", "latent attention", "sliding window") if k in cells), None)
    return Serving(
        kv_bytes_per_token=full or window,
        kv_pool_bytes=None,
        kv_tokens=tokens,
        max_concurrency=None,
        waste_bytes=0,
        blocks=None,
        block_bytes=full,
        sliding_bytes=window,
        state_bytes=state,
        state_slots=cells.get("recurrent states"),
        loaded_bytes=found.weights_bytes,
        activation_bytes=found.compute_bytes,
        non_torch_bytes=CONTEXT_BYTES,
        graph_bytes=0,
    )


def _items(found: LlamaPlan, request: Request, certainty: Certainty) -> Iterator[Item]:
    """Weights by type, caches by kind, the compute buffer, and what alignment adds."""
    made = [_weights(name, these, certainty) for name, these in by_type(found.on_gpu)]
    for kind, these in by_kind(found.gpu_caches):
        made.append(
            Item(
                name=f"cache: {kind}",
                category="cache",
                bytes=sum(c.nbytes for c in these),
                formula=_cells(kind, these, request),
                source=f"{PROJECT}: src/{CACHE_SOURCES.get(kind, 'llama-kv-cache.cpp')}",
                certainty="exact",
            )
        )
    made.append(
        Item(
            name="compute buffer",
            category="activations",
            bytes=found.compute_bytes,
            formula=f"masks and the widest layer for {options(request).cells.ubatch:,} tokens at a time; "
            f"by build {gib(found.compute_low_bytes)} to {gib(found.compute_high_bytes)}, then with all logits",
            source=f"{PROJECT}: src/llama-context.cpp",
            certainty="guess",
        )
    )
    yield from sorted(made, key=lambda item: -item.bytes)
    if found.padding_bytes:
        words = "each tensor begins at 128 bytes, quantized rows are padded to 512"
        source = f"{PROJECT}: ggml/src/ggml-cuda/ggml-cuda.cu"
        yield replace(ROUNDING, bytes=found.padding_bytes, formula=words, source=source, certainty=certainty)


def _weights(name: str, these: Sequence[StoredTensor], certainty: Certainty) -> Item:
    source = "the file's header" if certainty == "exact" else f"{PROJECT}: src/llama-quant.cpp"
    total = sum(t.nbytes for t in these)
    words = f"{len(these):,} tensor{'s' if len(these) > 1 else ''}"
    return Item(name=name, category="weights", bytes=total, formula=words, source=source, certainty=certainty)


def by_type(tensors: Iterable[StoredTensor]) -> list[tuple[str, list[StoredTensor]]]:
    """Weights by their type, the largest first, the smallest together."""
    groups: dict[str, list[StoredTensor]] = {}
    for t in tensors:
        of_projector = t.name.startswith(("v.", "a.", "mm."))
        groups.setdefault("projector" if of_projector else f"weights: {t.dtype}", []).append(t)
    ordered = sorted(groups.items(), key=lambda g: -sum(t.nbytes for t in g[1]))
    few = ordered[:MOST_TYPES]
    rest = [t for _, these in ordered[MOST_TYPES:] for t in these]
    return few + ([("weights: other types", rest)] if rest else [])


def by_kind(caches: Iterable[Cache]) -> list[tuple[str, list[Cache]]]:
    """Caches by their kind."""
    groups: dict[str, list[Cache]] = {}
    for c in caches:
        groups.setdefault(c.kind, []).append(c)
    return list(groups.items())


def _cells(kind: str, these: Sequence[Cache], request: Request) -> str:
    """`8,192 cells × 32 layers × 4,096 B`, where all layers are alike."""
    sizes = {c.cell_bytes for c in these}
    what = "states" if kind == "recurrent states" else "cells"
    dtype = "f32" if kind == "recurrent states" else request.kv_dtype
    each = f"{these[0].cell_bytes:,} B" if len(sizes) == 1 else f"{min(sizes):,} to {max(sizes):,} B"
    layers = f"{len(these):,} layer{'s' if len(these) > 1 else ''}"
    return f"{these[0].cells:,} {what} × {layers} × {each} ({dtype})"


def _offloaded(found: LlamaPlan, request: Request, certainty: Certainty) -> Iterator[Offloaded]:
    """What is in CPU memory: the embedding, experts, layers, their caches."""
    groups: dict[str, list[StoredTensor]] = {}
    for t in found.on_cpu:
        name = "experts" if "_exps" in t.name else "layers" if t.name.startswith("blk.") else "input embedding"
        name = "output layer" if t.name.startswith("output") else name
        groups.setdefault(name, []).append(t)
    for name, these in groups.items():
        item = _weights(name, these, certainty)
        yield Offloaded(
            name=name, category="weights", place="cpu", bytes=item.bytes, formula=item.formula, source=item.source,
            certainty=certainty,
        )  # fmt: skip
    for kind, caches in by_kind(found.cpu_caches):
        yield Offloaded(
            name=f"cache: {kind}", category="cache", place="cpu", bytes=sum(c.nbytes for c in caches),
            formula=_cells(kind, caches, request), source=f"{PROJECT}: src/llama-kv-cache.cpp", certainty="exact",
        )  # fmt: skip
