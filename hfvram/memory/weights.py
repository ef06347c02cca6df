"""Weights and buffers as they stand on the GPU, in the order in which the model is built."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache

from hfvram.memory.bitsandbytes import BLOCK, NESTED_BLOCK
from hfvram.memory.forward import ELEMENT_BYTES
from hfvram.memory.timeline import Standing, Tag
from hfvram.model.architecture import Architecture
from hfvram.model.layers import Param
from hfvram.model.patterns import chosen

BNB = "bitsandbytes 0.49: functional.py quantize_4bit, int8_vectorwise_quant"
WEIGHTS = Tag("weights", "weights", "P·e", "the model's own tensors", "exact")
STORED = Tag("weights as stored", "weights", "the sizes in the safetensors headers", "safetensors headers", "exact")
QUANTIZED = Tag("weights, quantized", "weights", "", BNB, "exact")
SCALES = Tag("quantization scales", "weights", "", BNB, "exact")
PACKED = Tag("weights, packed", "weights", "", "stored formats of GPTQ, AWQ, compressed-tensors, ModelOpt", "derived")
ADAPTER = Tag("adapter", "weights", "", "PEFT 0.18: half precision is cast to fp32 when it is loaded", "exact")
BUFFERS = Tag("buffers", "buffers", "", "the model's own tensors", "exact")

LINEAR = ("linear",)
"""What bitsandbytes replaces: `nn.Linear` itself and `Conv1D`, no subclass (transformers 5.17, bitsandbytes.py)."""
BUFFER_BYTES = {"bool": 1, "int32": 4, "int64": 8, "complex64": 8, "uint8": 1, "int8": 1, "fp64": 8}
GROUP = 128
DEQUANTIZED = ("mxfp4",)
"""Formats that transformers turns into the model's dtype while loading, unless kernels for them are installed."""


def packed_bits(method: str) -> float | None:
    """Bits that one weight takes with its scales, None where the method's name does not tell.

    FP8: a byte and fp32 for a block of 128 × 128; NVFP4: 4 bits and a byte for 16; integers of n bits: fp16 scale and
    an n-bit zero point for a group of 128 (GPTQ, arXiv 2210.17323; AWQ, arXiv 2306.00978).

    >>> packed_bits("gptq-4"), packed_bits("fp8"), packed_bits("nvfp4")
    (4.15625, 8.001953125, 4.5)
    """
    if method in ("fp8", "nvfp4"):
        return {"fp8": 8 + 32 / GROUP**2, "nvfp4": 4 + 8 / 16}[method]
    if found := re.search(r"-(\d+)$", method):
        bits = int(found[1])
        return bits + (16 + bits) / GROUP if bits < 8 else bits + 16 / GROUP
    return None


def param_bytes(param: Param, dtype: str, quant: str, double_quant: bool) -> tuple[tuple[int, Tag], ...]:
    """The tensors that one parameter becomes, as (bytes, tag).

    bitsandbytes quantizes `nn.Linear` alone, never the head: 4 bits with one scale for 64 weights (fp32, or with double
    quantization one byte and fp32 for 256 of them), or int8 with fp32 for each row.
    Source: QLoRA, arXiv 2305.14314, section 3; LLM.int8(), arXiv 2208.07339; measured exactly (nf4 and int8 cases).
    """
    n = param.numel
    if param.kind in LINEAR and quant in ("nf4", "fp4"):
        blocks = -(-n // BLOCK)
        scales = (blocks, -(-blocks // NESTED_BLOCK) * 4, 256 * 4, 4) if double_quant else (blocks * 4,)
        return (((n + 1) // 2, QUANTIZED), *((s, SCALES) for s in scales), (16 * 4, SCALES))
    if param.kind in LINEAR and quant == "int8":
        return ((n, QUANTIZED), (param.shape[0] * 4, SCALES))
    bits = packed_bits(quant)
    if (
        bits
        and quant not in DEQUANTIZED
        and param.kind in ("linear", "linear_subclass", "experts")
        and len(param.shape) > 1
    ):
        return ((int(n * bits / 8), PACKED),)
    nbytes = n * {**ELEMENT_BYTES, **BUFFER_BYTES}[param.dtype or dtype]
    return ((nbytes, {"buffer": BUFFERS, "adapter": ADAPTER}.get(param.kind, WEIGHTS)),)


def sharded(param: Param, ranks: int, flat: bool = False) -> Param:
    """What the first of several ranks holds of a parameter that is split along its first dimension, as FSDP2 does, or
    flat, as ZeRO-3 does.

    >>> sharded(Param("x.weight", (10, 8)), 4).shape
    (3, 8)
    """
    if ranks == 1:
        return param
    rows = (-(-param.numel // ranks),) if flat else (-(-param.shape[0] // ranks), *param.shape[1:])
    return replace(param, shape=rows)


def quantized(architecture: Architecture, quant: str) -> Callable[[Param], bool]:
    """Which parameters bitsandbytes packs: linear layers, but what the checkpoint or the class leaves alone."""
    skipped = architecture.unquantized if quant == architecture.quantization else ()
    left_alone, kept_wide = chosen(skipped), chosen(architecture.fp32_in_fp16)

    def packs(param: Param) -> bool:
        if quant == "none" or param.kind not in LINEAR:
            return False
        return not (skipped and left_alone(param.name)) and not (architecture.fp32_in_fp16 and kept_wide(param.name))

    return packs


@lru_cache(maxsize=1024)
def standing(
    architecture: Architecture, dtype: str, quant: str, double_quant: bool, ranks: int = 1, flat: bool = False
) -> Standing:
    """Every tensor that stands before the first token, of `ranks` that share every parameter on the first.

    Where the checkpoint is quantized and its headers are known, those are its tensors, byte for byte.
    """
    if architecture.stored_sizes and quant == architecture.quantization and quant not in DEQUANTIZED:
        adapter = [x for p in architecture.adapter for x in param_bytes(p, dtype, "none", False)]
        return Standing((*((n, STORED) for n in architecture.stored_sizes), *adapter))
    found = tensors(architecture, dtype, quant, double_quant, ranks, flat)
    return Standing(tuple(x for _, sizes in found for x in sizes))


def tensors(
    architecture: Architecture, dtype: str, quant: str, double_quant: bool, ranks: int = 1, flat: bool = False
) -> Iterator[tuple[Param, tuple[tuple[int, Tag], ...]]]:
    """Every parameter, and what it becomes."""
    skipped = architecture.unquantized if quant == architecture.quantization else ()
    left_alone, kept_wide = chosen(skipped), chosen(architecture.fp32_in_fp16)
    for param in architecture.all_params:
        if param.kind != "buffer":
            param = sharded(param, ranks, flat)
        wide = bool(architecture.fp32_in_fp16) and kept_wide(param.name)  # and never quantized (quantizers/base.py)
        left = wide or (bool(skipped) and left_alone(param.name))
        own = "fp32" if wide and dtype == "fp16" else dtype
        yield param, param_bytes(param, own, "none" if left else quant, double_quant)
