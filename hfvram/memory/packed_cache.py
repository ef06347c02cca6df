"""transformers' quantized and offloaded caches without gradients: what a layer keeps, and what it holds for a moment.

n = b·t·a_kv·d values of keys, or of values, in e bytes each. A quantized cache packs whatever the prompt was, and again
all of it each time that 128 tokens came after; of every 64 values a scale and a shift stay in the computing dtype. An
offloaded one has a layer's keys and values in CPU memory but while it runs, and while the layer before it does.
Source: transformers 5.17, cache_utils.py (`QuantizedLayer`, `Cache.update`, `prefetch`, `offload`); optimum-quanto
0.2.7, tensor/optimizers/max_optimizer.py, tensor/packed.py, tensor/qbits.py; HQQ 0.2.8, core/quantize.py (8 bits).
"""

from typing import Final

from hfvram.memory.allocator import PREFETCH
from hfvram.memory.forward import Forward
from hfvram.memory.timeline import Tag, Timeline

UTILS: Final = "transformers 5.17: cache_utils.py"
QUANTIZER: Final = "optimum-quanto 0.2.7: quantize_weight, QBitsTensor.dequantize; HQQ 0.2.8 for 8 bits"
CODES: Final = Tag("keys and values, packed", "cache", "b·t·a_kv·d·bits/8", QUANTIZER, "exact")
SCALES: Final = Tag("scales and shifts of the cache", "cache", "b·t·a_kv·d/64·e", QUANTIZER, "exact")
RECENT: Final = Tag("keys and values of recent tokens", "cache", "b·t·a_kv·d·e", UTILS, "exact")
WHOLE: Final = Tag("keys and values, unpacked", "activations", "b·t·a_kv·d·e", QUANTIZER)
PACKING: Final = Tag("packing keys and values", "activations", "b·t·a_kv·d·e", QUANTIZER)
FETCHED: Final = Tag("keys and values of the next layer", "cache", "b·t·a_kv·d·e", UTILS, "exact")
AWAY: Final = Tag("keys and values", "cache", "b·t·a_kv·d·e", UTILS, "exact")

GROUP: Final = 64
PARTS: Final = 3
"""Of packed keys, or values: codes, scales, shifts. A layer has both, and behind them those that are not packed."""
RESIDUAL: Final = 128
"""Tokens that are kept as they are, at most (`residual_length`)."""


class LayerCache(list[int]):
    """The handles of a layer's cache on the GPU; what of it is in CPU memory, and whose turn is next."""

    __slots__ = ("away", "following")

    def __init__(self) -> None:
        super().__init__()
        self.away: tuple[int, ...] = ()
        self.following: LayerCache | None = None


def chain(count: int) -> list[list[int]]:
    """The caches of as many layers, the first of which follows the last."""
    caches = [LayerCache() for _ in range(count)]
    for i, cache in enumerate(caches):
        cache.following = caches[(i + 1) % count]
    return list(caches)


def grow_offloaded(t: Timeline, cache: LayerCache, sizes: tuple[int, int]) -> list[int]:
    """Fetch the next layer's keys and values, append the new ones to this one's. Returns what attention still reads.

    What is fetched comes from the pool of a stream of its own.
    """
    following = cache.following
    if following is not None and following.away and not following:
        following += [t.alloc(n, FETCHED) for n in following.away]
        t.streams.update(dict.fromkeys(following, PREFETCH))
    grown = []
    for i, size in enumerate(sizes):
        grown.append(t.alloc(size, AWAY))
        t.free(*cache[i : i + 1])
    cache.clear()
    cache.away = sizes
    return grown


def packed_tokens(past: int, decoded: int) -> tuple[int, int]:
    """Of `past` tokens, the last `decoded` one by one: how many are packed, and how many are not.

    >>> packed_tokens(1000, 0), packed_tokens(1127, 127), packed_tokens(1128, 128), packed_tokens(1129, 129)
    ((1000, 0), (1000, 127), (1128, 0), (1128, 1))
    """
    recent = decoded % RESIDUAL
    return past - recent, recent


def grow_quantized(t: Timeline, f: Forward, cache: list[int], rows: tuple[int, int]) -> list[int]:
    """Keys and values with the new tokens, `rows` bytes of each token. Returns what attention reads, to be freed.

    At first those are the new ones themselves, and they are packed; later all are unpacked and joined, and when enough
    came, packed anew.
    """
    if not cache:
        for row in rows:
            contiguous = t.alloc(row * f.tokens, PACKING)
            cache += _pack(t, f, row * f.tokens)
            t.free(contiguous)
        cache += [t.alloc(0, RECENT) for _ in rows]
        return []
    packed, recent = packed_tokens(f.past, f.decoded)
    whole = [_unpack(t, f, row * packed) for row in rows]
    joined = [t.alloc(row * (f.past + f.tokens), WHOLE) for row in rows]
    full = recent + 1 >= RESIDUAL
    for i, row in enumerate(rows if full else ()):
        new = _pack(t, f, row * (f.past + f.tokens))
        t.free(*cache[i * PARTS : (i + 1) * PARTS])
        cache[i * PARTS : (i + 1) * PARTS] = new
    for i, row in enumerate(rows, 2 * PARTS):
        fresh = t.alloc(0 if full else row * (recent + f.tokens), RECENT)
        t.free(cache[i])
        cache[i] = fresh
    t.free(*whole)
    return joined


def _pack(t: Timeline, f: Forward, nbytes: int) -> list[int]:
    """Codes and the scales and shifts that go with them."""
    e = f.element_bytes
    groups = nbytes // e // GROUP
    if f.cache_bits == 8:  # HQQ computes in fp32: the values, scaled, rounded
        t.moment(PACKING, *[nbytes // e * 4] * 3)
        return [t.alloc(groups * GROUP, CODES), t.alloc(groups * e, SCALES), t.alloc(groups * e, SCALES)]
    low, high = t.alloc(groups * e, PACKING), t.alloc(groups * e, PACKING)
    t.moment(PACKING, groups * e)
    scales = [t.alloc(groups * e, SCALES) for _ in range(2)]
    shifted = t.alloc(nbytes, PACKING)
    scaled = t.alloc(nbytes, PACKING)
    t.free(shifted)
    rounded = t.alloc(nbytes, PACKING)
    t.free(scaled)
    clamped = t.alloc(nbytes, PACKING)
    t.free(rounded)
    codes = t.alloc(groups * GROUP, PACKING)
    t.free(clamped)
    packed = t.alloc(-(-groups // 2) * GROUP, CODES)
    t.moment(PACKING, groups // 2 * GROUP)
    t.free(codes, low, high)
    return [packed, *scales]


def _unpack(t: Timeline, f: Forward, nbytes: int) -> int:
    """The values, of the codes each for itself."""
    codes = t.alloc(nbytes // f.element_bytes, WHOLE)
    values = t.alloc(nbytes, WHOLE)
    t.free(codes)
    return values
