"""What PEFT targets instead of layers that transformers 5 fused into parameters: routers, and experts of one tensor.

Of these model types targets are names of the layers that there were before; each stands for a parameter, everywhere.
Dense and shared feed-forwards with layers of the same names are so left out.
Source: PEFT 0.21, utils/transformers_weight_conversion.py `_convert_peft_config_moe`; transformers 5.17,
conversion_mapping.py `_MODEL_TO_CONVERSION_PATTERN` (Qwen2-MoE itself is not in it).
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

from hfvram.errors import HfvramError, printable
from hfvram.model.adapter import module_of, targeted
from hfvram.model.architecture import Architecture
from hfvram.model.layers import Param

UP, DOWN, ROUTER = "gate_up_proj", "down_proj", "gate.weight"
QWEN: Final = {"gate": ROUTER, "gate_proj": UP, "up_proj": UP, "down_proj": DOWN}
MIXTRAL: Final = {"gate": ROUTER, "w1": UP, "w3": UP, "w2": DOWN}
FUSED: Final[dict[str, Mapping[str, str]]] = {
    "mixtral": MIXTRAL,
    **dict.fromkeys(("minimax", "minimax_m2"), MIXTRAL),
    **dict.fromkeys(("afmoe", "cohere2_moe", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo"), QWEN),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"), QWEN),
    **dict.fromkeys(("glm4v_moe", "hunyuan_v1_moe", "longcat_flash", "mellum", "olmoe", "qwen3_moe"), QWEN),
    **dict.fromkeys(("qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_thinker", "solar_open"), QWEN),
}
"""By model type, the parameter that each layer became."""


class Targets(NamedTuple):
    """Names of layers, and parameters by the end of their names, each with what it multiplies the rank by."""

    layers: tuple[str, ...]
    parameters: dict[str, int]

    def of(self, param: Param) -> int:
        """What the rank of a parameter's adapter is multiplied by, 0 where it has none."""
        return next((n for name, n in self.parameters.items() if param.name.endswith(f".{name}")), 0)


def fused_targets(architecture: Architecture, asked: str | tuple[str, ...]) -> Targets | None:
    """What is targeted of a type whose layers were fused; None for any other. Raises `usage` for half of what is one
    parameter, and for a regular expression."""
    became = FUSED.get(architecture.model_type)
    if became is None:
        return None
    names = {asked} if isinstance(asked, str) else set(asked)
    if asked == "all-linear":
        linear = targeted(architecture, asked)
        names = {module_of(p).rpartition(".")[2] for p in architecture.all_params if linear(p)} | became.keys()
    elif not all(name.replace(".", "").replace("-", "").isidentifier() for name in names):
        shown = printable(str(asked), 60)
        raise HfvramError("usage", f"--lora-targets {shown} has no formula for experts that were fused: name layers")
    olds = {name: next((old for old in became if name == old or name.endswith(f".{old}")), None) for name in names}
    found: dict[str, set[str]] = {}
    for old in olds.values():
        if old is not None:
            found.setdefault(became[old], set()).add(old)
    whole = {old for old, new in became.items() if new == UP}
    if missing := whole - found.get(UP, whole):
        present = ", ".join(sorted(whole - missing))
        why = f"{present} can't be adapted without {', '.join(missing)}: they are one parameter, {UP}"
        raise HfvramError("usage", f"--lora-targets: {why}")
    layers = tuple(sorted(name for name, old in olds.items() if old is None))
    return Targets(layers, {new: len(whole) if new == UP else 1 for new in sorted(found)})
