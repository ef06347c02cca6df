"""Weights as vLLM lays them out on one rank: fused, padded, sharded, in the order in which they are built.

Queries, keys and values are one tensor, and so are gate and up; these are sharded by rows, what follows them by
columns; embeddings and heads are padded to 64 rows for each rank; norms, routers and latent down-projections are
replicated. Source: vLLM 0.19.0, model_executor/layers/linear.py, vocab_parallel_embedding.py, models/*.py.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

from hfvram.errors import HfvramError
from hfvram.memory.forward import ELEMENT_BYTES
from hfvram.memory.serving.layers import kv_heads, split
from hfvram.memory.timeline import Standing, Tag
from hfvram.memory.weights import GROUP, PACKED, SCALES, param_bytes
from hfvram.model.architecture import Architecture, Stack
from hfvram.model.layers import Attention, FeedForward, LatentAttention, Layer, Mixer, MixtureOfExperts, Param
from hfvram.model.patterns import chosen
from hfvram.model.rope import RopeTable

VOCABULARY = 64
"""Rows to which a vocabulary is padded (vocab_parallel_embedding.py, DEFAULT_VOCAB_PADDING_SIZE)."""
Draft = tuple[Architecture, tuple[RopeTable, ...]]
"""A draft model, and its rotary tables."""
ROPE = Tag("rotary tables", "buffers", "", "vLLM 0.19.0: rotary_embedding/base.py, cos_sin_cache", "exact")
REPLICATED = ("kv_a_proj", "q_a_proj", "indexer")
"""Latent attention's projections that every rank has whole."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The layers `first` to before `last` of the main stack, of `layers`: what one rank of a pipeline holds."""

    first: int
    last: int
    layers: int

    @property
    def embeds(self) -> bool:
        return self.first == 0

    @property
    def heads(self) -> bool:
        return self.last == self.layers


