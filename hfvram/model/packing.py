"""How one method packs a weight: the tensors that a matrix becomes, in bytes, words first.

n = rows · columns of a linear layer, g weights of a row to a scale, b bits. Sources: GPTQ, arXiv 2210.17323, and AWQ,
arXiv 2306.00978, as AutoGPTQ's and AutoAWQ's files hold them (`qweight`, `scales`, `qzeros`, `g_idx`);
compressed-tensors 0.15, compressors/; transformers 5.17, integrations/finegrained_fp8.py, mxfp4.py, aqlm.py, eetq.py;
NVIDIA ModelOpt 0.37, export/quant_utils.py; HQQ 0.2, core/quantize.py; MLX 0.29, nn/layers/quantized.py.
"""

import re
from dataclasses import dataclass, replace
from typing import Final

from hfvram.model.layers import Param
from hfvram.model.patterns import chosen

SCALED_BY_ROW: Final = 0
"""A group that is a whole row, which methods write as −1 or as `channel`."""
LINEAR: Final = ("linear", "linear_subclass", "experts")
ROUTERS: Final = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.\w+)?$")
"""Routers of experts are no plain linear layers to any method."""
GATES: Final = re.compile(r"(^|\.)shared_expert_gate(\.\w+)?$")
Exceptions = tuple[tuple[tuple[str, ...], str], ...]


@dataclass(frozen=True, slots=True)
class Scheme:
    """A method with its parameters, and the modules to which it does something else."""

    method: str
    group: int = 128
    """Weights of a row that share a scale; 0 for all of them."""
    block: tuple[int, int] | None = None
    """FP8 by blocks; without, one scale a tensor or, with `by_row`, a row."""
    by_row: bool = False
    zeros: bool = True
    """Each scale has a zero point in as many bits as a weight."""
    ordered: bool = True
    """GPTQ's order of the inputs is kept, 4 B for each."""
    scale_bytes: int = 2
    static: bool = False
    """Scales of the inputs are stored, too: one a matrix."""
    loader: str = ""
    """The configuration's `quant_method`."""
    experts: str | None = None
    """What the experts are in where that is not `method`."""
    exceptions: Exceptions = ()
    """Modules that another method packs, or none (`none`); the first that means a module decides."""
    alone: bool = False
    """Nothing but what `exceptions` name is packed."""
    codebook: tuple[int, int, int, int] | None = None
    """AQLM: codebooks, bits of a code, inputs and outputs to a code."""

    def of(self, name: str, kind: str = "linear") -> str:
        """The method that packs a parameter, `none` where nothing does."""
        if kind == "experts" and self.experts:
            return self.experts
        for patterns, method in self.exceptions:
            if chosen(patterns)(name):
                return method
        everything = self.method.startswith("mlx")  # which packs embeddings and heads as well
        return self.method if not self.alone and (everything or kind in LINEAR) else "none"


def plain(method: str) -> Scheme:
    """A method as its own tools have it where nothing else is said.

    >>> plain("gptq-4").group, plain("hqq-4").group, plain("fp8").block
    (128, 64, (128, 128))
    """
    kind = method.partition("-")[0]
    group = {"hqq": 64, "mlx": 64, "eetq": SCALED_BY_ROW, "bitnet": SCALED_BY_ROW}.get(kind, 128)
    return Scheme(method, group=group, block=(128, 128) if method == "fp8" else None)


def by_method(scheme: Scheme, method: str) -> Scheme:
    """The scheme of a part that another method packs, in groups of the same size."""
    return scheme if method in (scheme.method, "none") else replace(scheme, method=method)


def is_known(scheme: Scheme) -> bool:
    """Whether sizes follow from the method and its parameters."""
    methods = [scheme.method, *(m for _, m in scheme.exceptions), *([scheme.experts] if scheme.experts else [])]
    known = ("none", "nf4", "fp4")  # what bitsandbytes makes of a matrix is memory's to say
    return all(m in known or matrix_bytes(by_method(scheme, m), 256, 256) is not None for m in methods)


def matrix_bytes(s: Scheme, rows: int, columns: int) -> tuple[int, ...] | None:
    """The tensors of a matrix of `rows` outputs and `columns` inputs, None where the method does not say.

    >>> matrix_bytes(plain("gptq-4"), 256, 512)  # n/2; 1,024 scales, and zero points of 4 bits; 512 inputs
    (65536, 2048, 512, 2048)
    >>> matrix_bytes(plain("nvfp4"), 256, 512)  # n/2; a byte for 16; one fp32 for the weights, one for the inputs
    (65536, 8192, 4, 4)
    """
    kind, _, bits = s.method.partition("-")
    b = int(bits) if bits.isdigit() else 0
    n = rows * columns
    a_row = -(-columns // s.group) if s.group else 1
    scales = rows * a_row
    match kind:
        case "fp8":
            inputs = (4,) if s.static else ()
            if s.block:
                return n, -(-rows // s.block[0]) * -(-columns // s.block[1]) * 4, *inputs
            return n, rows * s.scale_bytes if s.by_row else 4, *inputs
        case "nvfp4":
            return -(-n // 2), rows * -(-columns // 16), 4, 4
        case "mxfp4":
            return -(-n // 2), rows * -(-columns // 32)
        case "mxfp8":
            return n, rows * -(-columns // 32)
        case "int8":
            return n, rows * s.scale_bytes
        case "aqlm" if s.codebook:
            books, code, wide, high = s.codebook
            codes = -(-rows // high) * -(-columns // wide) * books * -(-code // 8)
            return codes, books * 2**code * wide * high * 2, -(-rows // high) * 2
        case "bitnet" if b:
            return -(-n * b // 8), s.scale_bytes
        case "eetq" if b:
            return -(-n * b // 8), rows * 2
        case "gptq" | "awq" if b:
            order = (columns * 4,) if s.ordered and kind == "gptq" else ()
            return _words(rows, columns, b), scales * 2, -(-scales * b // 8), *order
        case "int" if b and s.loader == "torchao":
            return -(-n * b // 8), scales * (4 if b < 8 else 2)
        case "int" if b:
            zeros = (a_row * -(-rows * b // 32) * 4,) if s.zeros else ()
            return _words(rows, columns, b), scales * s.scale_bytes, *zeros
        case "hqq" | "mlx" if b:
            return -(-n * b // 8), scales * 2, scales * 2
        case "quanto" if b:
            return (n, rows * 2) if b == 8 else (-(-n * b // 8), scales * 2, scales * 2)
    return None


def _words(rows: int, columns: int, bits: int) -> int:
    """Rows packed into words of 32 bits, each begun anew.

    >>> _words(2, 100, 4)
    104
    """
    return rows * -(-columns * bits // 32) * 4


def packed_bytes(s: Scheme, param: Param) -> tuple[int, ...] | None:
    """The tensors that a parameter becomes, None where it stays as it is: experts are as many matrices."""
    around = param.kind in ("embedding", "head") and s.of(param.name, param.kind) != "none"
    if len(param.shape) < 2 or not (param.kind in LINEAR or around):
        return None
    gate = s.method == "fp8" and s.loader == "" and GATES.search(param.name)  # a plain linear layer to transformers
    if (ROUTERS.search(param.name) and not gate) or param.name.endswith("_bias"):
        return None
    if len(param.shape) > 2:
        experts = param.shape[0] if param.kind == "experts" else 1
        rows = param.numel // experts // param.shape[-1]
        sizes = matrix_bytes(s, rows, param.shape[-1])
        return None if sizes is None else tuple(n * experts for n in sizes)
    return matrix_bytes(s, *param.shape)
