"""The tensors of a layer as vLLM fuses, pads and shards them over ranks.

Queries, keys and values are one tensor, and so are gate and up; these are sharded by rows, what follows them by
columns; embeddings and heads are padded to 64 rows for each rank; norms, routers and latent down-projections are
replicated. Source: vLLM 0.19.0, model_executor/layers/linear.py, vocab_parallel_embedding.py, models/*.py.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod

from hfvram.memory.serving.layers import kv_heads, split
from hfvram.model.layers import Attention, FeedForward, LatentAttention, Layer, Mixer, MixtureOfExperts, Param

VOCABULARY = 64
"""Rows to which a vocabulary is padded (vocab_parallel_embedding.py, DEFAULT_VOCAB_PADDING_SIZE)."""
REPLICATED = ("kv_a_proj", "q_a_proj", "indexer")
"""Latent attention's projections that every rank has whole."""


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
            yield _share(p, tp) if projectors and is_weight(p) else p


def sharded(layer: Layer, tp: int, quant: str = "none", ep: int = 1) -> list[Param]:
    """The tensors of a layer on one rank, fused."""
    found: list[Param] = []
    for mixer in layer.mixers:
        found += _mixer(mixer, tp)
    feed = layer.feed_forward
    if isinstance(feed, FeedForward):
        found += pair(feed.params, tp)
    elif feed:
        found += mixture(feed, tp, quant, ep)
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
    weights = [p for p in mixer.params if is_weight(p)]
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
    down = [p for p in params if is_weight(p) and any(f".{n}" in p.name for n in REPLICATED[:2])]
    found = [replace(down[0], shape=(sum(p.shape[0] for p in down), down[0].shape[1]))] if down else []
    for p in params:
        if p not in down and p.kind != "buffer":
            found.append(_share(p, tp if is_weight(p) and "indexer" not in p.name else 1))
            if "kv_b_proj" in p.name and is_weight(p):
                found.append(replace(found[-1], kind="other"))
    return found


def pair(params: Iterable[Param], tp: int) -> list[Param]:
    """A feed-forward: gate and up as one tensor, and down."""
    params = tuple(params)
    weights = [p for p in params if is_weight(p)]
    if len(weights) < 2:
        return [_share(p, tp) for p in params]
    up, down = weights[:-1], weights[-1]
    found = [replace(up[0], shape=(sum(p.shape[0] for p in up) // tp, *up[0].shape[1:])), _share(down, tp)]
    stem = down.name.rpartition(".")[0]
    for p in params:
        if p not in weights and p.kind != "buffer":
            found.append(_share(p, tp if p.kind == "bias" and p.name.rpartition(".")[0] != stem else 1))
    return found


def mixture(feed: MixtureOfExperts, tp: int, quant: str, ep: int = 1) -> list[Param]:
    """The experts, each sharded within; the router whole; the shared experts as one feed-forward.

    Of `ep` data parallel ranks each has its share of the experts: with `tp` ranks in each, whole ones in the end, of
    the same size (fused_moe/config.py, FusedMoEParallelConfig.make).

    In MXFP4 a rank's part of the width is padded to 64 (fused_moe/oracle/mxfp4.py, the Triton kernels of Hopper).
    """
    width = -(-feed.intermediate_size // tp)
    width = -(-width // 64) * 64 if quant == "mxfp4" else width
    shared = [p for p in feed.params if p.kind not in ("experts", "buffer") and "shared" in p.name and p.shape[0] > 1]
    found: list[Param] = []
    for p in feed.params:
        if p.kind == "experts":
            p = replace(p, shape=(-(-p.shape[0] // ep), *p.shape[1:]))
            whole = len(p.shape) == 2 and p.shape[1] == feed.hidden_size
            found.append(p if whole else _narrowed(p, width, feed.intermediate_size))
        elif p not in shared and p.kind != "buffer":
            found.append(p)
    return found + (pair(shared, tp) if shared else [])


def _narrowed(p: Param, width: int, whole: int) -> Param:
    """Experts with a rank's `width` of their `whole` one, in the dimension that has it."""
    sizes = p.shape[1:]
    at = next((i for i, n in enumerate(sizes) if n in (whole, 2 * whole)), None)
    if at is None:
        return replace(p, shape=(p.shape[0], prod(sizes) * width // whole))
    return replace(p, shape=(p.shape[0], *(n * width // whole if i == at else n for i, n in enumerate(sizes))))


def _share(p: Param, tp: int) -> Param:
    """A rank's part of a tensor. What does not divide is rounded up, as its last rank's part is padded."""
    if tp == 1:
        return p
    head = p.shape[0]
    return replace(p, shape=(-(-head // tp), *p.shape[1:])) if head >= tp else p


def is_weight(p: Param) -> bool:
    """Whether it is a linear layer's matrix."""
    return p.kind in ("linear", "linear_subclass") and len(p.shape) == 2
