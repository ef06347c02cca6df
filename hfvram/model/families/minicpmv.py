"""MiniCPM-V 4.6: a SigLIP-like tower that joins windows halfway, a merger, and a Qwen3.5 text model.

Source: transformers 5.17, models/minicpmv4_6/{modeling, configuration}_minicpmv4_6.py.
"""

from dataclasses import replace

from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families import blocks
from hfvram.model.families.defaults import opened, section
from hfvram.model.families.kimi import area
from hfvram.model.families.multimodal import text_stack, wrapper
from hfvram.model.families.vision import clip_like, image_size
from hfvram.model.layers import Param, linear, norm


def read(config: Config, class_name: str | None) -> Architecture:
    config, class_name, prefix = opened(config, class_name)
    text, vision = section(config, "text_config"), section(config, "vision_config")
    stacks = (
        tower(vision, f"{prefix}vision_tower."),
        text_stack(text, f"{prefix}language_model."),
        Stack("projector", (), before=merger(config, vision, text.size("hidden_size"), f"{prefix}merger")),
    )
    return replace(wrapper(config, class_name, text, stacks), logits_of_all_tokens=True)


def merger(config: Config, vision: Config, hidden: int, name: str) -> tuple[Param, ...]:
    """Rounds of joining neighbours; the last goes into the language model's width."""
    wide, times = vision.size("hidden_size"), config.size("merger_times", default=1, high=64)
    merged = wide * area(config, "merge_kernel_size")
    params: tuple[Param, ...] = ()
    for i in range(times):
        params += (
            *norm(f"{name}.mlp.{i}.pre_norm", merged, True),
            *linear(f"{name}.mlp.{i}.linear_1", merged, merged, True),
            *linear(f"{name}.mlp.{i}.linear_2", merged, hidden if i == times - 1 else wide, True),
        )
    return params


def tower(config: Config, prefix: str) -> Stack:
    hidden, patch = config.size("hidden_size"), image_size(config, "patch_size")
    layer = clip_like(config)
    windows = area(config, "window_kernel_size")
    joined, width = hidden * windows, config.size("intermediate_size") * windows
    name = f"{prefix}vit_merger"
    window_attention = tuple(Param(f"{name}.{p.name}", p.shape, p.kind) for p in layer.mixers[0].params)
    return Stack(
        name="vision",
        prefix=f"{prefix}encoder.layers",
        hidden_size=hidden,
        before=blocks.convolution(
            f"{prefix}embeddings.patch_embedding", hidden, config.size("num_channels"), patch, patch
        )
        + blocks.embedding(
            f"{prefix}embeddings.position_embedding", (image_size(config, "image_size") // patch) ** 2, hidden
        ),
        layers=(layer,) * config.layers("num_hidden_layers"),
        after=norm(f"{prefix}post_layernorm", hidden, True)
        + window_attention
        + norm(f"{name}.layer_norm1", hidden, True)
        + norm(f"{name}.pre_norm", joined, True)
        + linear(f"{name}.linear_1", joined, width, True)
        + linear(f"{name}.linear_2", width, hidden, True),
    )
