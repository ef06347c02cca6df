"""Softmax attention with gradients, as transformers' layers compute it.

Source: transformers 5.17, models/llama/modeling_llama.py, integrations/sdpa_attention.py.
"""

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training.blocks import DROPPED, LLAMA, ROTARY, normalize, unknown
from hfvram.memory.training.ring_attention import ring_attention
from hfvram.memory.training.rotary import ROTATE, far, rotate
from hfvram.memory.training.scaled_dot_product import attention as scaled_dot_product
from hfvram.memory.training.scaled_dot_product import flash
from hfvram.memory.training.sequence_parallel import enter, leave, length
from hfvram.memory.training.states import Weights
from hfvram.memory.training.surroundings import Surroundings
from hfvram.memory.training.tape import Tape
from hfvram.memory.training.tensors import Tensor
from hfvram.model.layers import Attention

SDPA = "transformers 5.17: sdpa_attention.py; PyTorch 2.11: transformers/cuda/sdp_utils.cpp"
QUERY = Tag("queries", "activations", "b·s·a·d·e", LLAMA)
KEY_VALUE = Tag("keys and values", "activations", "b·s·a_kv·d·e", LLAMA)
GATE = Tag("gate of attention's output", "activations", "b·s·a·d·e", "transformers 5.17: Qwen3NextAttention.forward")
OUT = Tag("attention output", "activations", "b·s·a·d·e", SDPA)
REPEATED = Tag("keys and values repeated for every head", "activations", "b·s·a·d·e", SDPA)
CACHED = Tag("keys and values, cached", "activations", "b·s·a_kv·d·e", "transformers 5.17: cache_utils.py")
FLASH = "flash_attention_2"
PACKED = Tag("positions", "activations", "s·8", "transformers 5.17: modeling_flash_attention_utils.py")
EAGER = "transformers 5.17: eager_attention_forward"
SCORES = Tag("attention scores", "activations", "b·a·s·s·e", EAGER)
WIDE_SCORES = Tag("attention scores in fp32", "activations", "b·a·s·s·4", EAGER)
PROJECTED = Tag("attention, projected", "activations", "b·s·h·e", LLAMA)


Attended = tuple[Tensor, Tensor | None]
"""An output and, of eager attention, the weights, which the caller holds."""


