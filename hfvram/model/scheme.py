"""A quantized checkpoint's section → `Scheme`: group sizes, zero points, blocks, and the modules that are otherwise.

Names of keys are the tools' own: AutoGPTQ and GPTQModel (`group_size`, `desc_act`, `dynamic`), AutoAWQ (`zero_point`),
AutoRound (`extra_config`), compressed-tensors (`config_groups`), ModelOpt (`quantized_layers`), MLX (an entry for each
module), HQQ (`weight_quant_params`), AQLM.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from hfvram.model.config import Config
from hfvram.model.packing import SCALED_BY_ROW, Scheme, plain
from hfvram.model.quantization import BITSANDBYTES, bits_of, name_of, section_of

ALGORITHMS: Final = (("NVFP4", "nvfp4"), ("MXFP4", "mxfp4"), ("MXFP8", "mxfp8"), ("FP8", "fp8"), ("INT8", "int8"))
EXPERT: Final = re.compile(r"(\.experts)\.\d+\..*$")
"""One expert of many, which the built model holds as one tensor."""
MOST: Final = 100_000
"""So many entries of modules are read of a section."""


def scheme(values: Mapping[str, Any]) -> Scheme | None:
    """How a checkpoint's weights are packed, None where it is not quantized.

    >>> scheme({"quantization_config": {"quant_method": "gptq", "bits": 3, "group_size": -1}}).group
    0
    """
    section = section_of(values)
    if section is None or (name := name_of(section)) is None:
        return None
    loader = section.text("quant_method", default="").lower()
    made = plain(name)
    facts: dict[str, Any] = {"loader": "bitsandbytes" if loader in BITSANDBYTES and name in _BNB else loader}
    kind = name.partition("-")[0]
    if kind in ("gptq", "awq", "mlx", "quanto"):
        facts["group"] = _group(section, made.group)
        facts["ordered"] = "round" not in loader
    elif kind == "hqq":
        inner = (section.section("quant_config") or section).section("weight_quant_params") or Config({})
        facts["group"] = _group(inner, made.group)
    elif kind == "aqlm":
        facts["codebook"] = (
            section.size("num_codebooks", default=1, high=64),
            section.size("nbits_per_codebook", default=16, high=16),
            section.size("in_group_size", default=8, high=1024),
            section.size("out_group_size", default=1, high=1024),
        )
    elif loader == "torchao":
        facts["group"] = _torchao_group(section, SCALED_BY_ROW if name.endswith("8") else made.group)
    if name in ("fp8", "int8", "nvfp4", "mxfp4") or (kind == "int" and loader != "torchao"):
        facts |= _numbers(section, loader)
    facts["exceptions"] = tuple(_merged(_exceptions(section, name)))
    facts |= _experts(values, section, name)
    return Scheme(**{f: getattr(made, f) for f in ("method", "group", "block")} | facts)


_BNB: Final = ("nf4", "fp4", "int8")


def _group(section: Config, default: int) -> int:
    """The size of a group; −1, or none at all where the key is there, is a whole row."""
    value = section.get("group_size", "q_group_size")
    if value is None:
        return SCALED_BY_ROW if "group_size" in section.values else default
    return SCALED_BY_ROW if value in (-1, 0) else section.size("group_size", "q_group_size", default=default)


def _torchao_group(section: Config, default: int) -> int:
    """torchao's configurations nest: `quant_type.default._data.group_size`, or `quant_type_kwargs.group_size`."""
    inner: Config | None = section
    for key in ("quant_type", "default", "_data"):
        inner = inner.section(key) if inner and isinstance(inner.get(key), Mapping) else None
    for holder in (inner, section.section("quant_type_kwargs")):
        if holder is not None and holder.get("group_size") is not None:
            return _group(holder, default)
    return default


