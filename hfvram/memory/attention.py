"""Softmax attention without gradients: projections, rotary positions, the growing cache, and the kernel that runs.

b sequences of s new tokens that attend to t, a heads of size d, a_kv KV heads, e bytes of an element.
"""

from dataclasses import replace
from typing import NamedTuple

from hfvram.memory.blocks import HIDDEN, normalize, project, rotate, split_project
from hfvram.memory.forward import Forward
from hfvram.memory.packed_cache import LayerCache, grow_offloaded, grow_quantized
from hfvram.memory.scores import MATH, SCORES, eager_weights
from hfvram.memory.timeline import Tag, Timeline
from hfvram.model.layers import Attention

LLAMA = "transformers 5.17: LlamaAttention.forward"
SDPA = "transformers 5.17: sdpa_attention.py; PyTorch 2.11: transformers/cuda/sdp_utils.cpp"
CACHES = "transformers 5.17: cache_utils.py"
QUERY = Tag("queries", "activations", "b·s·a·d·e", LLAMA)
KEY_VALUE = Tag("keys and values before the cache", "activations", "b·s·a_kv·d·e", LLAMA)
CACHE = Tag("keys and values", "cache", "b·t·a_kv·d·e", CACHES, "exact")
COUNTER = Tag("counters of the cache", "cache", "", CACHES, "exact")
OUT = Tag("attention output", "activations", "b·s·a·d·e", SDPA)
REPEATED = Tag("keys and values repeated for every head", "activations", "b·t·a·d·e", SDPA)
BIAS = Tag("attention mask as a bias", "activations", "b·s·t·e", SDPA)
BUCKETS = Tag("distances and their buckets", "activations", "s·t·8", "transformers 5.17: T5Attention.compute_bias")
RELATIVE = Tag("relative position bias", "activations", "a·s·t·e", "transformers 5.17: T5Attention.compute_bias")


def attention(t: Timeline, f: Forward, part: Attention, cache: list[int]) -> tuple[int, int | None]:
    """Self-attention of one layer. `cache` holds the handles of the layer's keys and values, empty before the prefill.

    Returns the output's handle and, for eager attention, that of the weights, which the layer keeps until its end.
    """
    q_width, k_width, v_width = (n * d for n, d in _heads(part))
    q_bytes, k_bytes = f.bytes(q_width), f.bytes(k_width)
    cached = part.cached and f.use_cache
    gate: list[int] = []
    sliced: list[int] = []
    key: list[int]
    value: list[int]
    if part.fused_qkv:
        query, key = [], []
        value = [split_project(t, f, part.params, part.hidden_size, q_width + k_width + v_width, QUERY)]
        if part.groups == "expanded":
            sliced, k_bytes = value, q_bytes
            query, key, value = ([t.alloc(q_bytes, tag)] for tag in (QUERY, KEY_VALUE, KEY_VALUE))
    else:
        first, *gate = _projection(t, f, part, q_width, QUERY)
        query, key, value = [first], [], []
        if part.cached or not part.causal:  # else they are another layer's
            key = _projection(t, f, part, k_width, KEY_VALUE)
            value = [split_project(t, f, part.params, part.hidden_size, v_width, KEY_VALUE)]
    joined = False
    if part.rotary and part.rotary.sliced:
        size = part.rotary.dim * f.bytes(1)
        if part.fused_qkv:  # CodeGen's projection lies in an order of its own: queries and keys are copies of its parts
            sliced, value = value, []
            query, key = [t.alloc(q_bytes, QUERY)], [t.alloc(k_bytes, KEY_VALUE)]
        sliced = [
            *sliced,
            *query,
            *key,
            rotate(t, size * part.heads, size * part.heads, QUERY),
            rotate(t, size * part.kv_heads, size * part.kv_heads, KEY_VALUE),
        ]
        query, key = [t.alloc(q_bytes, QUERY)], [t.alloc(k_bytes, KEY_VALUE)]
        joined = True
    elif part.rotary:
        share = part.rotary.dim / part.head_dim
        rotated = [rotate(t, q_bytes, int(q_bytes * share), QUERY)]
        if key or not query:
            rotated.append(rotate(t, k_bytes, int(k_bytes * share), KEY_VALUE))
        t.free(*query, *key)
        query, key = rotated[:1], rotated[1:]
        joined = part.rotary.dim < part.head_dim
    if cached:
        grown = grow(t, f, part, cache)
        if f.cache == "quantized" and not f.past:  # what was computed is what is read
            grown += key + (value if query else [])
        else:
            t.free(*key, *(value if query else []))
        key, value = grown, value if not query else []
    computed = []
    if part.relative_bias in ("first", "own") and f.tokens > 1:
        computed = [_relative_bias(t, f, part)]
    if part.flattened and f.batch > 1:
        sliced = [*sliced, t.alloc(q_bytes, QUERY)]
    out, kept, named = kernel(t, f, part, joined)
    if part.relative_bias == "first":
        cache += computed
        computed = []
    if gate:
        sigmoid, gated = t.alloc(q_bytes, OUT), t.alloc(q_bytes, OUT)
        t.free(sigmoid, out, *gate)
        out = gated
    inputs = [*query, *key, *value, *computed, *sliced]
    if part.output_apart:
        t.free(*inputs)
        inputs = []
    projected = split_project(t, f, part.params, part.heads * part.value_dim, part.hidden_size, HIDDEN, "rows")
    if part.flattened:
        total = t.alloc(f.bytes(part.hidden_size), HIDDEN)
        t.free(out, *inputs, *named, projected)
        return total, kept
    t.free(out, *inputs, *named)
    return projected, kept


