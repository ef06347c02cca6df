"""How many weights the packed tensors of one module hold, told by their own names, dtypes and shapes.

What is stored beside each other says how it is packed, so that a checkpoint with several methods, or one whose
configuration says nothing, counts right. Sources: those of `packing.py`; torchao 0.14, prototype/safetensors;
optimum-quanto 0.2.7, tensor/qbits.py; VPTQ, SpQR and AQLM, whose words do not tell.
"""

from collections.abc import Mapping
from math import prod
from typing import Final

from hfvram.model.packing import Scheme
from hfvram.read.checkpoint import StoredTensor

WORDS: Final = {"I32": 32, "U32": 32, "I64": 64, "I16": 16, "U8": 8, "I8": 8}
UNTOLD: Final = ("codes", "codebooks", "indices", "centroids", "dense_weights", "in_perm_values", "qweight_rvq")
"""Leaves of formats whose words do not tell how many weights they are."""
SCALES: Final = ("weight_scale", "scale", "scales", "weight_scale_inv")

Leaves = Mapping[str, StoredTensor]


def weights_of(leaves: Leaves, scheme: Scheme | None) -> tuple[str, int | None] | None:
    """The leaf that holds a module's packed weights and their number, None for that where nothing tells; None alone
    where nothing is packed. `scheme` is the configuration's, for what the tensors leave open."""
    bits = _bits(scheme)
    if any(leaf in leaves for leaf in UNTOLD):
        return next(leaf for leaf in UNTOLD if leaf in leaves), None
    if (words := leaves.get("qweight")) is not None:
        return "qweight", _in_words(words, _bits_by_zeros(leaves) or bits)
    for leaf in ("weight_packed", "W_q", "_weight_qdata", "weight._data", "_data"):
        if (words := leaves.get(leaf)) is not None:
            four = leaf == "weight_packed" and words.dtype in ("U8", "I8")
            return leaf, _in_words(words, 4 if four else bits)
    weight = leaves.get("weight")
    if weight is None or weight.dtype not in WORDS:
        return None
    scales = next((leaves[leaf] for leaf in SCALES if leaf in leaves), None)
    if "biases" in leaves and scales is not None and scheme is not None and scheme.group:
        return "weight", prod(scales.shape) * scheme.group
    if scales is not None and _halves(weight, scales):
        return "weight", 2 * prod(weight.shape)
    return "weight", _in_words(weight, bits if bits in (2, 4) else WORDS[weight.dtype])


def _halves(weight: StoredTensor, scales: StoredTensor) -> bool:
    """Whether a byte is two numbers: a scale goes with 16 of them (NVFP4) or 32 (MXFP4)."""
    if WORDS[weight.dtype] != 8 or not weight.shape or len(weight.shape) != len(scales.shape):
        return False
    return scales.shape[-1] > 0 and 2 * weight.shape[-1] in (16 * scales.shape[-1], 32 * scales.shape[-1])


def _bits_by_zeros(leaves: Leaves) -> int | None:
    """Bits by GPTQ's and AWQ's zero points, of which there are as many as scales."""
    zeros, scales = leaves.get("qzeros"), leaves.get("scales")
    if zeros is None or scales is None or not scales.shape or not scales.shape[-1] or not zeros.shape:
        return None
    bits = zeros.shape[-1] * WORDS.get(zeros.dtype, 32) / scales.shape[-1]
    return int(bits) if bits in (2, 3, 4, 8) else None


def _in_words(words: StoredTensor, bits: int) -> int:
    return prod(words.shape) * WORDS.get(words.dtype, bits) // bits


def _bits(scheme: Scheme | None) -> int:
    """Bits of a packed weight: 4 unless the method's name says otherwise."""
    number = scheme.method.rpartition("-")[2] if scheme else ""
    if number.isdigit() and 1 <= int(number) <= 8:
        return int(number)
    return 8 if scheme and scheme.method in ("int8", "fp8") else 4
