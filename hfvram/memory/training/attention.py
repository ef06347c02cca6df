"""Softmax attention with gradients, as transformers' layers compute it.

Source: transformers 5.17, models/llama/modeling_llama.py, integrations/sdpa_attention.py.
"""

from typing import Final

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training.blocks import DROPPED, LLAMA, normalize, rotate, rotate_joined, rotate_wide, unknown
from hfvram.memory.training.scaled_dot_product import attention as scaled_dot_product
from hfvram.memory.training.states import Weights
from hfvram.memory.training.surroundings import Surroundings
from hfvram.memory.training.tape import Tape
from hfvram.memory.training.tensors import Tensor
from hfvram.model.layers import Attention

SDPA = "transformers 5.17: sdpa_attention.py; PyTorch 2.11: transformers/cuda/sdp_utils.cpp"
QUERY = Tag("queries", "activations", "b·s·a·d·e", LLAMA)
KEY_VALUE = Tag("keys and values", "activations", "b·s·a_kv·d·e", LLAMA)
OUT = Tag("attention output", "activations", "b·s·a·d·e", SDPA)
REPEATED = Tag("keys and values repeated for every head", "activations", "b·s·a·d·e", SDPA)
EAGER = "transformers 5.17: eager_attention_forward"
SCORES = Tag("attention scores", "activations", "b·a·s·s·e", EAGER)
WIDE_SCORES = Tag("attention scores in fp32", "activations", "b·a·s·s·4", EAGER)
PROJECTED = Tag("attention, projected", "activations", "b·s·h·e", LLAMA)


Attended = tuple[Tensor, Tensor | None]
"""An output and, of eager attention, the weights, which the caller holds."""


def attention(t: Tape, part: Attention, w: Weights, x: Tensor, around: Surroundings) -> Attended:
    """Self-attention of one layer over its normed input (b, s, h)."""
    if part.output_gate or part.sinks or part.relative_bias or part.position_bias or part.groups != "gqa":
        raise unknown(f"attention of {around.class_name}")
    whole = part.rotary is None or part.rotary.dim == part.head_dim or around.kind.rotates == "joined"
    if part.rotary and (part.rotary.sliced or part.rotary.style != "half" or not whole):
        raise unknown(f"rotary positions of {around.class_name}")
    b, s, _ = x.shape
    d, dv = part.head_dim, part.value_dim
    if part.fused_qkv:
        fused = w.linear(t, x, QUERY)
        q = op.narrow(t, fused, 2, part.heads * d)
        k = op.narrow(t, fused, 2, part.kv_heads * d)
        v = op.narrow(t, fused, 2, part.kv_heads * dv)
        q = op.transpose(t, op.reshape(t, q, b, s, -1, d), 1, 2)
        k = op.transpose(t, op.reshape(t, k, b, s, -1, d), 1, 2)
        v = op.transpose(t, op.reshape(t, v, b, s, -1, dv), 1, 2)
    elif part.qk_norm == "head":
        q = op.reshape(t, w.linear(t, x, QUERY), b, s, -1, d)
        q = op.transpose(t, normalize(t, q, w.norm(), "rms", around.kind.norm), 1, 2)
        k = op.reshape(t, w.linear(t, x, KEY_VALUE), b, s, -1, d)
        k = op.transpose(t, normalize(t, k, w.norm(), "rms", around.kind.norm), 1, 2)
        v = op.transpose(t, op.reshape(t, w.linear(t, x, KEY_VALUE), b, s, -1, dv), 1, 2)
    elif part.qk_norm:
        q = normalize(t, w.linear(t, x, QUERY), w.norm(), "rms", around.kind.norm)
        k = normalize(t, w.linear(t, x, KEY_VALUE), w.norm(), "rms", around.kind.norm)
        v = w.linear(t, x, KEY_VALUE)
        q = op.transpose(t, op.reshape(t, q, b, s, -1, d), 1, 2)
        k = op.transpose(t, op.reshape(t, k, b, s, -1, d), 1, 2)
        v = op.transpose(t, op.reshape(t, v, b, s, -1, dv), 1, 2)
    else:
        q = op.transpose(t, op.reshape(t, w.linear(t, x, QUERY), b, s, -1, d), 1, 2)
        k = op.transpose(t, op.reshape(t, w.linear(t, x, KEY_VALUE), b, s, -1, d), 1, 2)
        v = op.transpose(t, op.reshape(t, w.linear(t, x, KEY_VALUE), b, s, -1, dv), 1, 2)
    if part.rotary:
        q, k = ROTATE[around.kind.rotates](t, q, k, *around.angles(part))
    out, weights = attend(t, part, q, k, v, around)
    out = op.dense(t, op.reshape(t, out, b, s, -1, tag=OUT), OUT)
    out = w.linear(t, out, PROJECTED)
    return op.dropout(t, out, around.dropout.residual if around.kind.drops_inside else 0, DROPPED), weights


ROTATE: Final = {"whole": rotate, "joined": rotate_joined, "fp32": rotate_wide}


def attend(t: Tape, part: Attention, q: Tensor, k: Tensor, v: Tensor, around: Surroundings) -> Attended:
    """The attention itself of (b, heads, s, d) tensors; out comes (b, s, heads, d)."""
    bias = around.masks.get(part.window)
    if around.eager(part):
        return _eager(t, part, q, k, v, bias, around)
    grouped = part.heads != part.kv_heads
    if grouped and (bias is not None or not part.head_dim == part.value_dim <= 256):
        k, v = repeat(t, k, part), repeat(t, v, part)
        grouped = False
    p = around.dropout.attention
    out = scaled_dot_product(t, q, k, v, bias, causal=bias is None and part.causal, gqa=grouped, p=p, tag=OUT)
    return op.dense(t, op.transpose(t, out, 1, 2), OUT), None


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
    return (out if around.kind.own_softmax else op.dense(t, out, OUT)), weights