def attention(t: Tape, part: Attention, w: Weights, x: Tensor, around: Surroundings) -> Attended:
    """Self-attention of one layer over its normed input (b, s, h)."""
    if part.sinks or part.relative_bias or part.position_bias or part.groups != "gqa":
        raise unknown(f"attention of {around.class_name}")
    kind = around.kind
    if part.clips and kind.projects != "first":
        raise unknown(f"clipped projections of {around.class_name}")
    _check_rotary(part, around)
    x = enter(t, x, w.params())
    b, s = x.shape[0], length(t, x)
    d, dv = part.head_dim, part.value_dim
    gate = None
    if part.output_gate:
        q, gate = op.split(t, op.reshape(t, w.linear(t, x, QUERY), b, s, -1, 2 * d), -1, d, d)
        gate = op.reshape(t, gate, b, s, -1, tag=GATE)
        q = op.transpose(t, normalize(t, q, w.norm(), "rms", around.kind.norm), 1, 2)
        k = op.reshape(t, w.linear(t, x, KEY_VALUE), b, s, -1, d)
        k = op.transpose(t, normalize(t, k, w.norm(), "rms", around.kind.norm), 1, 2)
        v = op.transpose(t, op.reshape(t, w.linear(t, x, KEY_VALUE), b, s, -1, dv), 1, 2)
    elif part.fused_qkv:
        fused = w.linear(t, x, QUERY)
        q = op.narrow(t, fused, 2, part.heads * d)
        k = op.narrow(t, fused, 2, part.kv_heads * d)
        v = op.narrow(t, fused, 2, part.kv_heads * dv)
        q = op.transpose(t, op.reshape(t, q, b, s, -1, d), 1, 2)
        k = op.transpose(t, op.reshape(t, k, b, s, -1, d), 1, 2)
        v = op.transpose(t, op.reshape(t, v, b, s, -1, dv), 1, 2)
    elif part.qk_norm == "head" and kind.qk == "as projected":
        q = op.reshape(t, w.linear(t, x, QUERY), b, s, -1, d)
        q = op.transpose(t, normalize(t, q, w.norm(), "rms", around.kind.norm), 1, 2)
        k = op.reshape(t, w.linear(t, x, KEY_VALUE), b, s, -1, d)
        k = op.transpose(t, normalize(t, k, w.norm(), "rms", around.kind.norm), 1, 2)
        v = op.transpose(t, op.reshape(t, w.linear(t, x, KEY_VALUE), b, s, -1, dv), 1, 2)
    elif part.qk_norm and kind.qk == "as heads":
        q = op.reshape(t, w.linear(t, x, QUERY), b, s, -1, d)
        k = op.reshape(t, w.linear(t, x, KEY_VALUE), b, s, -1, d)
        v = op.reshape(t, w.linear(t, x, KEY_VALUE), b, s, -1, dv)
        q = normalize(t, q, w.norm(), kind.qk_norm, kind.norm)
        k = normalize(t, k, w.norm(), kind.qk_norm, kind.norm)
        q, k, v = op.transpose(t, q, 1, 2), op.transpose(t, k, 1, 2), op.transpose(t, v, 1, 2)
    elif part.qk_norm == "full":
        q = normalize(t, w.linear(t, x, QUERY), w.norm(), "rms", around.kind.norm)
        k = normalize(t, w.linear(t, x, KEY_VALUE), w.norm(), "rms", around.kind.norm)
        v = w.linear(t, x, KEY_VALUE)
        q = op.transpose(t, op.reshape(t, q, b, s, -1, d), 1, 2)
        k = op.transpose(t, op.reshape(t, k, b, s, -1, d), 1, 2)
        v = op.transpose(t, op.reshape(t, v, b, s, -1, dv), 1, 2)
    elif kind.projects == "first" or kind.qk == "as heads":
        as_heads = kind.qk == "as heads"
        q = w.linear(t, x, QUERY)
        q = op.reshape(t, q, b, s, -1, d) if as_heads else q
        k = w.linear(t, x, KEY_VALUE)
        k = op.reshape(t, k, b, s, -1, d) if as_heads else k
        v = w.linear(t, x, KEY_VALUE)
        v = op.reshape(t, v, b, s, -1, dv) if as_heads else v
        if part.clips:
            q, k, v = op.clip(t, q, QUERY), op.clip(t, k, KEY_VALUE), op.clip(t, v, KEY_VALUE)
        q = op.transpose(t, q if as_heads else op.reshape(t, q, b, s, -1, d), 1, 2)
        k = op.transpose(t, k if as_heads else op.reshape(t, k, b, s, -1, d), 1, 2)
        v = op.transpose(t, v if as_heads else op.reshape(t, v, b, s, -1, dv), 1, 2)
    else:
        q = op.transpose(t, op.reshape(t, w.linear(t, x, QUERY), b, s, -1, d), 1, 2)
        k = op.transpose(t, op.reshape(t, w.linear(t, x, KEY_VALUE), b, s, -1, d), 1, 2)
        v = op.transpose(t, op.reshape(t, w.linear(t, x, KEY_VALUE), b, s, -1, dv), 1, 2)
    if part.qk_norm and kind.qk == "all projected":
        q = _norm_heads(t, q, w, around)
        k = _norm_heads(t, k, w, around)
    if part.rotary and part.rotary.sliced:
        size, rest = part.rotary.dim, d - part.rotary.dim
        q_rot, q_pass = op.narrow(t, q, 3, size), op.narrow(t, q, 3, rest)
        k_rot, k_pass = op.narrow(t, k, 3, size), op.narrow(t, k, 3, rest)
        q_rot, k_rot = rotate(t, q_rot, k_rot, *around.angles(part))
        q = op.cat(t, (q_rot, q_pass), -1, ROTARY)
        k = op.cat(t, (k_rot, k_pass), -1, ROTARY)
    elif part.rotary:
        q, k = ROTATE[kind.rotates](t, q, k, *around.angles(part))
    if part.qk_norm and kind.qk == "rotated":
        q = _norm_heads(t, q, w, around)
        k = _norm_heads(t, k, w, around)
    if kind.far:
        q = far(t, q)
    if around.caches:
        if part.window:
            t.held.append(t.new((), "int64", None, CACHED))  # how many tokens were seen
        k, v = _cached(t, k, k.dtype), _cached(t, v, k.dtype)
    out, weights = attend(t, part, q, k, v, around)
    out = op.dense(t, op.reshape(t, out, b, s, -1, tag=OUT), OUT)
    if gate is not None:
        out = op.mul(t, out, op.of_output(t, gate, GATE), GATE)
    out = leave(t, w.linear(t, out, PROJECTED))
    return op.dropout(t, out, around.dropout.residual if kind.drops_inside else 0, DROPPED), weights


def _check_rotary(part: Attention, around: Surroundings) -> None:
    """Raises `usage` where the positions are not those of the code that `Kind.rotates` names."""
    if (rotary := part.rotary) is None:
        return
    rotates = around.kind.rotates
    neighbours = "interleaved" if rotates.startswith("neighbours") else "half"
    whole = rotary.dim == part.head_dim or rotary.sliced or rotates == "joined" or "part" in rotates
    if rotary.style != neighbours or not whole:
        raise unknown(f"rotary positions of {around.class_name}")


