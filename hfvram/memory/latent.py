"""Multi-head latent attention without gradients, as transformers computes it: the cache holds one latent vector a token
(or, in some models, every head's keys and values), and each step expands all of it.

b sequences of s new tokens that attend to t, a heads, c the latent's size, r the rotary part, e bytes of an element.
Source: transformers 5.17, models/deepseek_v2, deepseek_v3 and glm_moe_dsa (modeling_*.py); arXiv 2405.04434.
"""

from hfvram.memory.attention import CACHES, COUNTER, grow, kernel
from hfvram.memory.blocks import HIDDEN, ROTARY, normalize, rotate
from hfvram.memory.forward import Forward
from hfvram.memory.timeline import Tag, Timeline
from hfvram.model.layers import Attention, LatentAttention

MLA = "transformers 5.17: DeepseekV3Attention.forward"
INDEXER = "transformers 5.17: GlmMoeDsaIndexer.forward"
QUERY = Tag("queries", "activations", "b·s·a·(d_nope+r)·e", MLA)
LATENT = Tag("latent before the cache", "activations", "b·s·(c+r)·e", MLA)
EXPANDED = Tag("keys and values expanded from the latent", "activations", "b·t·a·(2·d_nope+r+d_v)·e", MLA)
INDEX = Tag("sparse attention's indexer", "activations", "b·s·t·a_i·4", INDEXER)
INDEX_CACHE = Tag("indexer's keys", "cache", "b·t·d_i·e", CACHES, "exact")


def cached_attention(part: LatentAttention) -> Attention:
    """What its cache and its kernel see: one head of the latent and one of the rotary key, or all heads expanded."""
    if part.latent_cache:
        return _attention(part, kv_heads=1, head_dim=part.kv_lora_rank, value_dim=part.qk_rope_head_dim)
    return expanded_attention(part)


def expanded_attention(part: LatentAttention) -> Attention:
    """The attention that its kernel computes: every head with keys of d_nope + r and values of d_v."""
    head_dim = part.qk_nope_head_dim + part.qk_rope_head_dim
    return _attention(part, kv_heads=part.heads, head_dim=head_dim, value_dim=part.v_head_dim)


def _attention(part: LatentAttention, kv_heads: int, head_dim: int, value_dim: int) -> Attention:
    return Attention(
        hidden_size=part.hidden_size,
        heads=part.heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        params=(),
    )


def latent_attention(t: Timeline, f: Forward, part: LatentAttention, cache: list[int]) -> tuple[int, int | None]:
    """One layer's attention. Returns the handles of its output and, for eager attention, of the weights it keeps."""
    heads, rope = part.heads, part.qk_rope_head_dim
    qk = part.qk_nope_head_dim + rope
    held = []
    if part.q_lora_rank:
        down = t.alloc(f.bytes(part.q_lora_rank), LATENT)
        normed = normalize(t, f, part.q_lora_rank, "rms", LATENT)
        t.free(down)
        held.append(t.alloc(f.bytes(heads * qk), QUERY))
        if part.index_heads:
            held.append(normed)
        else:
            t.free(normed)
    else:
        held.append(t.alloc(f.bytes(heads * qk), QUERY))
    held.append(t.alloc(f.bytes(part.kv_lora_rank + rope), LATENT))
    latent = normalize(t, f, part.kv_lora_rank, "rms", LATENT)
    held.append(_rotate(t, f, part, heads))
    rotary_key = _rotate(t, f, part, 1)
    attended = f.past + f.tokens
    if part.latent_cache:
        grow_latent(t, f, part, cache)
        t.free(latent, rotary_key)
        held.append(t.alloc(f.bytes(heads * qk), QUERY))
        held += _expand(t, f, part, attended)
    else:
        held += [latent, rotary_key, t.alloc(f.bytes(heads * qk), QUERY)]
        fresh = _expand(t, f, part, f.tokens)
        grow_latent(t, f, part, cache)
        t.free(*fresh)
    if part.index_heads:
        held.append(_index(t, f, part, attended))
    if part.index_top_k:
        held += _sparse_mask(t, f, part, attended)
    out, kept, _ = kernel(t, f, expanded_attention(part), False, bool(part.index_top_k))
    projected = t.alloc(f.bytes(part.hidden_size), HIDDEN)
    t.free(out, *held)
    return projected, kept