def stages(layers: int, pp: int) -> list[Stage]:
    """The stages of a pipeline; layers left over go to the stages before the last, from there backwards.

    >>> [s.last - s.first for s in stages(30, 4)]
    [7, 8, 8, 7]

    Source: vLLM 0.19.0, distributed/utils.py, get_pp_indices.
    """
    if pp > layers:
        raise HfvramError("usage", f"--pp {pp} is more than the model's {layers} layers")
    sizes = [layers // pp] * pp
    for i in range(2, layers % pp + 2):
        sizes[-i] += 1
    starts = [sum(sizes[:i]) for i in range(pp)]
    return [Stage(start, start + size, layers) for start, size in zip(starts, sizes, strict=True)]


@lru_cache(maxsize=64)
def standing(
    a: Architecture, dtype: str, quant: str, tp: int, stage: Stage, rope: tuple[RopeTable, ...], pp: int = 1
) -> Standing:
    """Every tensor that stands on a rank of this stage before the pool is made."""
    left_alone = chosen(a.unquantized) if quant == a.quantization and a.unquantized else None
    tables = [(t.positions * t.dim * (4 if t.fp32 else ELEMENT_BYTES[dtype]), ROPE) for t in rope]
    tensors: list[tuple[int, Tag]] = []

    def add(params: Iterable[Param]) -> None:
        for p in params:
            method = "none" if left_alone and left_alone(p.name) else quant
            tensors.extend(parts(p, dtype, method))

    for stack in a.stacks:
        main = stack.name == a.main
        if not main and not stage.embeds:
            continue
        if stage.embeds or not main or (a.tied_head and pp > 1 and stage.heads):
            add(vocabulary(stack.before, a.vocab_size, tp, projectors=not main))
        for i, layer in enumerate(stack.layers):
            if i in stack.repeated or (main and not stage.first <= i < stage.last):
                continue
            add(_named(stack, i, sharded(layer, tp, quant)))
            if main and tables:
                tensors += tables
                tables = []
        if stage.heads or not main:
            add(vocabulary(stack.after, a.vocab_size, tp, projectors=not main))
    if stage.heads:
        add(vocabulary(a.head, a.vocab_size, tp))
    return Standing(tuple(tensors))


@lru_cache(maxsize=64)
def with_draft(target: Standing, draft: Draft | None, dtype: str, tp: int) -> Standing:
    """The tensors of a model, and after them those of the draft that speculates for it, sharded alike."""
    if draft is None:
        return target
    a, rope = draft
    count = len(a.text.layers)
    return Standing(target.tensors + standing(a, dtype, "none", tp, Stage(0, count, count), rope).tensors)


def vocabulary(params: Iterable[Param], rows: int, tp: int, projectors: bool = False) -> Iterator[Param]:
    """What stands around the layers: whatever has a row for each token is padded and sharded, and so are a tower's
    `projectors`.

    >>> [p.shape for p in vocabulary([Param("head", (50257, 768), "head")], 50257, 2)]
    [(25152, 768)]
    """
    for p in params:
        if p.kind in ("embedding", "head", "bias") and p.shape[0] == rows:
            yield replace(p, shape=(-(-rows // VOCABULARY) * VOCABULARY // tp, *p.shape[1:]))
        elif p.kind != "buffer":
            yield _share(p, tp) if projectors and _is_weight(p) else p


def parts(p: Param, dtype: str, quant: str) -> tuple[tuple[int, Tag], ...]:
    """The tensors that a parameter becomes: packed words, scales and what goes with them each for itself.

    GPTQ and AWQ, with groups of 128: n·bits/8 packed, 2 B a scale, bits/8 a zero point, and GPTQ's order of the inputs.
    FP8: one fp32 scale a tensor, or one for each row, is left out; blocks of 128 × 128 have one each.
    """
    packed = _is_weight(p) or p.kind == "experts"
    method, _, bits = quant.rpartition("-")
    if packed and bits.isdigit() and method in ("gptq", "awq", "int"):
        n, width = p.numel, int(bits)
        groups = -(-n // GROUP) if width < 8 else p.shape[0]
        sizes = [n * width // 8, groups * 2] + [groups * width // 8] * (method != "int")
        if method == "gptq":
            sizes.append(p.shape[-1] * 4)
        return tuple((size, PACKED) for size in sizes)
    if p.kind == "experts" and quant == "mxfp4" and "bias" not in p.name:
        return ((p.numel // 2, PACKED), (p.numel // 32, SCALES))
    if packed and quant == "fp8":
        return ((p.numel, PACKED), (-(-p.numel // GROUP**2) * 4, SCALES))
    return param_bytes(p, dtype, quant, True)


def sharded(layer: Layer, tp: int, quant: str = "none") -> list[Param]:
    """The tensors of a layer on one rank, fused."""
    found: list[Param] = []
    for mixer in layer.mixers:
        found += _mixer(mixer, tp)
    feed = layer.feed_forward
    if isinstance(feed, FeedForward):
        found += pair(feed.params, tp)
    elif feed:
        found += mixture(feed, tp, quant)
    return found + [p for p in layer.params if p.kind != "buffer"]


def _mixer(mixer: Mixer, tp: int) -> list[Param]:
    if isinstance(mixer, Attention):
        return attention(mixer, tp)
    if isinstance(mixer, LatentAttention):
        split(mixer.heads, tp, "attention heads")
        return latent(mixer.params, tp)
    return [_share(p, 1 if p.kind == "norm" else tp) for p in mixer.params if p.kind != "buffer"]


def attention(mixer: Attention, tp: int) -> list[Param]:
    """One projection for queries, keys and values, and the output's."""
    split(mixer.heads, tp, "attention heads")
    weights = [p for p in mixer.params if _is_weight(p)]
    if not weights:
        return list(mixer.params)
    biases = [p for p in mixer.params if p.kind == "bias"]
    inward, outward = (weights[:-1], weights[-1]) if len(weights) > 1 else (weights, None)
    narrow = kv_heads(mixer.kv_heads, tp) / mixer.kv_heads

    def rows(p: Param, i: int) -> int:
        if mixer.fused_qkv and len(inward) == 1:
            keys = min(mixer.kv_heads * (mixer.head_dim + mixer.value_dim), p.shape[0])
            return (p.shape[0] - keys) // tp + round(keys * narrow)
        return p.shape[0] // tp if i == 0 else round(p.shape[0] * narrow)

    fused = [replace(inward[0], shape=(sum(rows(p, i) for i, p in enumerate(inward)), *inward[0].shape[1:]))]
    within = [b for b in biases if not outward or b.name.rpartition(".")[0] != outward.name.rpartition(".")[0]]
    if within:
        fused.append(replace(within[0], shape=(sum(rows(b, i) for i, b in enumerate(within)),)))
    if outward:
        fused += [_share(outward, tp), *(b for b in biases if b not in within)]
    known = {*weights, *biases}
    return fused + [p for p in mixer.params if p not in known and p.kind != "buffer"]


def latent(params: Iterable[Param], tp: int) -> list[Param]:
    """Both down-projections are one tensor and whole on every rank; what is per head is sharded.

    The up-projection of keys and values is kept a second time, in the computing dtype, for products with it that go
    without it at each token (model_executor/layers/attention/mla_attention.py, W_UV and W_UK_T).
    """
    down = [p for p in params if _is_weight(p) and any(f".{n}" in p.name for n in REPLICATED[:2])]
    found = [replace(down[0], shape=(sum(p.shape[0] for p in down), down[0].shape[1]))] if down else []
    for p in params:
        if p not in down and p.kind != "buffer":
            found.append(_share(p, tp if _is_weight(p) and "indexer" not in p.name else 1))
            if "kv_b_proj" in p.name and _is_weight(p):
                found.append(replace(found[-1], kind="other"))
    return found


def pair(params: Iterable[Param], tp: int) -> list[Param]:
    """A feed-forward: gate and up as one tensor, and down."""
    params = tuple(params)
    weights = [p for p in params if _is_weight(p)]
    if len(weights) < 2:
        return [_share(p, tp) for p in params]
    up, down = weights[:-1], weights[-1]
    found = [replace(up[0], shape=(sum(p.shape[0] for p in up) // tp, *up[0].shape[1:])), _share(down, tp)]
    stem = down.name.rpartition(".")[0]
    for p in params:
        if p not in weights and p.kind != "buffer":
            found.append(_share(p, tp if p.kind == "bias" and p.name.rpartition(".")[0] != stem else 1))
    return found


def mixture(feed: MixtureOfExperts, tp: int, quant: str) -> list[Param]:
    """The experts, each sharded within; the router whole; the shared experts as one feed-forward.

    In MXFP4 a rank's part of the width is padded to 64 (fused_moe/oracle/mxfp4.py, the Triton kernels of Hopper).
    """
    width = -(-feed.intermediate_size // tp)
    width = -(-width // 64) * 64 if quant == "mxfp4" else width
    shared = [p for p in feed.params if p.kind not in ("experts", "buffer") and "shared" in p.name and p.shape[0] > 1]
    found: list[Param] = []
    for p in feed.params:
        if p.kind == "experts":
            whole = len(p.shape) == 2 and p.shape[1] == feed.hidden_size
            size = prod(p.shape[1:])
            found.append(p if whole else replace(p, shape=(p.shape[0], size * width // feed.intermediate_size)))
        elif p not in shared and p.kind != "buffer":
            found.append(p)
    return found + (pair(shared, tp) if shared else [])


def _share(p: Param, tp: int) -> Param:
    """A rank's part of a tensor. What does not divide is rounded up, as its last rank's part is padded."""
    if tp == 1:
        return p
    head = p.shape[0]
    return replace(p, shape=(-(-head // tp), *p.shape[1:])) if head >= tp else p


def _is_weight(p: Param) -> bool:
    return p.kind in ("linear", "linear_subclass") and len(p.shape) == 2


def _named(stack: Stack, i: int, params: Iterable[Param]) -> Iterator[Param]:
    return (replace(p, name=f"{stack.prefix}.{i}.{p.name}") for p in params)
