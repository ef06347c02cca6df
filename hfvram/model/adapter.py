"""A PEFT adapter on a model: the tensors that it adds, from its files or from its configuration.

Source: PEFT 0.18, tuners/lora/layer.py and config.py; adapters in half precision are cast to fp32 when they are loaded
(`autocast_adapter_dtype`).
"""

import re
from collections.abc import Iterator
from dataclasses import replace

from hfvram.errors import HfvramError, printable
from hfvram.model.architecture import Architecture
from hfvram.model.config import Config
from hfvram.model.layers import Param
from hfvram.read.checkpoint import Adapter

TARGETS = ("linear", "linear_subclass", "conv", "embedding", "other", "head")
ALL_LINEAR = ("linear", "linear_subclass")
DEFAULT_TARGETS = ("q_proj", "v_proj")
OTHER_DEFAULTS = {
    "query_key_value": ("bloom", "gpt_neox", "falcon"),
    "c_attn": ("gpt2", "gpt_bigcode"),
    "Wqkv": ("mpt",),
    "in_proj": ("deberta",),
    "q v": ("t5", "mt5", "umt5"),
    "query value": ("bert", "roberta", "xlm-roberta", "electra", "vit"),
    "query_proj value_proj": ("deberta-v2",),
    "q_proj v_proj fc1 fc2": ("phi",),
    "in_proj x_proj dt_proj out_proj": ("mamba",),
}
"""What PEFT targets where a configuration names nothing. Source: PEFT 0.18, utils/constants.py."""


def with_adapter(architecture: Architecture, adapter: Adapter) -> Architecture:
    """The architecture and the adapter's tensors. Raises `usage` for a kind of adapter whose sizes only its files tell,
    and for targets that match nothing."""
    if adapter.tensors is not None:
        params = tuple(Param(t.name, t.shape, "adapter", "fp32") for t in adapter.tensors)
    else:
        params = tuple(_lora(architecture, adapter))
    return replace(architecture, adapter=params)


def _lora(architecture: Architecture, adapter: Adapter) -> Iterator[Param]:
    config = Config(adapter.config)
    kind = config.text("peft_type", default="")
    if kind.upper() != "LORA":
        what = printable(kind or "of no type", 40)
        why = "its tensors can't be read, and only LoRA's sizes follow from a configuration"
        raise HfvramError("usage", f"the adapter {adapter.id} is {what}: {why}")
    rank, ranks = config.size("r"), config.section("rank_pattern") or Config({})
    saved = config.strings("modules_to_save") or []
    found = False
    for param in architecture.all_params:
        module = param.name.removesuffix(".weight")
        if module == param.name or len(param.shape) != 2 or param.kind not in TARGETS:
            continue
        if any(module == name or module.endswith(f".{name}") for name in saved):
            yield Param(f"{module}.modules_to_save.weight", param.shape, "adapter", "fp32")
        elif targeted(config, param, module, architecture.model_type):
            found = True
            outputs, inputs = param.shape
            r = next((ranks.size(key) for key in ranks.values if re.search(rf"(.*\.)?{key}$", module)), rank)
            yield Param(f"{module}.lora_A.weight", (r, inputs), "adapter", "fp32")
            yield Param(f"{module}.lora_B.weight", (outputs, r), "adapter", "fp32")
            if config.flag("use_dora"):
                yield Param(f"{module}.lora_magnitude_vector", (outputs,), "adapter", "fp32")
    if not found:
        raise HfvramError(
            "usage", f"the targets of the adapter {adapter.id} match no module of {architecture.class_name}"
        )


def targeted(config: Config, param: Param, module: str, model_type: str) -> bool:
    """Whether `target_modules` means this module: names and endings of names, one regular expression, or all linear."""
    targets = config.get("target_modules")
    if targets == "all-linear":
        return param.kind in ALL_LINEAR
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, module) is not None
        except re.error:
            raise HfvramError("bad_config", "adapter_config.json: target_modules is no regular expression") from None
    names = config.strings("target_modules") or defaults(model_type)
    layers = config.items("layers_to_transform") if isinstance(config.get("layers_to_transform"), list) else None
    if layers is not None and (index := re.search(r"\.(\d+)\.", module)) and int(index[1]) not in layers:
        return False
    return any(module == name or module.endswith(f".{name}") for name in names)


def defaults(model_type: str) -> list[str]:
    """The modules that PEFT targets for a model type when a configuration names none."""
    return next(
        (names.split() for names, types in OTHER_DEFAULTS.items() if model_type in types), list(DEFAULT_TARGETS)
    )
