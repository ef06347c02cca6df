"""Which module lands on which device: what `from_pretrained(device_map="auto")` works out, by its own code on meta.

transformers 5.17 (integrations/accelerate.py `_get_device_map`) balances the GPUs and places modules by its own
`get_balanced_memory` and `infer_auto_device_map`, which it took over from accelerate.
"""

import json
import logging
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from hfvram.errors import HfvramError
from hfvram.memory.bitsandbytes import ON_LOADING
from hfvram.memory.placement import Device
from hfvram.memory.weights import PACKED, QUANTIZED, tensors
from hfvram.model import meta
from hfvram.model.architecture import Architecture

ENOUGH_BYTES = 1 << 60
"""CPU memory where nobody says how much there is."""
ALONE = 0.9
"""The share of a GPU that is filled where there is only one, and of CPU memory (`get_max_memory`)."""


class Sizes:
    """Bytes of an element as a quantizer of transformers tells them: bitsandbytes counts no scales, and keeps a tenth
    of every device back for what quantizing takes (`adjust_max_memory`)."""

    def __init__(self, architecture: Architecture, dtype: str, quant: str, double_quant: bool) -> None:
        self.loading = quant in ON_LOADING
        self.each: dict[str, float] = {}
        for param, sizes in tensors(architecture, dtype, quant, double_quant):
            if sizes[0][1] is QUANTIZED:
                self.each[param.name] = 1.0 if quant == "int8" else 0.5
            elif sizes[0][1] is PACKED:
                self.each[param.name] = sizes[0][0] / param.numel

    def param_element_size(self, model: Any, name: str, param: Any) -> float:
        return self.each.get(name, float(param.element_size()))

    def adjust_max_memory(self, sizes: dict[Any, float]) -> dict[Any, float]:
        return {device: size * 0.9 for device, size in sizes.items()} if self.loading else sizes


def device_map(
    architecture: Architecture,
    config: Mapping[str, Any],
    dtype: str,
    quant: str,
    double_quant: bool,
    gpus: int,
    free_bytes: int,
    cpu_bytes: int | None,
) -> dict[str, Device]:
    """The device of each module where `gpus` GPUs have `free_bytes` each, and the CPU `cpu_bytes`; disk holds the rest.

    Raises `missing_extra` without accelerate, torch or transformers, and what `meta.build` raises.
    """
    text = json.dumps(config, sort_keys=True, default=str)
    return _device_map(architecture, text, dtype, quant, double_quant, gpus, free_bytes, cpu_bytes)


@lru_cache(maxsize=64)
def _device_map(
    architecture: Architecture,
    config: str,
    dtype: str,
    quant: str,
    double_quant: bool,
    gpus: int,
    free_bytes: int,
    cpu_bytes: int | None,
) -> dict[str, Device]:
    model = _model(config, architecture.class_name, dtype)
    from transformers.integrations.accelerate import get_balanced_memory, infer_auto_device_map

    room: dict[int | str, float] = dict.fromkeys(range(gpus), free_bytes * (ALONE if gpus == 1 else 1))
    room["cpu"] = ENOUGH_BYTES if cpu_bytes is None else cpu_bytes * ALONE
    whole = model._no_split_modules
    sizes = Sizes(architecture, dtype, quant, double_quant) if quant != "none" else None
    said = logging.getLogger("accelerate.utils.modeling")
    level = said.level
    said.setLevel(logging.ERROR)  # that these GPUs are not in this machine
    try:
        room = get_balanced_memory(model, room, whole, hf_quantizer=sizes)
        if sizes:
            room = sizes.adjust_max_memory(room)
        found: dict[str, Device] = infer_auto_device_map(
            model,
            max_memory=room,
            no_split_module_classes=whole,
            hf_quantizer=sizes,
            no_placement_params=getattr(model, "_no_placement_params", None),
        )
    finally:
        said.setLevel(level)
    return dict(found)


@lru_cache(maxsize=4)
def _model(config: str, class_name: str, dtype: str) -> Any:
    if find_spec("accelerate") is None:
        message = "placing a model over several GPUs needs accelerate: pip install 'hfvram[exact]'"
        raise HfvramError("missing_extra", message)
    return meta.build(json.loads(config), class_name, dtype)
