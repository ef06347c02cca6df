"""A PEFT adapter on a model: the tensors that it adds, from its files or from its configuration.

Source: PEFT 0.21, tuners/lora/layer.py and config.py; adapters in half precision are cast to fp32 when they are loaded
(`autocast_adapter_dtype`).
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from hfvram.errors import HfvramError, printable
from hfvram.model.architecture import Architecture
from hfvram.model.config import Config
from hfvram.model.layers import Param
from hfvram.model.patterns import Clock, expression, paths
from hfvram.read.checkpoint import Adapter

TARGETS = ("linear", "linear_subclass", "conv", "embedding", "other", "head")
ALL_LINEAR = ("linear", "linear_subclass")
CONV1D = ("gpt2",)
"""Model types whose projections lie as (inputs, outputs)."""
CLASSIFIERS = dict.fromkeys(("SEQ_CLS", "TOKEN_CLS"), ("classifier", "score"))
"""Heads that PEFT trains whole for a task, beside the adapter. Source: PEFT 0.21, peft_model.py."""
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
    "qkv_proj": ("codegen",),
    "q_proj k_proj v_proj o_proj": ("nemotron_h",),
    "in_proj x_proj dt_proj out_proj": ("mamba",),
}
"""What PEFT targets where a configuration names nothing. Source: PEFT 0.21, utils/constants.py."""


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
    rank, ranks = config.size("r"), _Ranks(config.section("rank_pattern") or Config({}))
    wanted = _targets(config, architecture)
    tensors = _listed(config.strings("target_parameters") or [], None)
    saved = {*(config.strings("modules_to_save") or ()), *CLASSIFIERS.get(config.text("task_type", default=""), ())}
    found = False
    for param in architecture.all_params:
        if saved and param.kind != "buffer" and not saved.isdisjoint(paths(param.name)):
            yield Param(f"{param.name}.modules_to_save", param.shape, "adapter", "fp32")
            continue
        if param.kind != "buffer" and len(param.shape) in (2, 3) and tensors(param.name):
            found = True
            r = (ranks.of(param.name) or rank) * (param.shape[0] if len(param.shape) == 3 else 1)
            yield Param(f"{param.name}.lora_A", (r, param.shape[-1]), "adapter", "fp32")
            yield Param(f"{param.name}.lora_B", (param.shape[-2], r), "adapter", "fp32")
            continue
        module = param.name.removesuffix(".weight")
        if module == param.name or len(param.shape) != 2 or param.kind not in TARGETS:
            continue
        if wanted(param, module):
            found = True
            outputs, inputs = param.shape if architecture.model_type not in CONV1D else param.shape[::-1]
            r = ranks.of(module) or rank
            yield Param(f"{module}.lora_A.weight", (r, inputs), "adapter", "fp32")
            yield Param(f"{module}.lora_B.weight", (outputs, r), "adapter", "fp32")
            if config.flag("lora_bias"):
                yield Param(f"{module}.lora_B.bias", (outputs,), "adapter", "fp32")
            if config.flag("use_dora"):
                yield Param(f"{module}.lora_magnitude_vector", (outputs,), "adapter", "fp32")
    if not found:
        raise HfvramError(
            "usage", f"the targets of the adapter {adapter.id} match no module of {architecture.class_name}"
        )


def targeted(architecture: Architecture, asked: str | tuple[str, ...]) -> Callable[[Param], bool]:
    """Which weights are of layers that PEFT means by `all-linear`, names, or a regular expression. Raises `usage`."""
    if isinstance(asked, str) and re.fullmatch(r"[\w-]+", asked) and asked != "all-linear":
        asked = (asked,)
    names = asked if isinstance(asked, str) else list(asked)
    if isinstance(names, str) and names != "all-linear" and expression(names) is None:
        raise HfvramError("usage", f"--lora-targets {printable(names, 60)} is no regular expression that is understood")
    wanted = _targets(Config({"target_modules": names}), architecture)
    holders = {p.name.rpartition(".")[0].rpartition(".")[0] for p in architecture.all_params}
    inner = next((h for h in sorted(holders) if asked != "all-linear" and h and wanted(Param(h, ()), h)), None)
    if inner:
        raise HfvramError("usage", f"--lora-targets: {inner} is no layer, but holds some: name those")

    def means(param: Param) -> bool:
        module = module_of(param)
        if module == param.name or len(param.shape) != 2 or param.kind not in TARGETS:
            return False
        return wanted(param, module)

    return means


def module_of(param: Param) -> str:
    """The path of the module whose weight it is."""
    return param.name.removesuffix(".weight")


class _Ranks:
    """`rank_pattern`: the rank of modules by name, ending of a name, or regular expression for one."""

    def __init__(self, section: Config) -> None:
        sizes = {str(key): section.size(key) for key in section.values}
        self.by_name = {key: size for key, size in sizes.items() if re.fullmatch(r"[\w.]+", key)}
        others = [(expression(rf"(.*\.)?({key})"), size) for key, size in sizes.items() if key not in self.by_name]
        self.others = [(e, size) for e, size in others if e]
        self.clock = Clock()

    def of(self, module: str) -> int | None:
        parts = module.split(".")
        named = (self.by_name.get(".".join(parts[i:])) for i in range(len(parts)))
        found = (size for e, size in self.others if self.clock.run(e.is_whole, module))
        return next((size for size in named if size), None) or next(found, None)


def _targets(config: Config, architecture: Architecture) -> Callable[[Param, str], bool]:
    """Whether an adapter means a module: names and endings of names, one regular expression, or all linear ones but
    the language-model head."""
    targets = config.get("target_modules")
    if targets == "all-linear":
        included: Callable[[str], bool] | None = None
    elif isinstance(targets, str):
        included = _expressed(config, "target_modules")
    else:
        included = _listed(config.strings("target_modules") or defaults(architecture.model_type), _layers(config))
    left_out = config.get("exclude_modules")
    if isinstance(left_out, str):
        excluded = _expressed(config, "exclude_modules")
    else:
        excluded = _listed(config.strings("exclude_modules") or [], None)

    def wanted(param: Param, module: str) -> bool:
        scores = param.kind == "head" and param.split is None and param.shape[0] != architecture.vocab_size
        linear = param.kind in ALL_LINEAR or scores
        found = included(module) if included else linear
        return found and not (left_out and excluded(module))

    return wanted


def _layers(config: Config) -> frozenset[int] | None:
    """`layers_to_transform`: one layer or several; None for all."""
    chosen = config.get("layers_to_transform")
    if isinstance(chosen, int):
        return frozenset((chosen,))
    found = config.items("layers_to_transform")
    return frozenset(i for i in found if isinstance(i, int)) if found else None


def _listed(names: list[str], layers: frozenset[int] | None) -> Callable[[str], bool]:
    whole, endings = frozenset(names), tuple(f".{name}" for name in names)

    def means(module: str) -> bool:
        if module in whole or not module.endswith(endings):
            return module in whole
        index = re.search(r"\.(\d+)\.", module)
        return layers is None or (index is not None and int(index[1]) in layers)

    return means


def _expressed(config: Config, key: str) -> Callable[[str], bool]:
    if (found := expression(config.text(key, default=""))) is None:
        raise HfvramError("bad_config", f"adapter_config.json: {key} is no regular expression that is understood here")
    clock = Clock()
    return lambda module: clock.run(found.is_whole, module)


def defaults(model_type: str) -> list[str]:
    """The modules that PEFT targets for a model type when a configuration names none."""
    return next(
        (names.split() for names, types in OTHER_DEFAULTS.items() if model_type in types), list(DEFAULT_TARGETS)
    )
