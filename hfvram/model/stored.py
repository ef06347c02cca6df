"""How many of a model's parameters its files hold: packed words unpacked, buffers, scales and copies left out."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from hfvram.model.architecture import Architecture
from hfvram.model.unpacked import weights_of
from hfvram.read.checkpoint import StoredTensor
from hfvram.read.headers import BITS

_NOT_PARAMETERS = re.compile(
    r"(^|\.)(inv_freq|cos_cached|sin_cached|masked_bias|causal_mask|position_ids|logit_bias_buffer"
    r"|num_batches_tracked|std_bias|std_scale|layer_scalar|running_mean|running_var"
    r"|g_idx|qzeros|scales|absmax|nested_absmax|quant_map|nested_quant_map|SCB|weight_format"
    r"|weight_scale|weight_scale_2|weight_scale_inv|weight_zero_point|weight_shape|weight_g_idx|input_scale|output_scale"
    r"|input_global_scale|weight_global_scale|k_scale|v_scale|q_scale|activation_scale)$"
    r"|quant_state\.|_scales$|_blocks_shape$|(^|\.)attn\.bias$|(^|\.)attention\.bias$|_absmax$|\.scale$"
)
WHOLE = ("I64", "I32", "BOOL")
"""Numbers that are no weights where they are not packed words: tables of a router, say."""
CORRECTION = "e_score_correction_bias"
"""Of a router: a buffer of most models, a parameter of some."""
_TIED = re.compile(
    r"(^|\.)((lm_head|proj_out|embed_out|vocab_projector|generator_lm_head)\.weight"
    r"|(lm_head|predictions)\.decoder\.(weight|bias))$"
)
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Stored:
    """`parameters` of the model that the files hold; `beyond` are those of layers that the model does not build."""

    parameters: int
    beyond: int
    sizes: tuple[int, ...]
    """Bytes of each tensor that is loaded, scales and packed words as they are stored."""
    told: bool = True
    """Whether the words and their dtypes tell how many parameters they hold."""


def count(tensors: Iterable[StoredTensor], architecture: Architecture) -> Stored:
    """Parameters by the headers, as the architecture's class would load them.

    A module of packed words holds as many parameters as fit its bits; scales, zero points and buffers are none. Layers
    beyond the configuration's (multi-token prediction) and copies of tied tensors are not built.
    """
    layers = max((len(s.layers) for s in architecture.stacks), default=0)
    tensors = list(tensors)
    names = {t.name for t in tensors}
    built = {p.name for p in architecture.all_params}
    leaves = {name.rpartition(".")[2] for name in built}
    gates = any(name.endswith("gate.bias") for name in built)
    within = {_within(name) for name in built}
    modules: dict[str, dict[str, StoredTensor]] = {}
    for tensor in tensors:
        module, _, leaf = tensor.name.rpartition(".")
        modules.setdefault(module, {})[leaf] = tensor
    packed = {module: weights_of(leaves, architecture.scheme) for module, leaves in modules.items()}
    parameters = beyond = 0
    told = True
    sizes = []
    for tensor in tensors:
        module, _, leaf = tensor.name.rpartition(".")
        held = packed[module]
        n = held[1] if held and leaf == held[0] else _elements(tensor, leaf)
        told = told and n is not None and tensor.dtype in BITS
        layer = _LAYER.search(tensor.name)
        if (layer and layers and int(layer[1]) >= layers) or "mtp" in tensor.name.split("."):
            beyond += 0 if _NOT_PARAMETERS.search(tensor.name) else n or 0
            continue
        if _is_copy(tensor.name, names, architecture):
            continue
        sizes.append(tensor.nbytes)
        beside = held is not None and leaf != held[0] and tensor.name not in built and leaf != "bias"
        beside = beside or (leaf == CORRECTION and leaf not in leaves) or (held is None and tensor.dtype in WHOLE)
        beside = beside or (tensor.name.endswith("gate.bias") and not gates)
        beside = beside or (bool(_NOT_PARAMETERS.search(tensor.name)) and _within(tensor.name) not in within)
        if not beside and not _is_filler(tensor.name, names, within):
            parameters += n or 0
    return Stored(parameters, beyond, tuple(sizes), told)


def _elements(tensor: StoredTensor, leaf: str) -> int:
    """Elements of a tensor on its own; fused experts of gpt-oss are two to a byte, and so are ModelOpt's."""
    n = prod(tensor.shape)
    two = leaf.endswith("_blocks") or leaf in ("gate_up_proj", "down_proj")
    return n * 2 if two and tensor.dtype in ("U8", "I8") else n


def _is_copy(name: str, names: set[str], architecture: Architecture) -> bool:
    """A tied tensor that is stored a second time: the head, an encoder-decoder's embeddings."""
    if architecture.tied_head and _TIED.search(name):
        return True
    base = re.sub(r"(encoder|decoder)\.embed_tokens\.weight$", "shared.weight", name)
    return base != name and base in names


def _is_filler(name: str, names: set[str], built: set[str]) -> bool:
    """A bias that GPTQ's packing wrote for a layer that has none. `built` are names from their layer on."""
    module, _, leaf = name.rpartition(".")
    return leaf == "bias" and f"{module}.qweight" in names and _within(name) not in built


def _within(name: str) -> str:
    """A name from its last layer on: what stands before differs between files and the model that is built of them."""
    return name[found.start() :] if (found := _LAYER.search(name)) else name
