"""Weights and buffers as they stand on the GPU, in the order in which the model is built."""

from functools import lru_cache

from hfvram.memory.forward import ELEMENT_BYTES
from hfvram.memory.timeline import Standing, Tag
from hfvram.model.architecture import Architecture
from hfvram.model.layers import Param

WEIGHTS = Tag("weights", "weights", "P·e", "the model's own tensors", "exact")
QUANTIZED = Tag("weights, quantized", "weights", "", "bitsandbytes 0.49: Params4bit, Int8Params", "exact")
SCALES = Tag("quantization scales", "weights", "", "bitsandbytes 0.49: functional.py quantize_4bit, int8_vectorwise_quant", "exact")
BUFFERS = Tag("buffers", "buffers", "", "the model's own tensors", "exact")

LINEAR = ("linear", "linear_subclass")
BLOCK = 64
NESTED_BLOCK = 256


def param_bytes(param: Param, dtype: str, quant: str, double_quant: bool) -> tuple[tuple[int, Tag], ...]:
    """The tensors that one parameter becomes, as (bytes, tag).

    bitsandbytes quantizes `nn.Linear` alone, never the head: 4 bits with one scale for 64 weights (fp32, or with double
    quantization one byte and fp32 for 256 of them), or int8 with fp32 for each row.
    Source: QLoRA, arXiv 2305.14314, section 3; LLM.int8(), arXiv 2208.07339; measured exactly (truth, nf4 and int8).
    """
    n = param.numel
    if param.kind in LINEAR and quant in ("nf4", "fp4"):
        blocks = -(-n // BLOCK)
        scales = (blocks, -(-blocks // NESTED_BLOCK) * 4, 256 * 4, 4) if double_quant else (blocks * 4,)
        return (((n + 1) // 2, QUANTIZED), *((s, SCALES) for s in scales), (16 * 4, SCALES))
    if param.kind in LINEAR and quant == "int8":
        return ((n, QUANTIZED), (param.shape[0] * 4, SCALES))
    nbytes = n * ELEMENT_BYTES.get(param.dtype or dtype, 1)
    return ((nbytes, BUFFERS if param.kind == "buffer" else WEIGHTS),)


@lru_cache(maxsize=64)
def standing(architecture: Architecture, dtype: str, quant: str, double_quant: bool) -> Standing:
    """Every tensor that stands before the first token."""
    return Standing(tuple(x for p in architecture.all_params for x in param_bytes(p, dtype, quant, double_quant)))
