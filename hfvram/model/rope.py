"""Tables of cosines and sines that serving engines keep for rotary positions: one for each way to rotate.

Source: vLLM 0.19.0, model_executor/layers/rotary_embedding/ (`_compute_cos_sin_cache` of each class).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hfvram.model.architecture import Architecture
from hfvram.model.config import Config
from hfvram.model.layers import Attention, LatentAttention
from hfvram.model.quantization import SECTIONS

YARN = ("yarn", "deepseek_yarn")


@dataclass(frozen=True, slots=True)
class RopeTable:
    """A row for each position, of `dim` elements: half cosines, half sines."""

    positions: int
    dim: int
    fp32: bool = False
    """Kept in fp32 whatever the model computes in (latent attention with YaRN)."""


LOCAL = ("gemma3_text", "gemma3n_text", "gemma4_text")
"""Types whose windowed layers rotate by a base of their own, by default, without scaling."""


def tables(architecture: Architecture, values: Mapping[str, Any]) -> tuple[RopeTable, ...]:
    """The tables of a model, each once however many layers read it."""
    config = text_section(values)
    most = architecture.max_positions or 0
    found: dict[tuple[object, ...], RopeTable] = {}
    for layer in architecture.text.layers:
        for mixer in layer.mixers:
            dim = rotated(mixer)
            if dim and most:
                local = mixer.kind == "sliding_attention" and _has_local(config)
                scaling = Config({}) if local else _scaling(config, mixer.kind)
                stretched = isinstance(mixer, LatentAttention) and _kind(scaling) in YARN
                key = (dim, local, scaling.get("rope_theta"), _kind(scaling), scaling.get("factor"))
                found.setdefault(key, RopeTable(positions(scaling, most), dim, fp32=stretched))
    return tuple(found.values())


def rotated(mixer: object) -> int:
    """The part of a head that is rotated; 0 where nothing is."""
    if isinstance(mixer, LatentAttention):
        return mixer.qk_rope_head_dim
    return mixer.rotary.dim if isinstance(mixer, Attention) and mixer.rotary else 0


def positions(scaling: Config, most: int) -> int:
    """Rows of a table: YaRN and dynamic NTK stretch the original length, linear scaling the length given, LongRoPE has
    a table for short and one for long sequences, M-RoPE four times the length."""
    kind = _kind(scaling)
    factor = scaling.number("factor", default=1.0)
    original = scaling.size("original_max_position_embeddings", default=most, high=1 << 40)
    if kind in YARN or kind == "dynamic":
        return int(original * factor)
    if kind == "linear":
        return int(most * factor)
    if kind in ("longrope", "su"):
        return most + original
    return most * (4 if scaling.get("mrope_section") else 1)


def text_section(values: Mapping[str, Any]) -> Config:
    """The part of a configuration that is the text model's."""
    config = Config(values)
    for name in SECTIONS:
        if (section := config.section(name)) is not None:
            return text_section(section.values)
    return config


def _kind(scaling: Config) -> str:
    return scaling.text("rope_type", "type", default="default")


def _has_local(config: Config) -> bool:
    return config.model_type in LOCAL or config.get("rope_local_base_freq") is not None


def _scaling(config: Config, kind: str) -> Config:
    """How a layer of this kind rotates: one section for all, or one for each kind."""
    section = config.section("rope_parameters", "rope_scaling") or Config({})
    own = section.values.get(kind)
    return Config(own) if isinstance(own, Mapping) else section
