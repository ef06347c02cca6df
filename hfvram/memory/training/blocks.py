"""The small pieces of a layer with gradients, as transformers writes them: norms, rotary positions, activations.

Source: transformers 5.17, models/llama/modeling_llama.py, models/gemma/modeling_gemma.py, activations.py.
"""

from typing import Final, Literal

from hfvram.errors import HfvramError, printable
from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training.tape import Tape
from hfvram.memory.training.tensors import Tensor

LLAMA: Final = "transformers 5.17: modeling_llama.py"
ACTIVATIONS: Final = "transformers 5.17: activations.py"
HIDDEN = Tag("hidden states", "activations", "b·s·h·e", "transformers 5.17: residual stream of a decoder layer")
NORM = Tag("normalization in fp32", "activations", "b·s·h·4", "transformers 5.17: LlamaRMSNorm.forward")
NORMED = Tag("normalization, output", "activations", "b·s·h·e", "transformers 5.17: LlamaRMSNorm.forward")
VARIANCE = Tag("normalization, deviation", "activations", "b·s·4", "transformers 5.17: LlamaRMSNorm.forward")
ROTARY = Tag("rotary embedding, temporaries", "activations", "b·s·a·d·e", "transformers 5.17: apply_rotary_pos_emb")
ACTIVATION = Tag("feed-forward, activation function", "activations", "b·s·f·e", ACTIVATIONS)

DROPPED = Tag("dropout before the residual", "activations", "b·s·h·e", "PyTorch 2.11: native/cuda/Dropout.cu")

NormKind = Literal["rms", "layer"]
NormCode = Literal["weight last", "weight in fp32", "plus one"]
"""An RMSNorm's weight: after the cast back (Llama), before it (OLMo-2), or in fp32 with one added (Gemma)."""


def normalize(
    t: Tape, x: Tensor, weights: tuple[Tensor, ...], kind: NormKind, code: NormCode = "weight last"
) -> Tensor:
    """The norm of a layer: its weight and, for LayerNorm, its bias."""
    if kind == "layer":
        return op.layer_norm(t, x, weights[0], weights[1] if len(weights) > 1 else None, NORMED)
    weight = weights[0] if weights else None
    if code == "plus one":
        return _gemma_norm(t, x, weights[0])
    if code == "weight in fp32":
        return _fp32_norm(t, x, weights[0])
    return rms_norm(t, x, weight)


def rms_norm(t: Tape, x: Tensor, weight: Tensor | None) -> Tensor:
    """In fp32 and back, then weighted: the cast input, the deviation and the cast result are kept."""
    dtype = x.dtype
    x = op.to(t, x, "fp32", NORM)
    variance = op.mean(t, op.power(t, x, NORM), VARIANCE)
    x = op.mul(t, x, op.rsqrt(t, op.shift(t, variance, VARIANCE), VARIANCE), NORM)
    if weight is None:
        return op.to(t, x, dtype, NORMED)
    return op.mul(t, weight, op.to(t, x, dtype, NORMED), NORMED)


def _fp32_norm(t: Tape, x: Tensor, weight: Tensor) -> Tensor:
    """Weighted in fp32, then cast back."""
    dtype = x.dtype
    x = op.to(t, x, "fp32", NORM)
    variance = op.mean(t, op.power(t, x, NORM), VARIANCE)
    x = op.mul(t, x, op.rsqrt(t, op.shift(t, variance, VARIANCE), VARIANCE), NORM)
    return op.to(t, op.mul(t, weight, x, NORM), dtype, NORMED)


def _gemma_norm(t: Tape, x: Tensor, weight: Tensor) -> Tensor:
    """The whole norm in fp32, its weight with one added in fp32, too."""
    out = _normed(t, op.to(t, x, "fp32", NORM))
    out = op.mul(t, out, op.shift(t, op.to(t, weight, "fp32", NORM), NORM), NORM)
    return op.to(t, out, x.dtype, NORMED)


def _normed(t: Tape, x: Tensor) -> Tensor:
    return op.mul(t, x, op.rsqrt(t, op.shift(t, op.mean(t, op.power(t, x, NORM), VARIANCE), VARIANCE), VARIANCE), NORM)


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


OF_INPUT: Final = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "mish", "gelu_10")
OF_OUTPUT: Final = ("relu", "tanh", "sigmoid")


def activate(t: Tape, x: Tensor, name: str) -> Tensor:
    """An activation function; those written in Python keep more than one kernel would."""
    if name in OF_INPUT:
        return op.of_input(t, x, ACTIVATION)
    if name in OF_OUTPUT:
        return op.of_output(t, x, ACTIVATION)
    if name in ("gelu_new", "gelu_python_tanh"):
        return _gelu_new(t, x)
    if name == "relu2":
        return op.power(t, op.of_output(t, x, ACTIVATION), ACTIVATION)
    raise unknown(f"activation {printable(name, 40)}")


def _gelu_new(t: Tape, x: Tensor) -> Tensor:
    """0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))."""
    return op.mul(
        t,
        op.scale(t, x, ACTIVATION),
        op.shift(t, op.of_output(t, _inner(t, x), ACTIVATION), ACTIVATION),
        ACTIVATION,
    )


def _inner(t: Tape, x: Tensor) -> Tensor:
    return op.scale(t, op.add(t, x, op.scale(t, op.power(t, x, ACTIVATION), ACTIVATION), ACTIVATION), ACTIVATION)


def unknown(what: str) -> HfvramError:
    """The error for what has no formula yet."""
    return HfvramError("usage", f"{what} has no formula for training yet: --method simulate runs the model's own code")
