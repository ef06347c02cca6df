"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and its mixture of experts: a vision tower of patches in space and time.

Source: transformers 5.17, models/{qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe}/modeling_*.py.
"""

from dataclasses import replace
from typing import Any

from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families import blocks
from hfvram.model.families.defaults import opened, section
from hfvram.model.families.encoder import ENCODER, encoder_layer
from hfvram.model.families.multimodal import text_stack, wrapper
from hfvram.model.families.vision import image_size
from hfvram.model.layers import Param, Rotary, linear, norm


def read(config: Config, class_name: str | None) -> Architecture:
    config, class_name, prefix = opened(config, class_name)
    text = text_config(config)
    build = {"qwen2_vl": vision_2, "qwen2_5_vl": vision_2_5}.get(config.model_type, vision_3)
    tower = build(section(config, "vision_config"), f"{prefix}visual.")
    return wrapper(config, class_name, text, (tower, text_stack(text, f"{prefix}language_model.")))


def text_config(config: Config) -> Config:
    """The nested text configuration; Qwen2-VL's files have its keys beside the vision tower's."""
    if config.section("text_config") is not None or config.model_type not in ("qwen2_vl", "qwen2_5_vl"):
        return section(config, "text_config")
    flat = {k: v for k, v in config.values.items() if k not in ("model_type", "tie_word_embeddings")}
    return section(Config({**config.values, "text_config": flat}, config.defaults), "text_config")


def patches(config: Config, name: str, hidden: int, bias: bool) -> tuple[Param, ...]:
    """The convolution that makes an embedding of each patch in space and time."""
    patch, frames = image_size(config, "patch_size"), image_size(config, "temporal_patch_size")
    channels = config.size("in_channels", "in_chans")
    return blocks.convolution(f"{name}.proj", hidden, channels, frames, patch, patch, bias=bias)


def vision_2(config: Config, prefix: str) -> Stack:
    hidden, heads = config.size("embed_dim"), config.size("num_heads")
    head_dim = config.divided("embed_dim", hidden, heads)
    attention = blocks.fused_attention(
        "attn", hidden, heads, head_dim, bias=True, projections=("qkv", "proj"), rotary=Rotary(dim=head_dim), **ENCODER
    )
    width = int(hidden * config.number("mlp_ratio", default=4))
    feed = blocks.mlp("mlp.fc1", "mlp.fc2", hidden, width, config.text("hidden_act", default="quick_gelu"))
    merged = hidden * config.size("spatial_merge_size") ** 2
    return Stack(
        name="vision",
        prefix=f"{prefix}blocks",
        hidden_size=hidden,
        before=patches(config, f"{prefix}patch_embed", hidden, bias=False),
        layers=(encoder_layer(attention, feed, "norm1", "norm2"),) * config.layers("depth"),
        after=merger(f"{prefix}merger", hidden, merged, config.size("hidden_size"), norm_bias=True),
    )


def merger(name: str, hidden: int, merged: int, out: int, norm_bias: bool) -> tuple[Param, ...]:
    """Neighbouring patches are joined and carried into the language model's width."""
    return (
        *norm(f"{name}.ln_q", hidden, norm_bias),
        *linear(f"{name}.mlp.0", merged, merged, True),
        *linear(f"{name}.mlp.2", merged, out, True),
    )


def vision_2_5(config: Config, prefix: str, fused: bool = True) -> Stack:
    """Windows of patches but in a few layers; Qwen2.5-Omni has its projections apart (`fused` false)."""
    hidden, heads = config.size("hidden_size"), config.size("num_heads")
    head_dim = config.divided("hidden_size", hidden, heads)
    style: dict[str, Any] = {"rotary": Rotary(dim=head_dim), **ENCODER}
    if fused:
        names = ("qkv", "proj")
        attention = blocks.fused_attention("attn", hidden, heads, head_dim, bias=True, projections=names, **style)
    else:
        attention = blocks.attention(
            "attn", hidden, heads, head_dim, bias=True, projections=("q", "k", "v", "proj"), **style
        )
    feed = blocks.gated_mlp(
        "mlp", hidden, config.size("intermediate_size"), config.text("hidden_act", default="silu"), bias=True
    )
    merged = hidden * config.size("spatial_merge_size") ** 2
    return Stack(
        name="vision",
        prefix=f"{prefix}blocks",
        hidden_size=hidden,
        before=patches(config, f"{prefix}patch_embed", hidden, bias=False),
        layers=(encoder_layer(attention, feed, "norm1", "norm2", bias=False),) * config.layers("depth"),
        after=merger(f"{prefix}merger", hidden, merged, config.size("out_hidden_size"), norm_bias=False),
    )


def vision_3(config: Config, prefix: str) -> Stack:
    """Learned positions beside the rotary ones, and features of some layers merged on their own (DeepStack)."""
    hidden, heads = config.size("hidden_size"), config.size("num_heads")
    head_dim = config.divided("hidden_size", hidden, heads)
    attention = blocks.fused_attention(
        "attn", hidden, heads, head_dim, bias=True, projections=("qkv", "proj"), rotary=Rotary(dim=head_dim), **ENCODER
    )
    feed = blocks.mlp(
        "mlp.linear_fc1",
        "mlp.linear_fc2",
        hidden,
        config.size("intermediate_size"),
        config.text("hidden_act", default="gelu_pytorch_tanh"),
    )
    merged, out = hidden * config.size("spatial_merge_size") ** 2, config.size("out_hidden_size")
    after = merger_3(f"{prefix}merger", hidden, merged, out)
    for i in range(len(config.items("deepstack_visual_indexes") or [])):
        after += merger_3(f"{prefix}deepstack_merger_list.{i}", merged, merged, out)
    tower = Stack(
        name="vision",
        prefix=f"{prefix}blocks",
        hidden_size=hidden,
        before=patches(config, f"{prefix}patch_embed", hidden, bias=True)
        + blocks.embedding(f"{prefix}pos_embed", config.size("num_position_embeddings"), hidden),
        layers=(encoder_layer(attention, feed, "norm1", "norm2"),) * config.layers("depth"),
    )
    return replace(tower, after=after)


def merger_3(name: str, normed: int, merged: int, out: int) -> tuple[Param, ...]:
    return (
        *norm(f"{name}.norm", normed, True),
        *linear(f"{name}.linear_fc1", merged, merged, True),
        *linear(f"{name}.linear_fc2", merged, out, True),
    )
