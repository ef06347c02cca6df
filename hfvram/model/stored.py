"""How many of a model's parameters its files hold: packed words unpacked, buffers, scales and copies left out."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from hfvram.model.architecture import Architecture
from hfvram.read.checkpoint import StoredTensor

_NOT_PARAMETERS = re.compile(
    r"(^|\.)(inv_freq|cos_cached|sin_cached|masked_bias|causal_mask|position_ids|logit_bias_buffer"
    r"|num_batches_tracked|running_mean|running_var"
    r"|g_idx|qzeros|scales|absmax|nested_absmax|quant_map|nested_quant_map|SCB|weight_format"
    r"|weight_scale|weight_scale_2|weight_scale_inv|weight_zero_point|weight_shape|weight_g_idx|input_scale|output_scale"
    r"|input_global_scale|weight_global_scale|k_scale|v_scale|q_scale|activation_scale)$"
    r"|quant_state\.|_scales$|_blocks_shape$|(^|\.)attn\.bias$|(^|\.)attention\.bias$|_absmax$|\.scale$"
)
_PACKED = {"qweight": "gptq", "weight_packed": "packed"}
_TIED = re.compile(
    r"(^|\.)((lm_head|proj_out|embed_out|vocab_projector|generator_lm_head)\.weight"
    r"|(lm_head|predictions)\.decoder\.(weight|bias))$"
)
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_INTEGER_WORDS = {"I32": 32, "U32": 32, "I64": 64, "I16": 16, "U8": 8, "I8": 8}


@dataclass(frozen=True, slots=True)
class Stored:
    """`parameters` of the model that the files hold; `beyond` are those of layers that the model does not build."""

    parameters: int
    beyond: int
    sizes: tuple[int, ...]
    """Bytes of each tensor that is loaded, scales and packed words as they are stored."""


def count(tensors: Iterable[StoredTensor], architecture: Architecture) -> Stored:
    """Parameters by the headers, as the architecture's class would load them.

    A tensor of packed 4-bit words holds as many parameters as fit its bits; scales, zero points and buffers are none.
    Layers beyond the configuration's (multi-token prediction) and copies of tied tensors are not built.
    """
    bits = _bits(architecture.quantization)
    layers = max((len(s.layers) for s in architecture.stacks), default=0)
    tensors = list(tensors)
    names = {t.name for t in tensors}
    built = {p.name for p in architecture.all_params}
    parameters = beyond = 0
    sizes = []
    for tensor in tensors:
        leaf = tensor.name.rpartition(".")[2]
        layer = _LAYER.search(tensor.name)
        if (layer and layers and int(layer[1]) >= layers) or "mtp" in tensor.name.split("."):
            beyond += _elements(tensor, leaf, bits)
            continue
        if _is_copy(tensor.name, names, architecture):
            continue
        sizes.append(tensor.nbytes)
        if not _NOT_PARAMETERS.search(tensor.name) and not _is_filler(tensor.name, names, built):
            parameters += _elements(tensor, leaf, bits)
    return Stored(parameters, beyond, tuple(sizes))


def _elements(tensor: StoredTensor, leaf: str, bits: int) -> int:
    n = 1
    for size in tensor.shape:
        n *= size
    word = _INTEGER_WORDS.get(tensor.dtype)
    packed = (
        leaf in _PACKED
        or leaf.endswith("_blocks")
        or (word == 8 and bits == 4 and leaf in ("weight", "gate_up_proj", "down_proj"))
    )
    if word and packed:
        return n * word // bits
    return n


def _is_copy(name: str, names: set[str], architecture: Architecture) -> bool:
    """A tied tensor that is stored a second time: the head, an encoder-decoder's embeddings."""
    if architecture.tied_head and _TIED.search(name):
        return True
    base = re.sub(r"(encoder|decoder)\.embed_tokens\.weight$", "shared.weight", name)
    return base != name and base in names


def _is_filler(name: str, names: set[str], built: set[str]) -> bool:
    """A bias that GPTQ's packing wrote for a layer that has none."""
    module, _, leaf = name.rpartition(".")
    return leaf == "bias" and f"{module}.qweight" in names and name not in built


def _bits(quantization: str | None) -> int:
    """Bits of a packed weight: 4 unless the method's name says otherwise."""
    if quantization and (m := re.search(r"-(\d)$", quantization)):
        return int(m[1])
    return 8 if quantization in ("int8", "fp8") else 4