def cross_attention(t: Timeline, f: Forward, part: Attention, cache: list[int]) -> tuple[int, int | None]:
    """Attention to an encoder's output, whose keys and values are made at the first step and stay.

    The cache concatenates them with nothing, so that both stand twice for a moment; a static one copies them.
    Source: transformers 5.17, models/bart/modeling_bart.py `BartAttention.forward`, cache_utils.py.
    """
    query = project(t, f, part.hidden_size, part.heads * part.head_dim, QUERY)
    if not f.past:
        whole = replace(f, tokens=f.source)
        sizes = [whole.bytes(part.kv_heads * d) for d in (part.head_dim, part.value_dim)]
        fresh = [project(t, whole, part.hidden_size, part.kv_heads * part.head_dim, KEY_VALUE) for _ in sizes]
        cache += [t.alloc(n, CACHE) for n in sizes] + ([t.alloc(8, COUNTER)] if f.static_length else [])
        t.free(*fresh)
    out = t.alloc(f.bytes(part.heads * part.value_dim), OUT)
    kept = None
    if implementation(f, part) == "eager":
        kept = t.alloc(f.rows * part.heads * f.source * f.element_bytes, SCORES)
    projected = project(t, f, part.heads * part.value_dim, part.hidden_size, HIDDEN)
    t.free(out, query)
    return projected, kept


def _heads(part: Attention) -> tuple[tuple[int, int], ...]:
    return (part.heads, part.head_dim), (part.kv_heads, part.head_dim), (part.kv_heads, part.value_dim)


def _projection(t: Timeline, f: Forward, part: Attention, width: int, tag: Tag) -> list[int]:
    """One projection, and its norm where the model has one; beside the queries a copy of their gate, if they have."""
    gated = part.output_gate and tag is QUERY
    projected = split_project(t, f, part.params, part.hidden_size, 2 * width if gated else width, tag)
    gate = [t.alloc(f.bytes(width), tag)] if gated else []
    if part.qk_norm is None:
        return [projected, *gate]
    normed = normalize(t, f, width, "rms", tag)
    t.free(projected)
    return [normed, *gate]


