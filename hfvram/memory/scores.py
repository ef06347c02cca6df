"""Attention written in Python (`eager`): the scores of every pair of tokens, their softmax, and how wide each stands.

b sequences, a heads, s new tokens that attend to t; a square is b·a·s·t elements; e bytes of an element.
Source: transformers 5.17, `eager_attention_forward` of models/llama, bart, t5, gptj, gpt_neo, mpt, bloom and gpt_oss.
"""

from typing import NamedTuple

from hfvram.memory.forward import Forward
from hfvram.memory.timeline import Tag, Timeline
from hfvram.model.layers import Attention

SCORES = Tag("attention scores", "activations", "b·a·s·t·e", "transformers 5.17: eager_attention_forward")
MATH = Tag("attention scores in fp32", "activations", "b·a·s·t·4", "PyTorch 2.11: _scaled_dot_product_attention_math")
WIDE_INPUTS = Tag("queries and keys in fp32", "activations", "2·b·s·a·d·4", "transformers 5.17: GPTJAttention._attn")


class Scored(NamedTuple):
    """The attention weights' handle, those of what stays beside them until the values are weighted, and of what
    attention's code names to its end."""

    weights: int
    beside: tuple[int, ...] = ()
    named: tuple[int, ...] = ()


def eager_weights(t: Timeline, f: Forward, part: Attention, square: int) -> Scored:
    """The attention weights, and what is held with them."""
    nbytes = square * f.element_bytes
    if part.sinks:
        return Scored(_sink_softmax(t, nbytes))
    if part.scores == "fp32" and f.half:
        wide = tuple(t.alloc(f.batch * n * part.heads * part.head_dim * 4, WIDE_INPUTS) for n in _lengths(f))
        masked = _masked(t, f, part, square * 4, MATH)
        soft = t.alloc(square * 4, MATH)
        t.free(masked)
        weights = t.alloc(nbytes, SCORES)
        t.free(soft)
        return Scored(weights, wide)
    if part.scores == "fp32 bias" and f.half:
        return _wide_bias(t, square, nbytes)
    unmasked = [t.alloc(nbytes, SCORES)] if part.named_scores > 1 else []
    masked = t.alloc(nbytes, SCORES) if unmasked else _masked(t, f, part, nbytes, SCORES)
    if part.scores == "own dtype" or not f.half:
        weights = t.alloc(nbytes, SCORES)
        return _scored(t, part, weights, masked, unmasked)
    wider = [t.alloc(square * 4, MATH)] if f.dtype == "bf16" else []
    soft = t.alloc(square * 4, MATH)
    t.free(*wider)
    weights = t.alloc(nbytes, SCORES)
    t.free(soft)
    return _scored(t, part, weights, masked, unmasked)


def _scored(t: Timeline, part: Attention, weights: int, masked: int, unmasked: list[int]) -> Scored:
    if part.named_scores:
        return Scored(weights, named=(masked, *unmasked))
    t.free(masked)
    return Scored(weights)


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


def _wide_bias(t: Timeline, square: int, nbytes: int) -> Scored:
    """A bias in fp32 widens the scores, which stay to attention's end (MPT's ALiBi)."""
    scaled = t.alloc(nbytes, SCORES)
    biased = t.alloc(square * 4, MATH)
    t.free(scaled)
    masked = t.alloc(square * 4, MATH)
    t.free(biased)
    soft = t.alloc(square * 4, MATH)
    weights = t.alloc(nbytes, SCORES)
    t.free(soft)
    return Scored(weights, named=(masked,))


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
