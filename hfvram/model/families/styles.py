"""How decoders differ from Llama, a line a type: biases, norms, what is fused, positions, windows.

A flag that the configuration decides is given by its key. Source: transformers 5.17, models/*/modeling_*.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from hfvram.model.config import Config
from hfvram.model.families.common import layer_kinds

Flag = bool | str


def flag(config: Config, value: Flag) -> bool:
    """A constant of the family, or what the configuration says under this key."""
    return value if isinstance(value, bool) else config.flag(value)


def _every(period: int, key: str = "") -> Callable[[Config, int], list[bool]]:
    """All layers slide but each last of `period` (or of the configuration's number)."""

    def sliding(config: Config, layers: int) -> list[bool]:
        n = config.size(key, default=period, low=0) if key else period
        return [bool(n and (i + 1) % n) for i in range(layers)]

    return sliding


def _all(config: Config, layers: int) -> list[bool]:
    return [True] * layers


def _from_layer(config: Config, layers: int) -> list[bool]:
    return [i >= config.layers("max_window_layers", default=28) for i in range(layers)]


def _even_below(config: Config, layers: int) -> list[bool]:
    first_full = config.layers("max_window_layers", default=28)
    return [i % 2 == 0 and i < first_full for i in range(layers)]


def _without_rope(config: Config, layers: int) -> list[bool]:
    return [not rotates for rotates in rope_layers(config, layers)]


def rope_layers(config: Config, layers: int) -> list[bool]:
    """SmolLM3's `no_rope_layers`, which (against its name) has a 1 for each layer with rotary positions."""
    given = config.items("no_rope_layers")
    interval = config.size("no_rope_layer_interval", default=4)
    return [bool(given[i]) if given and i < len(given) else bool((i + 1) % interval) for i in range(layers)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """Llama's own values are the defaults."""

    bias: Flag = False
    out_bias: Flag = False
    mlp_bias: Flag = False
    fused_qkv: bool = False
    out: str = "o_proj"
    qk_norm: Literal["head", "full", "each", "list"] | None = None
    """Over a head, over all heads together, or over a head with weights for each, in one tensor (Cohere) or a list."""
    qk_norm_if: Flag = True
    qk_norm_names: tuple[str, str] = ("q_norm", "k_norm")
    mlp: Literal["gated", "fused", "plain"] = "gated"
    mlp_names: tuple[str, str] = ("fc1", "fc2")
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm: Literal["rms", "layer"] = "rms"
    norm_weight: bool = True
    norm_bias: bool = False
    norm_position: Literal["pre", "post", "both"] = "pre"
    final_norm: str = "norm"
    parallel: Flag = False
    """Attention and feed-forward share the first norm and run side by side."""
    rope: Literal["half", "interleaved"] = "half"
    rotary_factor: float = 1.0
    rope_on: Literal["all", "sliding", "listed"] = "all"
    window_if: Flag = True
    sliding: Callable[[Config, int], list[bool]] = _all
    """The layers that slide, where the configuration has no `layer_types`."""
    softcap: bool = False
    sliced: bool = False
    """The attention's own code slices what is rotated (`Rotary.sliced`)."""
    keeps: Literal["mixed", "mixed and normed"] | None = None
    """`Layer.keeps`."""
    head_bias: Flag = False


_SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
_ATTENTION: dict[str, Any] = {"bias": "attention_bias", "out_bias": "attention_bias"}
_LLAMA = Style(bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias")
_MISTRAL = Style()
_QWEN2 = Style(bias=True, window_if="use_sliding_window", sliding=_from_layer)
_QWEN3 = Style(**_ATTENTION, qk_norm="head", window_if="use_sliding_window", sliding=_from_layer)
_PHIMOE = Style(**_ATTENTION, norm="layer", norm_bias=True, head_bias="lm_head_bias")
_ERNIE = Style(bias="use_bias", out_bias="use_bias", mlp_bias="use_bias", rope="interleaved")
_HUNYUAN = Style(**_ATTENTION, qk_norm="head", qk_norm_names=("query_layernorm", "key_layernorm"))
_GLM4 = Style(
    bias="attention_bias",
    mlp="fused",
    norms=("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"),
    norm_position="both",
    rope="interleaved",
    rotary_factor=0.5,
)

STYLES: dict[str, Style] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "ministral": _MISTRAL,
    "ministral3": _MISTRAL,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "granite": _LLAMA,
    "arcee": Style(**_ATTENTION, mlp_bias="mlp_bias", mlp="plain", mlp_names=("up_proj", "down_proj")),
    "cwm": Style(mlp_bias="mlp_bias", sliding=lambda config, layers: [bool(i % 4) for i in range(layers)]),
    "seed_oss": Style(bias="attention_bias", out_bias="attention_out_bias", mlp_bias="mlp_bias"),
    "smollm3": Style(
        **_ATTENTION, mlp_bias="mlp_bias", rope_on="listed", window_if="use_sliding_window", sliding=_without_rope
    ),
    "helium": Style(bias="attention_bias", mlp_bias="mlp_bias", rope="interleaved"),
    "ernie4_5": _ERNIE,
    "hunyuan_v1_dense": _HUNYUAN,
    "nanochat": Style(**_ATTENTION, qk_norm="head", norm_weight=False, mlp="plain"),
    "olmo": Style(**_ATTENTION, norm="layer", norm_weight=False),
    "olmo2": Style(**_ATTENTION, qk_norm="full", norms=_AFTER, norm_position="post"),
    "olmo3": Style(**_ATTENTION, qk_norm="full", norms=_AFTER, norm_position="post", sliding=_every(4)),
    "exaone4": Style(
        qk_norm="head",
        norms=_AFTER,
        norm_position="post",
        rope_on="sliding",
        sliding=_every(4, "sliding_window_pattern"),
    ),
    "gemma": Style(**_ATTENTION),
    "gemma2": Style(**_ATTENTION, norms=_SANDWICH, norm_position="both", softcap=True, sliding=_every(2)),
    "gemma3_text": Style(
        **_ATTENTION, qk_norm="head", norms=_SANDWICH, norm_position="both", sliding=_every(6, "sliding_window_pattern")
    ),
    "phi": Style(
        bias=True,
        out_bias=True,
        mlp_bias=True,
        out="dense",
        qk_norm="head",
        qk_norm_if="qk_layernorm",
        qk_norm_names=("q_layernorm", "k_layernorm"),
        mlp="plain",
        norms=("input_layernorm",),
        norm="layer",
        norm_bias=True,
        final_norm="final_layernorm",
        parallel=True,
        rotary_factor=0.5,
        sliced=True,
        head_bias=True,
    ),
    "phi3": Style(fused_qkv=True, mlp="fused"),
    "starcoder2": Style(
        bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
        mlp="plain",
        mlp_names=("c_fc", "c_proj"),
        norm="layer",
        norm_bias=True,
    ),
    "stablelm": Style(
        bias="use_qkv_bias",
        qk_norm="list",
        qk_norm_if="qk_layernorm",
        qk_norm_names=("q_layernorm", "k_layernorm"),
        norm="layer",
        norm_bias=True,
        parallel="use_parallel_residual",
        rotary_factor=0.25,
        sliced=True,
        keeps="mixed and normed",
    ),
    "cohere": Style(
        **_ATTENTION,
        qk_norm="each",
        qk_norm_if="use_qk_norm",
        norms=("input_layernorm",),
        norm="layer",
        parallel=True,
        rope="interleaved",
    ),
    "cohere2": Style(
        **_ATTENTION,
        norms=("input_layernorm",),
        norm="layer",
        parallel=True,
        rope="interleaved",
        rope_on="sliding",
        sliding=_every(4, "sliding_window_pattern"),
    ),
    "nemotron": Style(
        **_ATTENTION,
        mlp_bias="mlp_bias",
        mlp="plain",
        mlp_names=("up_proj", "down_proj"),
        norm="layer",
        norm_bias=True,
        rotary_factor=0.5,
    ),
    "glm": Style(bias="attention_bias", mlp="fused", rope="interleaved", rotary_factor=0.5),
    "glm4": _GLM4,
    # Decoders of mixture-of-experts models: what stands around their experts (`moe.py`).
    "mixtral": _MISTRAL,
    "minimax_m2": Style(qk_norm="full"),
    "qwen2_moe": Style(bias="qkv_bias", window_if="use_sliding_window", sliding=_even_below),
    "qwen3_moe": Style(**_ATTENTION, qk_norm="head", window_if="use_sliding_window"),
    "olmoe": Style(**_ATTENTION, qk_norm="full"),
    "phimoe": _PHIMOE,
    "granitemoe": Style(**_ATTENTION),
    "granitemoeshared": Style(**_ATTENTION),
    "gpt_oss": Style(**_ATTENTION, sliding=_every(2)),
    "glm4_moe": Style(bias="attention_bias", qk_norm="head", qk_norm_if="use_qk_norm", rotary_factor=0.5),
    "ernie4_5_moe": replace(_ERNIE, head_bias="use_bias"),
    # Text models inside of others (`multimodal.py`).
    "glm4v_text": replace(_GLM4, bias=True),
    "glm4v_moe_text": Style(bias="attention_bias", rotary_factor=0.5),
    "llama4_text": _LLAMA,
    "mllama_text_model": _MISTRAL,
    "gemma4_text": Style(**_ATTENTION, qk_norm="head", norms=_SANDWICH, norm_position="both"),
    "qwen2_vl_text": _QWEN2,
    "qwen2_5_vl_text": _QWEN2,
    "qwen2_5_omni_text": _QWEN2,
    "qwen2_5_omni_talker": _QWEN2,
    "qwen3_vl_text": _QWEN3,
    "qwen3_vl_moe_text": replace(_QWEN3, window_if=False),
    # Latent attention (`deepseek.py`).
    "deepseek_v2": Style(mlp_bias="mlp_bias"),
    "deepseek_v3": _MISTRAL,
    "deepseek_v32": _MISTRAL,
    "deepseek_v4": _MISTRAL,
    "glm_moe_dsa": _MISTRAL,
    "glm4_moe_lite": _MISTRAL,
    "minicpm3": Style(mlp_bias="mlp_bias"),
}


def windows(config: Config, style: Style, layers: int) -> list[int | None]:
    """The sliding window of each layer, None for full attention, as the cache of transformers has it: by
    `layer_types`, else by the family's pattern, else on every layer where there is a `sliding_window` at all."""
    window = config.size("sliding_window", default=0, low=0) or None
    if not flag(config, style.window_if):
        window = None
    if kinds := layer_kinds(config, layers):
        return [window if kind == "sliding_attention" else None for kind in kinds]
    return [window if slides else None for slides in style.sliding(config, layers)]