def _norm_heads(t: Tape, x: Tensor, w: Weights, around: Surroundings) -> Tensor:
    """The norm of each head of (b, heads, s, d): one for all, or (StableLM) a LayerNorm for each."""
    kind = around.kind
    weights = w.norm(2 if kind.qk_norm == "layer" and kind.qk_bias else 1) if w.norms else ()
    if kind.qk_norm == "layer" and not kind.qk_bias:
        heads = op.split(t, x, 1, *[1] * x.shape[1])
        normed = [normalize(t, heads[0], weights, "layer")]
        normed += [normalize(t, head, w.norm(), "layer") for head in heads[1:]]
        return op.cat(t, normed, 1, QUERY)
    return normalize(t, x, weights, kind.qk_norm, kind.norm)


def _cached(t: Tape, x: Tensor, dtype: str) -> Tensor:
    """Joined to an empty cache in the keys' dtype by a copy, which the model's output holds."""
    b, heads, _, d = x.shape
    out = op.cat(t, (t.new((b, heads, 0, d), dtype), x), 2, CACHED)
    t.held.append(out.alias())
    return out


def attend(t: Tape, part: Attention, q: Tensor, k: Tensor, v: Tensor, around: Surroundings) -> Attended:
    """The attention itself of (b, heads, s, d) tensors; out comes (b, s, heads, d)."""
    bias = around.masks.get(part.window) if t.ring[0] == 1 else None
    if around.request.attention == FLASH:
        return _flash(t, q, k, v, around), None
    if around.eager(part):
        return _eager(t, part, q, k, v, bias, around)
    grouped = part.heads != part.kv_heads
    if grouped and (bias is not None or not part.head_dim == part.value_dim <= 256):
        k, v = repeat(t, k, part), repeat(t, v, part)
        grouped = False
    p = around.dropout.attention
    if t.ring[0] > 1:
        out = ring_attention(t, q, k, v, gqa=grouped, p=p, tag=OUT)
        return op.dense(t, op.transpose(t, out, 1, 2), OUT), None
    out = scaled_dot_product(t, q, k, v, bias, causal=bias is None and part.causal, gqa=grouped, p=p, tag=OUT)
    return op.dense(t, op.transpose(t, out, 1, 2), OUT), None


def _flash(t: Tape, q: Tensor, k: Tensor, v: Tensor, around: Surroundings) -> Tensor:
    """flash-attn's kernel over sequences of one length, once it has been looked whether they are packed."""
    q, k, v = op.low(t, q), op.low(t, k), op.low(t, v)
    packed = _looks_packed(t, q, around) if around.kind.layers_count else None
    out = op.transpose(t, flash(t, q, k, v, OUT), 1, 2)
    del packed
    return out


def _looks_packed(t: Tape, q: Tensor, around: Surroundings) -> Tensor | None:
    """Whether a single sequence's positions are those of several: the answer is kept through the attention."""
    b, s = q.shape[0], q.shape[2]
    count = t.new((s,), "int64", None, PACKED)
    least = t.new((), "int64", None, PACKED)
    rising = t.new((s,), "int64", None, PACKED)
    del count, least
    if b > 1:
        return None
    steps = t.new((1, s), "int64", None, PACKED)
    sizes = t.new((1, s), "int64", None, PACKED)
    del steps
    total = t.new((), "int64", None, PACKED)
    del sizes
    found = t.new((), "bool", None, PACKED)
    del total, rising
    return found


def repeat(t: Tape, x: Tensor, part: Attention) -> Tensor:
    """Keys or values for every head: `repeat_kv`."""
    b, heads, s, d = x.shape
    groups = part.heads // part.kv_heads
    if groups == 1:
        return x
    wide = op.expand(t, op.reshape(t, x, b, heads, 1, s, d), b, heads, groups, s, d)
    return op.reshape(t, wide, b, heads * groups, s, d, tag=REPEATED)


def _eager(
    t: Tape, part: Attention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, around: Surroundings
) -> Attended:
    """Scores of every pair of tokens, their softmax in fp32, and the weighted values."""
    k, v = repeat(t, k, part), repeat(t, v, part)
    weights = op.scale(t, op.matmul(t, q, op.transpose(t, k, 2, 3), SCORES), SCORES)
    if part.softcap:
        weights = op.scale(t, weights, SCORES)
        weights = op.of_output(t, weights, SCORES)
        weights = op.scale(t, weights, SCORES)
    if bias is not None:
        weights = op.mask(t, weights, bias, SCORES)
    soft = None if around.kind.own_softmax else "fp32"
    weights = op.to(t, op.softmax(t, weights, soft, WIDE_SCORES), q.dtype, SCORES)
    weights = op.dropout(t, weights, around.dropout.attention, SCORES)
    out = op.transpose(t, op.matmul(t, weights, v, OUT), 1, 2)
    return (op.dense(t, out, OUT) if around.kind.copies_out else out), weights