def _rotate(t: Timeline, f: Forward, part: LatentAttention, heads: int) -> int:
    """The rotary part of the queries or of the key: in fp32 where complex numbers are used."""
    nbytes = f.bytes(heads * part.qk_rope_head_dim)
    if part.rotary_style == "complex":
        wide = [t.alloc(f.fp32_bytes(heads * part.qk_rope_head_dim), ROTARY) for _ in range(2)]
        out = t.alloc(nbytes, ROTARY)
        t.free(*wide)
        return out
    parts = [t.alloc(nbytes // 2, ROTARY) for _ in range(4)]
    out = t.alloc(nbytes, ROTARY)
    t.free(*parts)
    return out


def _expand(t: Timeline, f: Forward, part: LatentAttention, tokens: int) -> list[int]:
    """Keys and values of every head from the latents: one projection, and the keys joined with their rotary part."""
    rows = f.batch * tokens * part.heads * f.element_bytes
    nope, rope = part.qk_nope_head_dim, part.qk_rope_head_dim
    return [t.alloc(rows * (nope + part.v_head_dim), EXPANDED), t.alloc(rows * (nope + rope), EXPANDED)]


def grow_latent(t: Timeline, f: Forward, part: LatentAttention, cache: list[int]) -> None:
    """Append the new tokens to the layer's cache: keys and values, and behind them the indexer's keys."""
    if f.static_length and cache:
        return
    indexed = [cache.pop()] if part.index_heads and cache else []
    grow(t, f, cached_attention(part), cache)
    if part.index_heads:
        length = f.static_length or f.past + f.tokens
        cache.append(t.alloc(f.batch * length * part.index_head_dim * f.element_bytes, INDEX_CACHE))
        cache += [t.alloc(8, COUNTER)] if f.static_length else []
        t.free(*indexed)


def _index(t: Timeline, f: Forward, part: LatentAttention, attended: int) -> int:
    """Every index head scores all tokens in fp32, two such tensors at once. Returns the chosen indices' handle."""
    width, rotated = f.bytes(part.index_heads * part.index_head_dim), f.bytes(part.index_heads * part.qk_rope_head_dim)
    held = [t.alloc(width, INDEX), rotate(t, rotated, rotated, INDEX), t.alloc(width, INDEX)]
    scores = f.rows * attended * 4
    wide = [t.alloc(width // f.element_bytes * 4, INDEX)]
    if f.batch > 1:  # of several sequences, the product is given the keys copied for each token
        wide.append(t.alloc(scores * part.index_head_dim, INDEX))
    product = t.alloc(scores * part.index_heads, INDEX)
    t.free(*wide)
    for _ in range(2):  # scaled, and its positive part
        new = t.alloc(scores * part.index_heads, INDEX)
        t.free(product)
        product = new
    summed = t.alloc(scores, INDEX)
    masked = t.alloc(scores, INDEX)
    t.free(summed)
    best = f.rows * min(part.index_top_k, attended) * 4
    values, indices = t.alloc(best, INDEX), t.alloc(2 * best, INDEX)
    t.free(values)
    chosen = t.alloc(best, INDEX)
    t.free(indices, *held, product, masked)
    return chosen


def _sparse_mask(t: Timeline, f: Forward, part: LatentAttention, attended: int) -> list[int]:
    """What the indices leave out, and both masks in one: booleans for every pair of tokens."""
    pairs = f.rows * attended
    ones, wide = t.alloc(pairs, INDEX), t.alloc(f.rows * min(part.index_top_k, attended) * 8, INDEX)
    left_out = t.alloc(pairs, INDEX)
    t.free(ones, wide)
    kept = t.alloc(pairs, INDEX)
    both = t.alloc(pairs, INDEX)
    t.free(kept)
    return [left_out, both]