def grow(t: Timeline, f: Forward, part: Attention, cache: list[int]) -> list[int]:
    """Append the new tokens to the layer's cache.

    A dynamic cache is a new concatenation each time, old and new standing together for a moment; a window keeps a view
    of what its last step concatenated, W − 1 old tokens and the new ones; a static cache is there from the first step.
    Returns what attention reads beside the cache, to be freed after it.
    """
    row = f.batch * (part.heads if part.groups == "expanded" else part.kv_heads) * f.element_bytes
    if f.static_length:
        if not cache:
            length = min(f.static_length, part.window or f.static_length)
            cache += [t.alloc(row * length * d, CACHE) for d in (part.head_dim, part.value_dim)] + [t.alloc(8, COUNTER)]
        return []
    if f.cache == "quantized":
        return grow_quantized(t, f, cache, (row * part.head_dim, row * part.value_dim))
    length = stored_tokens(part, f.past, f.tokens)
    if isinstance(cache, LayerCache):
        return grow_offloaded(t, cache, (row * length * part.head_dim, row * length * part.value_dim))
    if not cache:
        cache += [t.alloc(row * length * d, CACHE) for d in (part.head_dim, part.value_dim)]
        if part.window:
            cache.append(t.alloc(8, COUNTER))
        return []
    keys = t.alloc(row * length * part.head_dim, CACHE)
    if not part.window:
        t.free(cache[0])
    values = t.alloc(row * length * part.value_dim, CACHE)
    t.free(*([cache[0], cache[1]] if part.window else [cache[1]]))
    cache[:2] = [keys, values]
    return []


def stored_tokens(part: Attention, past: int, new: int) -> int:
    """Tokens in the tensors that a dynamic cache holds after `new` more than `past`."""
    if part.window is None:
        return past + new
    return min(past, part.window - 1) + new


class Attended(NamedTuple):
    """Handles of the output, of eager attention's weights, and of the scores that its code holds to its end."""

    out: int
    weights: int | None = None
    named: tuple[int, ...] = ()


def kernel(t: Timeline, f: Forward, part: Attention, joined: bool, masked: bool = False) -> Attended:
    """The attention itself, with what its kernel needs beside its inputs.

    PyTorch takes cuDNN (half precision, no mask, d ≤ 128, on Hopper and the large Blackwell), flash (d ≤ 256, from
    Ampere on), memory-efficient (a mask, or fp32) or the math path (fp32 with grouped queries; before Ampere those in
    half precision and all of bf16); a mask makes transformers repeat the keys and values.
    """
    attended = f.static_length if f.static_length and f.past else stored_tokens(part, f.past, f.tokens)
    masked = masked or needs_mask(f, part)
    q_bytes = f.batch * f.tokens * part.heads * part.head_dim * f.element_bytes
    out_bytes = f.batch * f.tokens * part.heads * part.value_dim * f.element_bytes
    repeated = [f.batch * attended * part.heads * d * f.element_bytes for d in (part.head_dim, part.value_dim)]
    grouped = part.heads != part.kv_heads and part.groups != "expanded"
    square = f.batch * part.heads * f.tokens * attended
    if implementation(f, part) == "eager":
        copies = [t.alloc(n, REPEATED) for n in repeated] if grouped else []
        scored = eager_weights(t, f, part, square)
        heads_first = t.alloc(out_bytes, OUT)
        out = t.alloc(out_bytes, OUT)
        t.free(heads_first, *copies, *scored.beside)
        return Attended(out, scored.weights, scored.named)
    same_size = part.head_dim == part.value_dim <= 256
    native_groups = grouped and not masked and same_size
    broadcast = part.groups == "broadcast"
    copies = [t.alloc(n, REPEATED) for n in repeated] if grouped and not (native_groups or broadcast) else []
    fused = f.half and f.gpu.flash
    unfused = (native_groups and not fused) or (f.dtype == "bf16" and not f.gpu.bf16 and f.attention == "sdpa")
    if unfused or (grouped and broadcast):
        out = _math(t, f, part, q_bytes, repeated, square, masked)
    else:
        if part.relative_bias and f.tokens > 1:
            copies += _aligned_bias(t, f, part, attended)
        elif masked and f.attention != "flash_attention_2":
            copies += _bias(t, f, attended)
        out = t.alloc(out_bytes, OUT)
        t.moment(OUT, f.batch * part.heads * f.tokens * 4)  # log-sum-exp
        if joined and f.gpu.cudnn_first and not masked and f.half and part.head_dim <= 128 and f.tokens > 1:
            contiguous = t.alloc(out_bytes, OUT)  # cuDNN's lies as the queries do, which rotation joined by a copy
            t.free(out)
            out = contiguous
    t.free(*copies)
    return Attended(out)


