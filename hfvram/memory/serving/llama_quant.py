"""What `llama-quantize` makes of a model: the type of each tensor in a mixture such as Q4_K_M, and so its bytes.

Most tensors get the mixture's own type, some more bits: the output, values, and the feed-forward's way down in the
first and last eighth of the layers and every third between. Taken as without `--tensor-type`, and with an importance
matrix where the mixture needs one. Files that others publish may have been made with other rules.

Source: llama.cpp b10635, src/llama-quant.cpp (llama_tensor_get_type_impl, tensor_allows_quantization).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

from hfvram.model.architecture import Architecture
from hfvram.model.gguf_names import Tensor
from hfvram.read.checkpoint import StoredTensor
from hfvram.read.gguf import block_sizes

BASES: Final = {
    "F32": "F32", "F16": "F16", "BF16": "BF16", "Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q5_0": "Q5_0", "Q5_1": "Q5_1",
    "Q8_0": "Q8_0", "Q2_K": "Q2_K", "Q2_K_S": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K",
    "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "Q6_K": "Q6_K", "IQ4_NL": "IQ4_NL",
    "IQ4_XS": "IQ4_XS", "IQ3_XXS": "IQ3_XXS", "IQ3_XS": "IQ3_S", "IQ3_S": "IQ3_S", "IQ3_M": "IQ3_S",
    "IQ2_XXS": "IQ2_XXS", "IQ2_XS": "IQ2_XS", "IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S", "IQ1_S": "IQ1_S", "IQ1_M": "IQ1_M",
    "TQ1_0": "TQ1_0", "TQ2_0": "TQ2_0", "MXFP4_MOE": "MXFP4",
}  # fmt: skip
"""Mixture → the type of most of its tensors."""
FALLBACKS: Final = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
}
"""What takes the place of a type whose blocks of 256 the rows don't divide into; of IQ types it is IQ4_NL."""
FEW_BITS: Final = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
_KEPT = re.compile(
    r"_norm\.weight$|ffn_gate_inp|altup|laurel|per_layer_model_proj|position_embd|token_types|conv|attn_rel_b"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model the rules look at."""

    layers: int
    attending: int
    """Layers with values of their own."""
    experts: int
    grouped: int
    """Attention heads for one of keys and values."""
    tied: bool


def quantized(tensors: Sequence[Tensor], a: Architecture, mixture: str, plain: str) -> tuple[StoredTensor, ...]:
    """The tensors as `llama-quantize` stores them; `plain` is the type of what stays as it was. Raises
    `missing_extra`."""
    sizes = block_sizes()
    first = a.attention
    shape = Shape(
        layers=len(a.text.layers),
        attending=sum(t.name.endswith(("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight")) for t in tensors),
        experts=a.moe.experts if a.moe else 0,
        grouped=first.heads // max(first.kv_heads, 1) if first else 1,
        tied=not any(t.name == "output.weight" for t in tensors),
    )
    found, values = [], 0
    for t in tensors:
        dtype = "F32" if t.fp32 or len(t.shape) < 2 else plain
        if mixture not in ("F32", "F16", "BF16") and not t.fp32 and len(t.shape) > 1 and keeps(t.name):
            dtype = fitting(type_of(t.name, len(t.shape), mixture, shape, values), t.shape[-1], sizes)
        values += t.name.endswith(("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight"))
        block, size = sizes[dtype]
        found.append(StoredTensor(t.name, dtype, t.shape, prod(t.shape) // block * size))
    return tuple(found)


def keeps(name: str) -> bool:
    """Whether a tensor may be quantized."""
    return name.endswith(".weight") and not _KEPT.search(name)


def fitting(dtype: str, columns: int, sizes: dict[str, tuple[int, int]]) -> str:
    """The type, or what takes its place where a row isn't whole blocks of it.

    >>> fitting("Q4_K", 2880, {"Q4_K": (256, 144), "Q5_0": (32, 22)})
    'Q5_0'
    """
    if columns % sizes[dtype][0] == 0:
        return dtype
    other = FALLBACKS.get(dtype, "IQ4_NL")
    return other if columns % sizes[other][0] == 0 else "F16"


def more_bits(i: int, n: int) -> bool:
    """The first and the last eighth of the layers, and every third between.

    >>> [i for i in range(32) if more_bits(i, 32)]
    [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    """
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def type_of(name: str, rank: int, mixture: str, s: Shape, values: int) -> str:
    """The type that a tensor gets in a mixture; `values` tensors of values came before it."""
    base = BASES[mixture]
    leaf = name.rpartition("blk.")[2]
    layer = int(leaf.partition(".")[0]) if name.startswith("blk.") else 0
    if name == "output.weight" or (s.tied and name.startswith("token_embd.")):
        return "Q8_0" if mixture == "MXFP4_MOE" or base == "Q8_0" else "Q5_K" if _coarse(mixture) else "Q6_K"
    if mixture == "MXFP4_MOE":
        return "MXFP4" if rank == 3 else "Q8_0"
    if name.startswith(("token_embd.", "per_layer_token_embd.")):
        if mixture in ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"):
            return "Q2_K"
        if mixture in ("IQ2_S", "IQ2_M", "IQ3_XXS"):
            return "IQ3_S"
        return "Q4_K" if mixture.startswith("TQ") else base
    if leaf.endswith(("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight")):
        return _values(mixture, base, s, values)
    if leaf.endswith(("attn_k.weight", "attn_q.weight")):
        if s.experts == 8 and leaf.endswith("attn_k.weight"):
            return "Q4_K" if mixture in FEW_BITS else "Q8_0"
        return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(mixture, base)
    if "ffn_down" in leaf:
        return _down(mixture, base, s, layer)
    if leaf.endswith("attn_output.weight"):
        return _output(mixture, base, s)
    if mixture == "IQ3_XS" and "ffn_" in leaf and s.layers // 8 <= layer < 7 * s.layers // 8:
        return "IQ3_XXS"
    return base


def _coarse(mixture: str) -> bool:
    return mixture in (*FEW_BITS, "IQ3_XXS")


def _values(mixture: str, base: str, s: Shape, i: int) -> str:
    """Values, alone or with queries and keys."""
    grouped = s.grouped >= 4
    if mixture in FEW_BITS:
        if grouped or s.experts >= 4:
            return "Q4_K"
        return "IQ3_S" if mixture in ("IQ2_S", "IQ2_M") else "Q2_K"
    found = {
        "Q2_K": "Q4_K" if grouped else "Q3_K",
        "Q2_K_S": "Q4_K" if grouped else base,
        "IQ3_XXS": "Q4_K" if grouped else "IQ3_XXS",
        "IQ3_XS": "Q4_K" if grouped else base,
        "IQ3_S": "Q4_K" if grouped else base,
        "IQ3_M": "Q4_K",
        "Q3_K_M": "Q5_K" if i < 2 else "Q4_K",
        "Q3_K_L": "Q5_K",
        "IQ4_NL": "Q5_K" if grouped else base,
        "IQ4_XS": "Q5_K" if grouped else base,
        "Q4_K_M": "Q6_K" if more_bits(i, s.attending) else base,
        "Q5_K_M": "Q6_K" if more_bits(i, s.attending) else base,
        "Q4_K_S": "Q5_K" if i < 4 else base,
    }.get(mixture, base)
    if s.layers == 80 and s.grouped > 1 and found in ("Q3_K", "Q4_K"):
        found = "Q5_K"  # a model of the size of Llama 2 70B
    return "Q8_0" if s.experts == 8 else found


def _down(mixture: str, base: str, s: Shape, i: int) -> str:
    """The feed-forward's way down, of all experts too."""
    early = i < s.layers // 8
    if mixture in FEW_BITS:
        return ("IQ3_S" if mixture in ("IQ2_S", "IQ2_M") else "Q2_K") if early else base
    return {
        "Q2_K": "Q3_K",
        "Q2_K_S": "Q4_K" if early else base,
        "Q3_K_M": "Q5_K" if i < s.layers // 16 else "Q4_K",
        "IQ3_M": "Q4_K" if early or (s.experts == 8 and more_bits(i, s.layers)) else base,
        "Q3_K_L": "Q5_K",
        "Q4_K_M": "Q6_K" if more_bits(i, s.layers) else base,
        "Q5_K_M": "Q6_K" if more_bits(i, s.layers) else base,
        "Q4_K_S": "Q5_K" if early else base,
    }.get(mixture, base)


def _output(mixture: str, base: str, s: Shape) -> str:
    """Attention's way out."""
    if s.experts == 8:
        small = (
            "Q2_K",
            "IQ3_XS",
            "IQ3_XXS",
            "Q3_K_S",
            "Q3_K_M",
            "IQ4_NL",
            "Q4_K_S",
            "Q4_K_M",
            "IQ3_S",
            "IQ3_M",
            "IQ4_XS",
        )
        return "Q5_K" if mixture in (*small, *FEW_BITS) else base
    found = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}
    few = {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}
    return (found | few).get(mixture, base)
