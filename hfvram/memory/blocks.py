"""The small pieces that every layer is made of, as transformers computes them without gradients: norms, rotary
positions, activation functions. Each writes its allocations in the order of the code and returns its output's handle.

b sequences of s tokens, h hidden size, e bytes of an element.
Source: transformers 5.17, models/llama/modeling_llama.py and activations.py; checked event by event on the meta device.
"""

from typing import Literal

from hfvram.memory.forward import Forward
from hfvram.memory.timeline import Tag, Timeline
from hfvram.model.layers import Param

HIDDEN = Tag("hidden states", "activations", "b·s·h·e", "transformers 5.17: residual stream of a decoder layer")
NORM = Tag("normalization in fp32", "activations", "b·s·h·4", "transformers 5.17: LlamaRMSNorm.forward")
ROTARY = Tag("rotary embedding, temporaries", "activations", "b·s·a·d·e", "transformers 5.17: apply_rotary_pos_emb")
DEQUANTIZED = Tag("weights dequantized for a product", "activations", "", "bitsandbytes 0.49: dequantize_4bit")
INT8 = Tag("inputs and products in 8 and 32 bits", "activations", "", "bitsandbytes 0.49: MatMul8bitLt")
ACTIVATION = Tag("feed-forward, activation function", "activations", "b·s·f·e", "transformers 5.17: activations.py")


def normalize(t: Timeline, f: Forward, width: int, kind: Literal["rms", "layer"], tag: Tag = HIDDEN) -> int:
    """RMSNorm computes in fp32 and casts back (4 to 8 bytes an element on the way); LayerNorm is one kernel."""
    nbytes, wide = f.bytes(width), f.fp32_bytes(width)
    if kind == "layer":
        return t.alloc(nbytes, tag)
    upcast = t.alloc(wide, NORM) if f.half else None
    t.moment(NORM, wide)  # the square
    scaled = t.alloc(wide, NORM)
    if upcast is not None:
        t.free(upcast)
        cast = t.alloc(nbytes, NORM)
        out = t.alloc(nbytes, tag)
        t.free(cast, scaled)
    else:
        out = t.alloc(nbytes, tag)
        t.free(scaled)
    return out


def project(t: Timeline, f: Forward, inputs: int, outputs: int, tag: Tag) -> int:
    """A linear layer. In 4 bits its weight is dequantized for the product; in 8 bits the input is quantized, and the
    product is int32 before it is fp16 (LLM.int8(), arXiv 2208.07339; bitsandbytes 0.49, autograd/_functions.py)."""
    if f.quant in ("nf4", "fp4"):
        weight = t.alloc(inputs * outputs * f.element_bytes, DEQUANTIZED)
        out = t.alloc(f.bytes(outputs), tag)
        t.free(weight)
        return out
    if f.quant == "int8":
        cast = [] if f.dtype == "fp16" else [t.alloc(f.rows * inputs * 2, INT8)]
        quantized, product = t.alloc(f.rows * inputs, INT8), t.alloc(f.rows * outputs * 4, INT8)
        half = t.alloc(f.rows * outputs * 2, tag)
        t.free(product)
        if cast:
            out = t.alloc(f.bytes(outputs), tag)
            t.free(half)
            half = out
        t.free(quantized, *cast)
        return half
    return t.alloc(f.bytes(outputs), tag)


def split_project(
    t: Timeline, f: Forward, params: tuple[Param, ...], inputs: int, outputs: int, tag: Tag, how: str = "columns"
) -> int:
    """A linear layer of which a tensor parallel rank may have a part: of columns, which are gathered where the code
    reads all of them, or of rows, whose products are summed in place, a bias added after it in another tensor.

    Source: transformers 5.17, distributed/tensor_parallel.py; PyTorch 2.13, distributed/tensor/_redistribute.py.
    """
    splits = [p for p in params if p.split and p.split.how.startswith(how)]
    split = splits[0].split if splits else None
    if split is None:
        return project(t, f, inputs, outputs, tag)
    own = [t.alloc(f.bytes(inputs) // split.ranks, tag)] if split.how == "rows of parts" else []
    gathered = split.how == "columns, gathered"
    out = project(t, f, inputs, outputs // split.ranks if gathered else outputs, tag)
    t.free(*own)
    if gathered:
        buffer, parts, whole = (t.alloc(f.bytes(outputs), tag) for _ in range(3))
        t.free(buffer, parts, out)
        return whole
    if how == "rows" and any(p.kind == "bias" for p in splits):
        added = t.alloc(f.bytes(outputs), tag)
        t.free(out)
        return added
    return out


def rotate(t: Timeline, nbytes: int, rotated: int, tag: Tag) -> int:
    """x·cos + rotate_half(x)·sin over `rotated` of `nbytes`; what is not rotated is joined to it by a copy."""
    scaled = t.alloc(rotated, ROTARY)
    negative = t.alloc(rotated // 2, ROTARY)
    half = t.alloc(rotated, ROTARY)
    t.free(negative)
    sine = t.alloc(rotated, ROTARY)
    t.free(half)
    if rotated == nbytes:
        out = t.alloc(rotated, tag)
        t.free(scaled, sine)
        return out
    part = t.alloc(rotated, ROTARY)
    t.free(scaled, sine)
    out = t.alloc(nbytes, tag)
    t.free(part)
    return out


def activate(t: Timeline, nbytes: int, name: str) -> int:
    """An activation function; those written in Python hold more than their output."""
    if name == "gelu_bloom":
        halved, slope, scaled = (t.alloc(nbytes, ACTIVATION) for _ in range(3))
        for _ in range(2):  # the square, and one more than it
            scaled = _then(t, scaled)
        inner = t.alloc(nbytes, ACTIVATION)
        t.free(slope, scaled)
        for _ in range(2):  # tanh, and one more than it
            inner = _then(t, inner)
        out = t.alloc(nbytes, ACTIVATION)
        t.free(halved, inner)
        return out
    if name in ("gelu_new", "gelu_fast", "gelu_python"):
        halved = t.alloc(nbytes, ACTIVATION)
        slopes = [t.alloc(nbytes, ACTIVATION)] if name == "gelu_fast" else []
        cube = t.alloc(nbytes, ACTIVATION)
        scaled = t.alloc(nbytes, ACTIVATION)
        t.free(cube, *slopes)
        inner = t.alloc(nbytes, ACTIVATION)
        t.free(scaled)
        out = t.alloc(nbytes, ACTIVATION)
        t.free(halved, inner)
        return out
    if name in ("quick_gelu", "relu2", "xielu"):
        first = t.alloc(nbytes, ACTIVATION)
        out = t.alloc(nbytes, ACTIVATION)
        t.free(first)
        return out
    return t.alloc(nbytes, ACTIVATION)


def _then(t: Timeline, old: int) -> int:
    """A tensor of the same size computed from another, which nothing holds after it."""
    new = t.alloc(t.sizes[old], t.tags[old])
    t.free(old)
    return new
