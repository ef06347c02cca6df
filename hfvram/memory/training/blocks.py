"""The small pieces of a layer with gradients, as transformers writes them: norms, activations.

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
NormCode = Literal["weight last", "weight in fp32", "weight cast", "plus one", "no weight", "wide"]
"""A norm's weight: after the cast back (Llama), before it (OLMo-2), cast to fp32 itself (Helium, Cohere), or with one
added (in fp32 in Gemma's RMSNorm, in its own dtype in Nemotron's LayerNorm). A LayerNorm is one kernel (`weight last`),
one in fp32 (`wide`, OLMo), or written out (`weight cast`)."""


def normalize(
    t: Tape, x: Tensor, weights: tuple[Tensor, ...], kind: NormKind, code: NormCode = "weight last"
) -> Tensor:
    """The norm of a layer: its weight and, for LayerNorm, its bias."""
    if kind == "layer" and code == "wide":
        return op.to(t, op.layer_norm(t, op.to(t, x, "fp32", NORM), None, None, NORM), x.dtype, NORMED)
    if kind == "layer" and code == "weight cast":
        return _written_out(t, x, weights[0])
    if kind == "layer" and code == "plus one":
        return _layer_norm_plus_one(t, x, *weights)
    if kind == "layer":
        return op.layer_norm(t, x, weights[0], weights[1] if len(weights) > 1 else None, NORMED)
    weight = weights[0] if weights else None
    if code == "no weight":
        return op.to(t, _normed(t, op.to(t, x, "fp32", NORM)), x.dtype, NORMED)
    if code == "plus one":
        return _gemma_norm(t, x, weights[0])
    if code == "weight in fp32":
        return _fp32_norm(t, x, weights[0])
    if code == "weight cast":
        return _cast_norm(t, x, weights[0])
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


def _cast_norm(t: Tape, x: Tensor, weight: Tensor) -> Tensor:
    """Weighted in fp32 by a weight that is cast, then cast back."""
    dtype = x.dtype
    x = op.to(t, x, "fp32", NORM)
    variance = op.mean(t, op.power(t, x, NORM), VARIANCE)
    x = op.mul(t, x, op.rsqrt(t, op.shift(t, variance, VARIANCE), VARIANCE), NORM)
    return op.to(t, op.mul(t, op.to(t, weight, "fp32", NORM), x, NORM), dtype, NORMED)


def _written_out(t: Tape, x: Tensor, weight: Tensor) -> Tensor:
    """LayerNorm without a bias, in fp32, written out."""
    dtype = x.dtype
    x = op.to(t, x, "fp32", NORM)
    mean = op.mean(t, x, VARIANCE)
    variance = op.mean(t, op.power(t, op.subtract(t, x, mean, NORM), NORM), VARIANCE)
    x = op.mul(t, op.subtract(t, x, mean, NORM), op.rsqrt(t, op.shift(t, variance, VARIANCE), VARIANCE), NORM)
    x = op.mul(t, op.to(t, weight, "fp32", NORM), x, NORM)
    return op.to(t, x, dtype, NORMED)


def _layer_norm_plus_one(t: Tape, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm whose weight has one added; under autocast all of it in its dtype."""
    weight = op.shift(t, weight, NORM)
    if t.autocast is None:
        return op.layer_norm(t, x, weight, bias, NORMED)
    low, t.autocast = t.autocast, None
    x, weight, bias = op.to(t, x, low, NORM), op.to(t, weight, low, NORM), op.to(t, bias, low, NORM)
    out = op.layer_norm(t, x, weight, bias, NORMED)
    t.autocast = low
    return out


def _gemma_norm(t: Tape, x: Tensor, weight: Tensor) -> Tensor:
    """The whole norm in fp32, its weight with one added in fp32, too."""
    out = _normed(t, op.to(t, x, "fp32", NORM))
    out = op.mul(t, out, op.shift(t, op.to(t, weight, "fp32", NORM), NORM), NORM)
    return op.to(t, out, x.dtype, NORMED)


def _normed(t: Tape, x: Tensor) -> Tensor:
    return op.mul(t, x, op.rsqrt(t, op.shift(t, op.mean(t, op.power(t, x, NORM), VARIANCE), VARIANCE), VARIANCE), NORM)


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
        applied = op.of_output(t, x, ACTIVATION)
        return op.power(t, applied, ACTIVATION)
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