def implementation(f: Forward, part: Attention) -> str:
    """What runs where the model's code can't run what was asked: the first that it can."""
    return f.attention if f.attention in part.implementations else part.implementations[0]


def needs_mask(f: Forward, part: Attention) -> bool:
    """Whether this layer is given a mask: padding, a static cache while decoding, or a window that is reached."""
    if f.masked or (f.static_length and f.past) or (part.always_masked and f.tokens > 1):
        return True
    return part.window is not None and f.past + f.tokens >= part.window


def _bias(t: Timeline, f: Forward, attended: int) -> list[int]:
    """A boolean mask becomes an additive one of the queries' dtype, its rows padded to a multiple of 8."""
    row = f.batch * f.tokens * f.element_bytes
    bias = t.alloc(row * attended, BIAS)
    if attended % 8 == 0:
        return [bias]
    padded = t.alloc(row * -(-attended // 8) * 8, BIAS)
    t.free(bias)
    return [padded]


def _relative_bias(t: Timeline, f: Forward, part: Attention) -> int:
    """T5's bias of (heads, s, s): distances in 64 bits to buckets, five of them at once, and the buckets' rows. UMT5's
    code names their logarithms in fp32, too.

    Source: transformers 5.17, models/t5/modeling_t5.py `T5Attention.compute_bias`.
    """
    pairs = f.tokens * f.tokens
    distance, bucket = t.alloc(pairs * 8, BUCKETS), t.alloc(pairs * 8, BUCKETS)
    logarithms = [pairs * 4] if part.relative_bias == "own" else []
    t.moment(BUCKETS, pairs * 8, pairs, *logarithms, pairs * 8, pairs * 8, pairs * 8)
    bias = t.alloc(pairs * part.heads * f.element_bytes, RELATIVE)
    t.free(distance, bucket)
    return bias


def _aligned_bias(t: Timeline, f: Forward, part: Attention, attended: int) -> list[int]:
    """The bias lies with its heads side by side: the kernel is given a copy, its rows padded beyond a multiple of 8.

    Source: PyTorch 2.11, aten/src/ATen/native/transformers/attention.cpp `preprocess_mask`, `pad_bias`.
    """
    rows = part.heads * f.tokens * f.element_bytes * (f.batch if f.masked else 1)
    masked = [t.alloc(rows * attended, BIAS)] if f.masked else []
    return [*masked, t.alloc(rows * (attended // 8 + 1) * 8, BIAS)]


def _math(
    t: Timeline, f: Forward, part: Attention, q_bytes: int, repeated: list[int], square: int, masked: bool
) -> int:
    """The math path, in fp32: two squares of scores, and a byte an element for rows that are masked whole."""
    wide = 4 // f.element_bytes
    queries = [t.alloc(q_bytes * wide, QUERY) for _ in range(wide)]
    biased = masked or f.tokens > 1
    mask_bytes = f.batch * f.element_bytes if masked else 4  # the causal one is made here, for every sequence
    bias = [t.alloc(square // part.heads // f.batch * mask_bytes, BIAS)] if biased else []
    if part.groups != "broadcast":
        grouped = part.heads != part.kv_heads and not masked
        shared = [n * part.kv_heads // part.heads if grouped else n for n in repeated]
        cast = [n * wide for n in shared] if wide > 1 else []
        copies = [n * wide for n in repeated] if grouped else []
        keys = [t.alloc(n, REPEATED) for n in (*cast, *copies, repeated[0] * wide)]
    else:
        keys = [t.alloc(f.batch * part.kv_heads * part.head_dim * (f.past + f.tokens) * 4, REPEATED) for _ in range(3)]
    scores = t.alloc(square * 4, MATH)
    t.free(keys.pop())
    if bias:
        sums = t.alloc(square * 4, MATH)
        t.free(scores)
        scores = sums
    weights = t.alloc(square * 4, MATH)
    t.moment(MATH, square)
    t.free(scores)
    heads_first = t.alloc(q_bytes * wide, OUT)
    t.free(*keys, *queries, *bias, weights)
    out = t.alloc(q_bytes, OUT)
    t.free(heads_first)
    return out
