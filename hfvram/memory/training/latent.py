"""Multi-head latent attention with gradients: queries, and keys and values, from compressed vectors.

Source: transformers 5.17, models/deepseek_v2/modeling_deepseek_v2.py, models/deepseek_v3/modeling_deepseek_v3.py.
"""

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training import selection
from hfvram.memory.training.attention import OUT, PROJECTED, QUERY, Attended, attend
from hfvram.memory.training.blocks import normalize, unknown
from hfvram.memory.training.rotary import rotate
from hfvram.memory.training.states import Weights
from hfvram.memory.training.surroundings import Surroundings, expanded
from hfvram.memory.training.tape import Tape
from hfvram.memory.training.tensors import Tensor
from hfvram.model.layers import LatentAttention

LATENT = "transformers 5.17: DeepseekV3Attention.forward"
COMPRESSED = Tag("latent attention, compressed", "activations", "b·s·(c+d_r)·e", LATENT)
EXPANDED = Tag("latent attention, keys and values expanded", "activations", "b·s·a·d·e", LATENT)
TURNED = Tag("latent attention, rotated", "activations", "b·s·a·d_r·e", LATENT)


def latent_attention(t: Tape, part: LatentAttention, w: Weights, x: Tensor, around: Surroundings) -> Attended:
    """Latent attention of one layer over its normed input (b, s, h)."""
    if part.index_top_k:
        raise unknown(f"sparse attention of {around.class_name}")
    b, s, _ = x.shape
    code, plain = around.kind.norm, expanded(part)
    nope, rope = part.qk_nope_head_dim, part.qk_rope_head_dim
    if part.q_lora_rank is None:
        q = w.linear(t, x, QUERY)
    else:
        q = w.linear(t, normalize(t, w.linear(t, x, COMPRESSED), w.norm(), "rms", code), QUERY)
    q = op.transpose(t, op.reshape(t, q, b, s, -1, part.head_dim), 1, 2)
    q_pass, q_rot = op.split(t, q, -1, nope, rope)
    compressed = w.linear(t, x, COMPRESSED)
    kv, k_rot = op.split(t, compressed, -1, part.kv_lora_rank, rope)
    kv = op.reshape(t, normalize(t, kv, w.norm(), "rms", code), b, 1, s, part.kv_lora_rank)
    k_rot = op.reshape(t, k_rot, b, 1, s, rope)
    q_rot, k_rot = _rotated(t, part, q_rot, k_rot, *around.angles(plain))
    queries = op.cat(t, (q_pass, q_rot), -1, QUERY)
    keys, values = _expand(t, part, w, kv, k_rot)
    out, weights = attend(t, plain, queries, keys, values, around)
    out = op.dense(t, op.reshape(t, out, b, s, -1, tag=OUT), OUT)
    return w.linear(t, out, PROJECTED), weights


def _expand(t: Tape, part: LatentAttention, w: Weights, kv: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """`expand_kv`."""
    b, _, s, _ = kv.shape
    nope = part.qk_nope_head_dim
    kv = op.reshape(t, w.linear(t, kv, EXPANDED), b, s, -1, nope + part.v_head_dim)
    kv = op.transpose(t, kv, 1, 2)
    k_pass, values = op.split(t, kv, -1, nope, part.v_head_dim)
    k_rot = op.expand(t, k_rot, -1, part.heads, -1, -1)
    return selection.filled(t, (b, part.heads, s, part.head_dim), (k_pass, k_rot), EXPANDED), values


def _rotated(t: Tape, part: LatentAttention, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    if part.rotary_style == "half":
        return rotate(t, q, k, cos, sin)
    if part.rotary_style == "complex":
        return _complex(t, q, k, cos)
    return _neighbours(t, q, k, cos, sin)


def _complex(t: Tape, q: Tensor, k: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """As complex numbers in fp32, and cast back; written as pairs."""
    q_wide, k_wide = _as_pairs(t, q), _as_pairs(t, k)
    q_out = op.to(t, _flat(t, selection.turned(t, q_wide, angles, TURNED)), q.dtype, TURNED)
    return q_out, op.to(t, _flat(t, selection.turned(t, k_wide, angles, TURNED)), k.dtype, TURNED)


def _as_pairs(t: Tape, x: Tensor) -> Tensor:
    return op.reshape(t, op.to(t, x, "fp32", TURNED), *x.shape[:-1], x.shape[-1] // 2, 2, tag=TURNED)


def _flat(t: Tape, x: Tensor) -> Tensor:
    return op.reshape(t, x, *x.shape[:-2], 2 * x.shape[-2], tag=TURNED)


def _neighbours(t: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb_interleave`."""
    half = cos.shape[-1] // 2
    cos, sin = op.narrow(t, cos, -1, half), op.narrow(t, sin, -1, half)
    q1, q2 = selection.every_second(t, q), selection.every_second(t, q)
    k1, k2 = selection.every_second(t, k), selection.every_second(t, k)
    return _pairs(t, q1, q2, cos, sin), _pairs(t, k1, k2, cos, sin)


def _pairs(t: Tape, x1: Tensor, x2: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return op.cat(
        t,
        (
            op.subtract(t, op.mul(t, x1, cos, TURNED), op.mul(t, x2, sin, TURNED), TURNED),
            op.add(t, op.mul(t, x2, cos, TURNED), op.mul(t, x1, sin, TURNED), TURNED),
        ),
        -1,
        TURNED,
    )
