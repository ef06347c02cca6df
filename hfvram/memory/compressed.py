"""Attention of DeepSeek-V4 without gradients: a window of shared vectors, compressed entries of all that is older, and
the indexer that chooses among them. transformers computes it with every score written out.

b sequences of s new tokens, a heads of size d, r tokens to an entry, T = t ÷ r entries, a_i index heads of size d_i,
e bytes of an element. Source: transformers 5.17, models/deepseek_v4/modeling_deepseek_v4.py (`DeepseekV4Attention`,
`DeepseekV4CSACompressor`, `DeepseekV4Indexer`, `DeepseekV4HCACache`); checked event by event on the meta device.
"""

from hfvram.memory.attention import stored_tokens
from hfvram.memory.blocks import HIDDEN, ROTARY, normalize, project
from hfvram.memory.forward import Forward
from hfvram.memory.scores import eager_weights
from hfvram.memory.timeline import Tag, Timeline
from hfvram.model.layers import Attention, CompressedAttention

V4 = "transformers 5.17: DeepseekV4Attention.forward"
STATES = "transformers 5.17: DeepseekV4HCACache, DeepseekV4CSACache"
QUERY = Tag("queries", "activations", "b·s·a·d·e", V4)
SHARED = Tag("keys that are values too", "cache", "b·t·d·e", STATES, "exact")
ENTRIES = Tag("compressed entries and what waits for them", "cache", "b·t·d·e", STATES, "exact")
COUNTER = Tag("counters of the cache", "cache", "", STATES, "exact")
COMPRESSOR = Tag("compressor", "activations", "b·s·d·e", "transformers 5.17: DeepseekV4CSACompressor.forward")
INDEX = Tag("indexer's scores", "activations", "b·s·a_i·T·4", "transformers 5.17: DeepseekV4IndexerScorer.forward")
ALL_KEYS = Tag("keys of the window and of the entries", "activations", "b·(t+T)·d·e", V4)
OUT = Tag("attention output", "activations", "b·s·a·d·e", V4)


def window(part: CompressedAttention) -> Attention:
    """Its attention over the window alone, as the mask and the scores see it."""
    return Attention(
        kind="sliding_attention",
        hidden_size=part.hidden_size,
        heads=part.heads,
        kv_heads=1,
        head_dim=part.head_dim,
        value_dim=part.head_dim,
        window=part.window,
        sinks=True,
        implementations=("eager",),
        params=(),
    )


def compressed_attention(t: Timeline, f: Forward, part: CompressedAttention, cache: list[int]) -> tuple[int, list[int]]:
    """One layer's attention. Returns its output's handle and the weights', which the layer keeps to its end."""
    queries = f.bytes(part.heads * part.head_dim)
    share = part.rotary_dim / part.head_dim
    down = t.alloc(f.bytes(part.q_lora_rank), QUERY)
    held = [normalize(t, f, part.q_lora_rank, "rms", QUERY)]
    t.free(down)
    query = _rotated(t, _scaled(t, f, queries), int(queries * share))
    fresh = t.alloc(f.bytes(part.head_dim), QUERY)
    normed = normalize(t, f, part.head_dim, "rms", QUERY)
    t.free(fresh)
    grow_compressed(t, f, part, cache)
    t.free(normed)
    held.append(query)
    entries = (f.past + f.tokens) // part.rate if part.rate else 0
    if part.rate and f.tokens > 1:
        _compress(t, f, part, entries)
    attended = stored_tokens(window(part), f.past, f.tokens) + entries
    if part.rate:
        held.append(t.alloc(f.batch * attended * part.head_dim * f.element_bytes, ALL_KEYS))
        held.append(t.alloc(f.rows * attended * f.element_bytes, ALL_KEYS))  # the mask, with the entries'
    # One head for all is a view of itself, but of several sequences the product needs a copy for each head.
    if f.batch > 1:
        t.moment(ALL_KEYS, f.batch * attended * part.heads * part.head_dim * f.element_bytes)
    weights, beside, _ = eager_weights(t, f, window(part), f.batch * part.heads * f.tokens * attended)
    heads_first = t.alloc(queries, OUT)
    out = t.alloc(queries, OUT)
    t.free(heads_first, *beside)
    turned = _rotated(t, out, int(queries * share))
    grouped, narrow = t.alloc(queries, OUT), f.bytes(part.output_groups * part.output_lora_rank)
    low = t.alloc(narrow, OUT)
    joined = t.alloc(narrow, OUT)
    t.free(low, grouped)
    projected = project(t, f, part.output_groups * part.output_lora_rank, part.hidden_size, HIDDEN)
    t.free(turned, joined, *held)
    return projected, [weights]


