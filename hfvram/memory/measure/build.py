"""The model on the GPU: built from its configuration there, with the random weights that transformers gives it."""

import gc
from collections.abc import Mapping
from typing import Any

import torch

from hfvram.errors import HfvramError
from hfvram.memory.exact.build import DTYPES
from hfvram.model import meta
from hfvram.request import Request

PACKED = ("nf4", "fp4", "int8")


def build(config: Mapping[str, Any], class_name: str | None, request: Request, device: str) -> Any:
    """The model in its dtype, its linear layers quantized where the request says so.

    Raises what `meta.build` raises, `missing_extra` without bitsandbytes, `usage` for what is not measured.
    """
    model = meta.build(config, class_name, request.dtype, attention=request.attention, device=device)
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise HfvramError("usage", "measured are models of text: pictures and sound are not made up here")
    if request.quant in PACKED:
        quantize(model, request, device)
    clean(device)
    return model


def clean(device: str) -> None:
    """Give back what building left over."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def quantize(model: Any, request: Request, device: str) -> None:
    """bitsandbytes' layers in place of the linear ones, but for the head, as transformers loads them."""
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise HfvramError(
            "missing_extra", f"--quant {request.quant} on a GPU needs: pip install bitsandbytes"
        ) from error
    dtype = DTYPES[request.dtype]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and child is not head:
                setattr(module, name, _packed(bnb, child, request, dtype).to(device))
                del child
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = request.quant != "int8", request.quant == "int8"


def _packed(bnb: Any, layer: Any, request: Request, dtype: Any) -> Any:
    sizes = (layer.in_features, layer.out_features, layer.bias is not None)
    if request.quant == "int8":
        weight = layer.weight.data.to("cpu", torch.float16)
        new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        weight = layer.weight.data.to("cpu", dtype)
        packed = {"compress_statistics": request.double_quant, "quant_type": request.quant}
        new = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype, **packed, device="meta")
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, **packed, module=new)
    if layer.bias is not None:
        new.bias = layer.bias
    return new


def held_bytes(model: Any) -> tuple[int, int]:
    """Bytes of the parameters with what quantizes them, and of the buffers; shared storages once."""
    seen: set[int] = set()
    parameters = [
        *model.parameters(),
        *(t for p in model.parameters() for t in _states(getattr(p, "quant_state", None))),
    ]
    return _bytes(parameters, seen), _bytes(model.buffers(), seen)


def _states(state: Any) -> list[Any]:
    """Tensors of a quantization's state, that of its scales included."""
    if state is None:
        return []
    inner = getattr(state, "state2", None)
    own = [getattr(state, name, None) for name in ("absmax", "offset", "code")]
    return [t for t in own if isinstance(t, torch.Tensor)] + _states(inner)


def _bytes(tensors: Any, seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        key = tensor.untyped_storage()._cdata
        if key not in seen:
            seen.add(key)
            total += tensor.untyped_storage().nbytes()
    return total
