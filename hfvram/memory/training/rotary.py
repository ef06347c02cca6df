"""Rotary positions with gradients: over halves or neighbours, in which dtype, over a whole head or a part of it.

Source: transformers 5.17, models/{llama, olmo2, gpt_neox, phi3, glm, ernie4_5, cohere}/modeling_*.py,
`apply_rotary_pos_emb` of each.
"""

from collections.abc import Callable
from typing import Final

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training.blocks import ROTARY
from hfvram.memory.training.tape import Tape
from hfvram.memory.training.tensors import Tensor

SCALES = Tag("scales of far positions", "activations", "s·4", "transformers 5.17: modeling_ministral3.py")


def rotate_half(t: Tape, x: Tensor) -> Tensor:
    """(−x₂, x₁) of the halves of the last dimension."""
    size = x.shape[-1]
    x1 = op.narrow(t, x, 3, size // 2)
    x2 = op.narrow(t, x, 3, size - size // 2)
    return op.cat(t, (op.negative(t, x2, ROTARY), x1), -1, ROTARY)


def rotate(t: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of (b, heads, s, d), rotated."""
    q_embed = op.add(t, op.mul(t, q, cos, ROTARY), op.mul(t, rotate_half(t, q), sin, ROTARY), ROTARY)
    k_embed = op.add(t, op.mul(t, k, cos, ROTARY), op.mul(t, rotate_half(t, k), sin, ROTARY), ROTARY)
    return q_embed, k_embed


def rotate_back(t: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `rotate`, by (x₂, −x₁) (NanoChat)."""
    q_embed = op.add(t, op.mul(t, q, cos, ROTARY), op.mul(t, _half_back(t, q), sin, ROTARY), ROTARY)
    k_embed = op.add(t, op.mul(t, k, cos, ROTARY), op.mul(t, _half_back(t, k), sin, ROTARY), ROTARY)
    return q_embed, k_embed


def _half_back(t: Tape, x: Tensor) -> Tensor:
    size = x.shape[-1]
    x1 = op.narrow(t, x, 3, size // 2)
    x2 = op.narrow(t, x, 3, size - size // 2)
    return op.cat(t, (x2, op.negative(t, x1, ROTARY)), -1, ROTARY)


def rotate_wide(t: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, rotated in the angles' fp32 and cast back."""
    q_type, k_type = q.dtype, k.dtype
    q_embed, k_embed = rotate(t, q, k, cos, sin)
    return op.to(t, q_embed, q_type, ROTARY), op.to(t, k_embed, k_type, ROTARY)


def rotate_part(t: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of which the first elements of each head are rotated, and joined with the rest by a copy."""
    size, rest = cos.shape[-1], q.shape[-1] - cos.shape[-1]
    q_rot, q_pass = op.narrow(t, q, 3, size), op.narrow(t, q, 3, rest)
    k_rot, k_pass = op.narrow(t, k, 3, size), op.narrow(t, k, 3, rest)
    q_embed = op.add(t, op.mul(t, q_rot, cos, ROTARY), op.mul(t, rotate_half(t, q_rot), sin, ROTARY), ROTARY)
    k_embed = op.add(t, op.mul(t, k_rot, cos, ROTARY), op.mul(t, rotate_half(t, k_rot), sin, ROTARY), ROTARY)
    q_embed = op.cat(t, (q_embed, q_pass), -1, ROTARY)
    k_embed = op.cat(t, (k_embed, k_pass), -1, ROTARY)
    return q_embed, k_embed


def rotate_part_both(t: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `rotate_part`, both rotated parts held until both are joined (Nemotron)."""
    size, rest = cos.shape[-1], q.shape[-1] - cos.shape[-1]
    q_rot, q_pass = op.narrow(t, q, 3, size), op.narrow(t, q, 3, rest)
    k_rot, k_pass = op.narrow(t, k, 3, size), op.narrow(t, k, 3, rest)
    q_embed, k_embed = rotate(t, q_rot, k_rot, cos, sin)
    return op.cat(t, (q_embed, q_pass), -1, ROTARY), op.cat(t, (k_embed, k_pass), -1, ROTARY)


def rotate_joined(t: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `rotate_part`, each joined at once."""
    size, rest = cos.shape[-1], q.shape[-1] - cos.shape[-1]
    q_rot, q_pass = op.narrow(t, q, 3, size), op.narrow(t, q, 3, rest)
    k_rot, k_pass = op.narrow(t, k, 3, size), op.narrow(t, k, 3, rest)
    return _join(t, q_rot, q_pass, cos, sin), _join(t, k_rot, k_pass, cos, sin)


def _join(t: Tape, rotated: Tensor, passed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return op.cat(
        t,
        (op.add(t, op.mul(t, rotated, cos, ROTARY), op.mul(t, rotate_half(t, rotated), sin, ROTARY), ROTARY), passed),
        -1,
        ROTARY,
    )


def rotate_neighbours(t: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbours are rotated, the angles doubled anew in every layer (Helium)."""
    cos, sin = _doubled(t, cos), _doubled(t, sin)
    q_embed = op.add(t, op.mul(t, q, cos, ROTARY), op.mul(t, _turned(t, q), sin, ROTARY), ROTARY)
    k_embed = op.add(t, op.mul(t, k, cos, ROTARY), op.mul(t, _turned(t, k), sin, ROTARY), ROTARY)
    return q_embed, k_embed


def rotate_neighbours_part(t: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `rotate_neighbours` of the first elements of each head, joined with the rest by a copy (GLM)."""
    cos, sin = _doubled(t, cos), _doubled(t, sin)
    size, rest = cos.shape[-1], q.shape[-1] - cos.shape[-1]
    q_rot, q_pass = op.narrow(t, q, 3, size), op.narrow(t, q, 3, rest)
    k_rot, k_pass = op.narrow(t, k, 3, size), op.narrow(t, k, 3, rest)
    q_embed = op.add(t, op.mul(t, q_rot, cos, ROTARY), op.mul(t, _turned(t, q_rot), sin, ROTARY), ROTARY)
    k_embed = op.add(t, op.mul(t, k_rot, cos, ROTARY), op.mul(t, _turned(t, k_rot), sin, ROTARY), ROTARY)
    q_embed = op.cat(t, (q_embed, q_pass), -1, ROTARY)
    k_embed = op.cat(t, (k_embed, k_pass), -1, ROTARY)
    return q_embed, k_embed


def rotate_neighbours_cast(t: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbours, each factor cast to fp32 on its own, and the sums back (Ernie 4.5)."""
    dtype = q.dtype
    cos, sin = _doubled(t, cos), _doubled(t, sin)
    q_embed = _cast_sum(t, q, cos, sin)
    k_embed = _cast_sum(t, k, cos, sin)
    return op.to(t, q_embed, dtype, ROTARY), op.to(t, k_embed, dtype, ROTARY)


def _cast_sum(t: Tape, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return op.add(
        t,
        op.mul(t, op.to(t, x, "fp32", ROTARY), cos, ROTARY),
        op.mul(t, op.to(t, _turned(t, x), "fp32", ROTARY), sin, ROTARY),
        ROTARY,
    )


def rotate_neighbours_wide(t: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbours, queries and keys cast to fp32 first and back at the end (Cohere)."""
    dtype = q.dtype
    q = op.to(t, q, "fp32", ROTARY)
    k = op.to(t, k, "fp32", ROTARY)
    q_embed = op.add(t, op.mul(t, q, cos, ROTARY), op.mul(t, _turned(t, q), sin, ROTARY), ROTARY)
    k_embed = op.add(t, op.mul(t, k, cos, ROTARY), op.mul(t, _turned(t, k), sin, ROTARY), ROTARY)
    return op.to(t, q_embed, dtype, ROTARY), op.to(t, k_embed, dtype, ROTARY)


def _doubled(t: Tape, angles: Tensor) -> Tensor:
    """The first half of the angles, each twice: a copy without gradients."""
    return t.new(angles.shape, angles.dtype, None, ROTARY)


def _turned(t: Tape, x: Tensor) -> Tensor:
    """(−x₂, x₁) of neighbours, stacked and joined."""
    x1 = op.every(t, x, 2)
    x2 = op.every(t, x, 2)
    return op.reshape(t, op.stack(t, (op.negative(t, x2, ROTARY), x1), ROTARY), *x.shape)


def rotate_halves(t: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Each half rotated by itself, the angles of one of them given, and both joined (gpt-oss)."""
    q_embed = _rotated_halves(t, q, cos, sin)
    return q_embed, _rotated_halves(t, k, cos, sin)


def _rotated_halves(t: Tape, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    x1, x2 = op.split(t, x, -1, half, half)
    first = op.subtract(t, op.mul(t, x1, cos, ROTARY), op.mul(t, x2, sin, ROTARY), ROTARY)
    second = op.add(t, op.mul(t, x2, cos, ROTARY), op.mul(t, x1, sin, ROTARY), ROTARY)
    return op.cat(t, (first, second), -1, ROTARY)


def far(t: Tape, q: Tensor) -> Tensor:
    """Queries times 1 + β·log(1 + ⌊position / original length⌋), worked out in every layer (Ministral 3)."""
    s = q.shape[2]
    scale = t.new((1, s), "fp32", None, SCALES)
    for _ in range(5):  # floor, plus one, logarithm, times β, plus one
        scale = t.new((1, s), "fp32", None, SCALES)
    if q.dtype != "fp32":
        scale = t.new((1, s), q.dtype, None, SCALES)
    return op.mul(t, q, scale.as_((1, 1, s, 1), (s, s, 1, 1)), ROTARY)


Rotate = Callable[[Tape, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
ROTATE: Final[dict[str, Rotate]] = {
    "whole": rotate,
    "back": rotate_back,
    "joined": rotate_joined,
    "part": rotate_part,
    "part, both": rotate_part_both,
    "fp32": rotate_wide,
    "halves": rotate_halves,
    "neighbours": rotate_neighbours,
    "neighbours, part": rotate_neighbours_part,
    "neighbours, cast": rotate_neighbours_cast,
    "neighbours, fp32": rotate_neighbours_wide,
}
"""By `Kind.rotates`."""