def grow_compressed(t: Timeline, f: Forward, part: CompressedAttention, cache: list[int]) -> None:
    """The layer's cache after `f.tokens` more: a tensor whose size changed is a new one, its old one freed after it."""
    wanted = cache_sizes(part, f)
    tags = [SHARED, COUNTER, *[ENTRIES if part.rate else SHARED] * (len(wanted) - 2)]
    if not cache:
        cache += [t.alloc(n, tag) for n, tag in zip(wanted, tags, strict=True)]
        return
    for i, (n, tag) in enumerate(zip(wanted, tags, strict=True)):
        if t.sizes[cache[i]] != n:
            new = t.alloc(n, tag)
            t.free(cache[i])
            cache[i] = new


def cache_sizes(part: CompressedAttention, f: Forward) -> list[int]:
    """Bytes of every tensor that a layer's cache holds once `f.tokens` follow `f.past`.

    The window's vectors; then for the compressor, and for the indexer, the projections (values and gates) of the tokens
    since the last whole entry, of which a prefill keeps all that it computed, the entries, and where entries overlap
    the last window's half of both.
    """
    row = f.batch * f.element_bytes
    vectors = row * stored_tokens(window(part), f.past, f.tokens) * part.head_dim
    if not part.rate:
        return [vectors, 8, vectors]  # a plain window's cache keeps keys and values apart, though they are alike
    sizes = [vectors, 8]
    total, waiting = f.past + f.tokens, f.past % part.rate + f.tokens
    overlaps = part.index_heads > 0
    for dim in (part.head_dim, part.index_head_dim)[: 1 + overlaps]:
        series = dim * (1 + overlaps)
        sizes += [row * waiting * series, row * waiting * series, row * (total // part.rate) * dim]
        if overlaps:
            half = row * part.rate * dim if total >= part.rate else 0
            sizes += [half, half]
    return sizes


def _scaled(t: Timeline, f: Forward, nbytes: int) -> int:
    """The queries' projection, divided by its root mean square, which fp32 copies are made for."""
    wide = nbytes // f.element_bytes * 4
    raw = t.alloc(nbytes, QUERY)
    t.moment(QUERY, wide, wide)
    scaled = t.alloc(nbytes, QUERY)
    t.free(raw)
    return scaled


def _rotated(t: Timeline, source: int, rotated: int) -> int:
    """The last part of every head is turned in fp32 and joined to the rest by a copy; `source` is freed."""
    wide, nbytes = 2 * rotated, t.sizes[source]
    scaled = t.alloc(wide, ROTARY)
    t.moment(ROTARY, wide, rotated)
    sine = t.alloc(wide, ROTARY)
    total = t.alloc(wide, ROTARY)
    t.free(scaled, sine)
    cast = t.alloc(rotated, ROTARY)
    t.free(total)
    out = t.alloc(nbytes, QUERY)
    t.free(cast, source)
    return out


def _compress(t: Timeline, f: Forward, part: CompressedAttention, entries: int) -> None:
    """Gates are biased, their softmax in fp32 weights the values; with overlap both are laid out twice as long."""
    if not part.index_heads:
        nbytes = f.bytes(part.head_dim)
        t.moment(COMPRESSOR, nbytes, 2 * nbytes, 2 * nbytes)
        return
    nbytes = f.bytes(2 * part.head_dim)
    held = [t.alloc(nbytes, COMPRESSOR) for _ in range(3)]
    t.moment(COMPRESSOR, 2 * nbytes, 2 * nbytes)
    _index(t, f, part, entries)
    t.free(*held)


def _index(t: Timeline, f: Forward, part: CompressedAttention, entries: int) -> None:
    """Every index head scores all entries in fp32: three such tensors at once; the best of each token are kept."""
    nbytes = f.bytes(part.index_heads * part.index_head_dim)
    query = _rotated(t, t.alloc(nbytes, INDEX), int(nbytes * part.rotary_dim / part.index_head_dim))
    wide = [t.alloc(nbytes // f.element_bytes * 4, INDEX)]
    if f.batch > 1:  # of several sequences, the product is given the keys copied for each token
        wide.append(t.alloc(f.rows * part.index_head_dim * entries * 4, INDEX))
    scores = f.rows * part.index_heads * entries * 4
    product = t.alloc(scores, INDEX)
    t.free(*wide)
    positive = t.alloc(scores, INDEX)
    scaled = t.alloc(scores, INDEX)
    t.free(positive, product)
    weighted = t.alloc(scores, INDEX)
    total = t.alloc(f.rows * entries * 4, INDEX)
    t.free(weighted, scaled)
    chosen = f.rows * min(part.index_top_k, entries) * 8
    t.moment(INDEX, f.rows * entries * 4, chosen // 2, chosen, chosen)
    t.free(query, total)
