"""The model as the tracker sees it built: on meta, its weights and buffers in the order of construction."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hfvram.memory.exact.tracker import Tracker
from hfvram.model import meta

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOKENS = ("pad_token_id", "bos_token_id", "decoder_start_token_id")


def build(tracker: Tracker, config: Mapping[str, Any], class_name: str | None, dtype: str, attention: str) -> Any:
    """The model on meta, tracked while it is built.

    Raises `missing_extra`, `unknown_architecture` and `bad_config` as `meta.build` does.
    """
    with tracker, tracker.making("weights"):
        asked = "eager" if attention == "eager" else None  # sdpa is the default where it runs
        model = meta.build(config, class_name, dtype, attention=asked)
        settle(model)
        if dtype == "fp16":
            keep_fp32(model)
    return model


def keep_fp32(model: Any) -> None:
    """Parameters that `from_pretrained` leaves in fp32 where fp16 is asked for (T5's `wo`, which would overflow).

    Source: transformers 5.17, modeling_utils.py `_keep_in_fp32_modules`, core_model_loading.py.
    """
    kept = [name.replace("*", ".*") for name in model._keep_in_fp32_modules or ()]
    if not kept:
        return
    found = re.compile("|".join(kept))
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dtype == torch.float16 and found.search(f"{path}.{name}"):
                module._parameters[name] = torch.nn.Parameter(parameter.float(), parameter.requires_grad)


def settle(model: Any) -> None:
    """Fill in what a checkpoint brings along: ids of tokens that generation and shifted labels start with.

    Which ids they are changes no size. And all parameters are on meta, those too that are made of random numbers.
    """
    generation = getattr(model, "generation_config", None)
    if generation is not None and getattr(
        generation, "use_mtp", None
    ):  # MiniMax-M2's configuration names it, its generation_config.json does not
        generation.use_mtp = None
    padded = model.config.is_encoder_decoder or type(model).__name__.endswith("ForSequenceClassification")
    holders = [h for h in (generation, model.config if padded else None) if h is not None]
    for holder in holders:
        for name in TOKENS:
            if getattr(holder, name, None) is None:
                setattr(holder, name, 0)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type != "meta":
                module._parameters[name] = torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)


def in_order(module: Any) -> Iterator[Any]:
    """Every parameter and buffer in the order in which `to_empty` allocates them."""
    for child in module.children():
        yield from in_order(child)
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
