"""Softmax attention with gradients, as transformers' layers compute it.

Source: transformers 5.17, models/llama/modeling_llama.py, integrations/sdpa_attention.py.
"""

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training.blocks import LLAMA, rotate, unknown
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
PROJECTED = Tag("attention, projected", "activations", "b·s·h·e", LLAMA)


def attention(t: Tape, part: Attention, w: Weights, x: Tensor, around: Surroundings) -> Tensor:
    """Self-attention of one layer over its normed input (b, s, h)."""
    if part.fused_qkv or part.qk_norm or part.output_gate or part.sinks or part.softcap or part.relative_bias:
        raise unknown(f"attention of {around.class_name}")
    b, s, _ = x.shape
    d, dv = part.head_dim, part.value_dim
    q = op.transpose(t, op.reshape(t, w.linear(t, x, QUERY), b, s, -1, d), 1, 2)
    k = op.transpose(t, op.reshape(t, w.linear(t, x, KEY_VALUE), b, s, -1, d), 1, 2)
    v = op.transpose(t, op.reshape(t, w.linear(t, x, KEY_VALUE), b, s, -1, dv), 1, 2)
    if part.rotary:
        q, k = rotate(t, q, k, *around.angles(part))
    out = _kernel(t, part, q, k, v, around)
    out = op.dense(t, op.transpose(t, out, 1, 2), OUT)
    out = op.dense(t, op.reshape(t, out, b, s, -1), OUT)
    return w.linear(t, out, PROJECTED)


def _kernel(t: Tape, part: Attention, q: Tensor, k: Tensor, v: Tensor, around: Surroundings) -> Tensor:
    grouped = part.heads != part.kv_heads
    return scaled_dot_product(t, q, k, v, None, causal=part.causal, gqa=grouped, tag=OUT)
