"""How a checkpoint is quantized: its `quantization_config` in hfvram's words, and the modules that it leaves alone.

Names are those of `--quant` where there is one (`nf4`, `fp4`, `int8`, `fp8`, `mxfp4`, `gptq-4`, `awq-4`), `nvfp4`, else
the method's own name with its bits: `hqq-4`, `mlx-4`, `int-4` (integers by compressed-tensors or torchao).
"""

import re
from collections.abc import Mapping
from typing import Any

from hfvram.model.config import Config

SECTIONS = ("text_config", "llm_config", "thinker_config", "language_config")
SKIPPED = ("modules_to_not_convert", "llm_int8_skip_modules", "ignore", "ignored_layers", "exclude_modules")
BITSANDBYTES = ("bitsandbytes", "bnb", "bitsandbytes_4bit", "bitsandbytes_8bit", "")
FP8 = ("fp8", "fbgemm_fp8", "finegrained_fp8", "deepspeed_fp8")
FIXED_BITS = {"eetq": 8, "bitnet": 2}


def method(values: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    """The quantization of a configuration and the modules (names, parts of them or patterns) that it leaves alone.

    An unknown method keeps its name. Raises `bad_config` where a section is no object or bits are no small number.

    >>> method({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}})
    ('gptq-4', ())
    >>> method({"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}})
    ('mxfp4', ('lm_head',))
    """
    section = section_of(values)
    return (None, ()) if section is None else (name_of(section), _left_alone(section))


def section_of(values: Mapping[str, Any]) -> Config | None:
    """The section of a configuration that says how it is quantized, of the model or of its text model."""
    config = Config(values)
    for holder in (config, *(s for name in SECTIONS if (s := config.section(name)) is not None)):
        section = holder.section("quantization_config", "compression_config")
        if section is not None and section.values:
            return section
    mlx = config.section("quantization")
    return mlx if mlx is not None and mlx.get("bits") is not None else None


def name_of(section: Config) -> str | None:
    """The method of a section in hfvram's words, with its bits where those are a part of the name."""
    kind = section.text("quant_method", default="").lower()
    if kind in BITSANDBYTES and _is_bitsandbytes(section, kind):
        if section.flag("load_in_8bit", "_load_in_8bit") or kind == "bitsandbytes_8bit":
            return "int8"
        loaded = section.flag("load_in_4bit", "_load_in_4bit") or kind == "bitsandbytes_4bit"
        return section.text("bnb_4bit_quant_type", default="fp4") if loaded else None
    if kind in ("compressed-tensors", "modelopt", "modelopt_fp4", "") or _algorithm(section):
        return _by_algorithm(section) or _by_groups(section) or _by_bits(section, kind) or kind or None
    if kind in FP8:
        return "fp8"
    if kind in ("gptq", "awq"):
        return f"{kind}-{bits_of(section, 'bits', 'w_bit', default=4)}"
    if "round" in kind or kind == "inc":
        return _auto_round(section)
    if kind == "hqq":
        inner = (section.section("quant_config") or section).section("weight_quant_params") or Config({})
        return f"hqq-{bits_of(inner, 'nbits', default=4)}"
    if kind == "quanto":
        return _typed(kind, section.text("weights", default="int8"))
    if kind == "torchao":
        return _typed(kind, str(section.get("quant_type") or ""))
    if kind == "fp_quant":
        return section.text("forward_dtype", default="mxfp4")
    if kind in FIXED_BITS:
        return f"{kind}-{FIXED_BITS[kind]}"
    return _by_bits(section, kind) or kind


def _is_bitsandbytes(section: Config, kind: str) -> bool:
    keys = ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")
    return bool(kind) or any(key in section.values for key in keys)


def _algorithm(section: Config) -> str:
    """NVIDIA's name of the algorithm; that of the experts, which are most of a model, leads."""
    inner = section.section("quantization") or section
    for source in (section, inner):
        for key in ("moe_quant_algo", "quant_algo"):
            if isinstance(value := source.get(key), str):
                return value.upper()
    return ""


def _by_algorithm(section: Config) -> str | None:
    """ModelOpt: `FP8`, `NVFP4`, `W4A16_AWQ`; None where a mixture is told by its groups."""
    name = _algorithm(section)
    if "NVFP4" in name:
        return "nvfp4"
    if "MXFP4" in name:
        return "mxfp4"
    if "FP8" in name and "W4" not in name:
        return "fp8"
    if found := re.search(r"W(\d+)A\d+_AWQ", name):
        return f"awq-{found.group(1)}"
    return "int8" if name.startswith(("INT8", "W8A8")) else None


def _by_groups(section: Config) -> str | None:
    """compressed-tensors: the number type of the weights; of several groups the one with the fewest bits."""
    groups = section.section("config_groups") or Config({})
    found: list[tuple[int, str]] = []
    for key in groups.values:
        group = groups.section(str(key))
        weights = group.section("weights") if group else None
        if group is None or weights is None:
            continue
        bits = bits_of(weights, "num_bits", default=8)
        text = group.text("format", default=section.text("format", default=""))
        if weights.text("type", default="int") == "float":
            small = "mxfp4" if "mxfp4" in text or weights.get("group_size") == 32 else "nvfp4"
            found.append((bits, small if bits == 4 else "fp8" if bits == 8 else f"fp{bits}"))
        else:
            found.append((bits, "int8" if bits == 8 else f"int-{bits}"))
    return min(found)[1] if found else None


def _by_bits(section: Config, kind: str) -> str | None:
    """A method that says its bits in the usual place; without a method it is MLX's own section."""
    if section.get("bits", "nbits_per_codebook") is None:
        return None
    return f"{kind or 'mlx'}-{bits_of(section, 'bits', 'nbits_per_codebook', default=4)}"


def _auto_round(section: Config) -> str:
    """AutoRound stores in the format of another method: GPTQ's unless it says AWQ's, or small floats."""
    bits = bits_of(section, "bits", default=4)
    kind = section.text("data_type", default="int")
    if kind.startswith("nv_fp"):
        return "nvfp4"
    if kind.startswith("mx_fp"):
        return "mxfp4" if bits == 4 else f"mxfp{bits}"
    if kind.startswith("fp"):
        return "fp8"
    return f"awq-{bits}" if "awq" in section.text("packing_format", default="") else f"gptq-{bits}"


def _typed(kind: str, text: str) -> str:
    """`int4_weight_only`, `Float8WeightOnlyConfig`, `qint8`: the first number type in the text."""
    found = re.search(r"(u?int|float|fp)(\d+)", text.lower())
    if not found:
        return kind
    if found.group(1) in ("float", "fp") and found.group(2) == "8":
        return "fp8"
    return f"{kind}-{found.group(2)}" if kind == "quanto" else f"int-{found.group(2)}"


def bits_of(section: Config, *names: str, default: int) -> int:
    """A number of bits by the first of these keys. Raises `bad_config` where it is none."""
    return section.size(*names, default=default, low=1, high=32)


def _left_alone(section: Config) -> tuple[str, ...]:
    """Every module that any of the known keys lists, once."""
    inner = section.section("quantization") or section
    names: dict[str, None] = {}
    # of a mixture of FP8 and NVIDIA's 4 bits for the experts, `ignore` lists what is FP8
    keys = SKIPPED[:1] if section.get("moe_quant_algo") and section.get("quant_method") == "fp8" else SKIPPED
    for source in (section, inner):
        for key in keys:
            value = source.get(key)
            if isinstance(value, (list, tuple)):
                names.update(dict.fromkeys(str(v) for v in value))
    return tuple(names)