def _numbers(section: Config, loader: str) -> dict[str, Any]:
    """Floats of 8 and 4 bits, and integers of compressed-tensors: by blocks, rows, groups or tensors."""
    weights, inputs = _first_group(section)
    block = section.get("weight_block_size") or (weights.get("block_structure") if weights else None)
    found: dict[str, Any] = {"block": None, "zeros": False, "group": SCALED_BY_ROW}
    if isinstance(block, (list, tuple)) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block):
        found["block"] = (block[0], block[1])
    elif loader in ("fp8", "deepspeed_fp8") and section.get("weight_block_size") is None:
        found["block"] = (128, 128) if "weight_block_size" not in section.values else None
    if loader == "fbgemm_fp8":
        return found | {"by_row": True, "scale_bytes": 4}
    found["static"] = section.text("activation_scheme", default="") == "static" or _is_modelopt(section, loader)
    if weights is not None:
        strategy = weights.text("strategy", default="")
        found["by_row"] = strategy == "channel"
        found["zeros"] = weights.get("symmetric") is False
        found["group"] = _group(weights, SCALED_BY_ROW)
        if loader == "compressed-tensors":
            found["static"] = inputs is not None and inputs.get("dynamic") is False
    return found


def _is_modelopt(section: Config, loader: str) -> bool:
    producer = section.get("producer")
    return loader.startswith("modelopt") or (isinstance(producer, Mapping) and producer.get("name") == "modelopt")


def _first_group(section: Config) -> tuple[Config | None, Config | None]:
    """Weights and inputs of the first group of a configuration that has groups."""
    groups = section.section("config_groups") or Config({})
    for key in groups.values:
        group = groups.section(str(key))
        if group and (weights := group.section("weights")) is not None:
            return weights, group.section("input_activations")
    return None, None


def _exceptions(section: Config, name: str) -> Iterator[tuple[str, str]]:
    """Modules that a section names one by one, and what packs them."""
    kind = name.partition("-")[0]
    layers = section.get("quantized_layers")
    if kind == "gptq" and section.get("lm_head") is True:
        yield "lm_head", name
    for module, said in _entries(layers):
        yield module, _algorithm(str(said.get("quant_algo") or "")) or "none"
    for module, said in _entries(section.get("dynamic")):
        pattern = "re:" + module.lstrip("+-:")
        yield pattern, "none" if module.startswith("-") else _with_bits(kind, said, name)
    for module, said in _entries(section.get("extra_config")):
        yield module, _with_bits(kind, said, name)
    if kind == "mlx":
        for module, said in section.values.items():
            if said is False:
                yield module, "none"
            elif isinstance(said, Mapping):
                yield module, _with_bits(kind, said, name)
    groups = section.section("config_groups")
    for key in groups.values if groups and not isinstance(layers, Mapping) else ():
        group = groups.section(str(key)) if groups else None
        if group is not None and group.section("weights") is not None:
            method = name_of(Config({**section.values, "quant_algo": None, "config_groups": {"one": group.values}}))
            for target in group.strings("targets") or ():
                if target[:1].islower() and method and (method != name or target.startswith("re:")):
                    yield target, method


def _entries(value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(value, Mapping):
        for module, said in list(value.items())[:MOST]:
            yield str(module), said if isinstance(said, Mapping) else {}


def _with_bits(kind: str, said: Mapping[str, Any], name: str) -> str:
    """The method with other bits; 16 and more are none."""
    if said.get("bits") is None:
        return name
    bits = bits_of(Config(said), "bits", default=4)
    return f"{kind}-{bits}" if bits < 16 else "none"


def _algorithm(text: str) -> str | None:
    upper = text.upper()
    return next((method for word, method in ALGORITHMS if word in upper), None)


def _merged(found: Iterator[tuple[str, str]]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Exceptions by method, each module once; an expert stands for all of them."""
    by_method: dict[str, dict[str, None]] = {}
    for module, method in found:
        by_method.setdefault(method, {})[EXPERT.sub(r"\1", module)] = None
    yield from ((tuple(modules), method) for method, modules in by_method.items())


def _experts(values: Mapping[str, Any], section: Config, name: str) -> dict[str, Any]:
    """Experts in 4 bits beside layers in FP8 (DeepSeek-V4); ModelOpt's mixtures pack what they name alone."""
    text = Config(values).section("text_config") or Config(values)
    mixed = section.text("quant_algo", default="").upper() == "MIXED_PRECISION"
    if (algorithm := section.get("moe_quant_algo")) is not None and section.text("quant_method", default="") == "fp8":
        inner = _numbers(Config({k: v for k, v in section.values.items() if k != "config_groups"}), "fp8")
        return inner | {"method": "fp8", "experts": _algorithm(str(algorithm)), "exceptions": ()}
    if name == "fp8" and text.text("expert_dtype", default="") == "fp4":
        return {"experts": "mxfp4"}
    return {"alone": mixed and isinstance(section.get("quantized_layers"), Mapping)}
