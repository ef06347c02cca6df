"""Attention written in Python (`eager`): the scores of every pair of tokens, their softmax, and how wide each stands.

b sequences, a heads, s new tokens that attend to t; a square is b·a·s·t elements; e bytes of an element.
Source: transformers 5.17, `eager_attention_forward` of models/llama, bart, t5, gptj, gpt_neo, mpt, bloom and gpt_oss.
"""

from hfvram.memory.forward import Forward
from hfvram.memory.timeline import Tag, Timeline
from hfvram.model.layers import Attention

SCORES = Tag("attention scores", "activations", "b·a·s·t·e", "transformers 5.17: eager_attention_forward")
MATH = Tag("attention scores in fp32", "activations", "b·a·s·t·4", "PyTorch 2.11: _scaled_dot_product_attention_math")
WIDE_INPUTS = Tag("queries and keys in fp32", "activations", "2·b·s·a·d·4", "transformers 5.17: GPTJAttention._attn")


def eager_weights(t: Timeline, f: Forward, part: Attention, square: int) -> tuple[int, list[int]]:
    """The attention weights' handle, and those of what stays beside them until the values are weighted."""
    nbytes = square * f.element_bytes
    held = [t.alloc(nbytes, SCORES) for _ in range(part.held_scores)]
    if part.sinks:
        return _sink_softmax(t, nbytes), held
    if part.scores == "fp32" and f.half:
        wide = [t.alloc(f.batch * n * part.heads * part.head_dim * 4, WIDE_INPUTS) for n in _lengths(f)]
        masked = _masked(t, f, part, square * 4, MATH)
        soft = t.alloc(square * 4, MATH)
        t.free(masked)
        weights = t.alloc(nbytes, SCORES)
        t.free(soft)
        return weights, held + wide
    if part.scores == "fp32 bias" and f.half:
        return _wide_bias(t, square, nbytes, held)
    masked = _masked(t, f, part, nbytes, SCORES)
    if part.scores == "own dtype" or not f.half:
        weights = t.alloc(nbytes, SCORES)
        t.free(masked)
        return weights, held
    wider = [t.alloc(square * 4, MATH)] if f.dtype == "bf16" else []
    soft = t.alloc(square * 4, MATH)
    t.free(*wider)
    weights = t.alloc(nbytes, SCORES)
    t.free(soft, masked)
    return weights, held


def _lengths(f: Forward) -> tuple[int, int]:
    return f.tokens, f.past + f.tokens


def _masked(t: Timeline, f: Forward, part: Attention, nbytes: int, tag: Tag) -> int:
    """The product, scaled, with a bias and a mask where there are any: each a new tensor, freed after the next."""
    last = t.alloc(nbytes, tag)
    for _ in range(1 + (part.causal or f.masked) + (part.relative_bias is not None)):
        new = t.alloc(nbytes, tag)
        t.free(last)
        last = new
    return last


def _wide_bias(t: Timeline, square: int, nbytes: int, held: list[int]) -> tuple[int, list[int]]:
    """A bias in fp32 widens the scores, which stay until the values are weighted (MPT's ALiBi)."""
    scaled = t.alloc(nbytes, SCORES)
    biased = t.alloc(square * 4, MATH)
    t.free(scaled)
    masked = t.alloc(square * 4, MATH)
    t.free(biased)
    soft = t.alloc(square * 4, MATH)
    weights = t.alloc(nbytes, SCORES)
    t.free(soft)
    return weights, [*held, masked]


def _sink_softmax(t: Timeline, nbytes: int) -> int:
    """Scores with one more column for the attention sinks, less their maximum, and the softmax in the same dtype."""
    product = t.alloc(nbytes, SCORES)
    scaled = t.alloc(nbytes, SCORES)
    t.free(product)
    biased = t.alloc(nbytes, SCORES)
    t.free(scaled)
    joined = t.alloc(nbytes, SCORES)
    shifted = t.alloc(nbytes, SCORES)
    t.free(joined)
    weights = t.alloc(nbytes, SCORES)
    t.free(biased, shifted)
    return weights
