"""Weights and buffers as they stand on the GPU, in the order in which the model is built."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache

from hfvram.memory.bitsandbytes import BLOCK, NESTED_BLOCK
from hfvram.memory.forward import ELEMENT_BYTES
from hfvram.memory.generation import MEASURED
from hfvram.memory.timeline import Standing, Tag
from hfvram.model.architecture import Architecture
from hfvram.model.layers import Param
from hfvram.model.packing import Scheme, by_method, packed_bytes, plain
from hfvram.model.patterns import chosen
from hfvram.request import Request

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
DEQUANTIZED = ("mxfp4",)
"""Formats that transformers turns into the model's dtype while loading, unless kernels for them are installed."""
FP8_FROM = (8, 9)
CONV1D = ("gpt2", "openai-gpt")
"""Types whose linear layers are no `nn.Linear`, which fp8 alone replaces (integrations/finegrained_fp8.py)."""
UNPACKED = ("compressed-tensors",)
"""Loaders that turn weights into the model's dtype at the first pass, whatever their format."""


def scheme_of(architecture: Architecture, quant: str) -> Scheme:
    """How weights are packed: as the checkpoint has it, or as the method's own tools do by default."""
    own = architecture.scheme
    if own is not None and quant == architecture.quantization:
        return own
    made = plain(quant)
    return replace(made, alone=True) if quant == "fp8" and architecture.model_type in CONV1D else made


def dequantized(architecture: Architecture, quant: str) -> bool:
    """Whether transformers computes in the model's dtype with weights that it turns into that, for good.

    Source: transformers 5.17, quantizers/quantizer_mxfp4.py; quantizer_compressed_tensors.py, which leaves them packed
    until the first pass, where compressed-tensors unpacks all of them.
    """
    own = quant == architecture.quantization
    return own and (quant in DEQUANTIZED or scheme_of(architecture, quant).loader in UNPACKED)


def computed(architecture: Architecture, request: Request) -> str:
    """The format that weights stand and are computed with in: `none` for the model's own dtype."""
    quant = request.quant if request.quant != "auto" else architecture.quantization or "none"
    fp8 = quant == architecture.quantization == "fp8" and scheme_of(architecture, quant).loader == "fp8"
    return "none" if dequantized(architecture, quant) or (fp8 and not keeps_fp8(request)) else quant


def keeps_fp8(request: Request) -> bool:
    """Whether the GPU computes with fp8 (transformers 5.17, quantizers/quantizer_finegrained_fp8.py)."""
    major, _, minor = (request.compute_capability or MEASURED).partition(".")
    return (int(major), int(minor)) >= FP8_FROM


def param_bytes(
    param: Param, dtype: str, quant: str, double_quant: bool, scheme: Scheme | None = None
) -> tuple[tuple[int, Tag], ...]:
    """The tensors that one parameter becomes, as (bytes, tag).

    bitsandbytes quantizes `nn.Linear` alone, never the head: 4 bits with one scale for 64 weights (fp32, or with double
    quantization one byte and fp32 for 256 of them), or int8 with fp32 for each row.
    Source: QLoRA, arXiv 2305.14314, section 3; LLM.int8(), arXiv 2208.07339; measured exactly (nf4 and int8 cases).
    """
    n = param.numel
    scheme = scheme or plain(quant)
    if param.kind in LINEAR and quant in ("nf4", "fp4"):
        blocks = -(-n // BLOCK)
        scales = (blocks, -(-blocks // NESTED_BLOCK) * 4, 256 * 4, 4) if double_quant else (blocks * 4,)
        return (((n + 1) // 2, QUANTIZED), *((s, SCALES) for s in scales), (16 * 4, SCALES))
    if quant == "int8" and scheme.loader in ("", "bitsandbytes"):
        if param.kind in LINEAR:
            return ((n, QUANTIZED), (param.shape[0] * 4, SCALES))
    elif quant != "none" and (sizes := packed_bytes(scheme, param)):
        return tuple((size, PACKED) for size in sizes)
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
    own = quant == architecture.quantization
    if architecture.stored_sizes and own and not dequantized(architecture, quant):
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
    scheme = scheme_of(architecture, quant)
    plain_dtype = quant == "none" or dequantized(architecture, quant)
    wide_biases: set[str] = set()
    for param in architecture.all_params:
        if param.kind != "buffer":
            param = sharded(param, ranks, flat)
        wide = bool(architecture.fp32_in_fp16) and kept_wide(param.name)  # and never quantized (quantizers/base.py)
        left = wide or (bool(skipped) and left_alone(param.name))
        own = "fp32" if wide and dtype == "fp16" else dtype
        method = "none" if left or plain_dtype else scheme.of(param.name, param.kind)
        module = param.name.rpartition(".")[0]
        if method == "fp8" and scheme.loader in ("", "fp8") and param.kind in LINEAR:
            wide_biases.add(module)  # (integrations/finegrained_fp8.py, FP8Linear)
        elif param.kind == "bias" and module in wide_biases:
            own = "fp32"
        yield param, param_bytes(param, own, method, double_quant, by_method(scheme, method))
