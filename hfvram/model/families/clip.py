"""CLIP and SigLIP: a text and a vision encoder, together or each alone.

Source: transformers 5.17, models/{clip, siglip}/modeling_*.py and configuration_*.py.
"""

from dataclasses import replace

from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families.blocks import embedding
from hfvram.model.families.common import class_and_end, dtype_of, max_positions, num_labels
from hfvram.model.families.defaults import known, section
from hfvram.model.families.vision import clip_like, tower
from hfvram.model.layers import Attention, Param, linear, norm

FAMILIES = {"clip": "CLIP", "siglip": "Siglip"}
CLASSES: dict[str, tuple[str, ...]] = {
    "": ("Model", "ForImageClassification"),
    "_text_model": ("TextModel", "TextModelWithProjection"),
    "_vision_model": ("VisionModel", "VisionModelWithProjection"),
}


def read(config: Config, class_name: str | None) -> Architecture:
    """A configuration of both models also gives either alone, where that class is asked for."""
    config = known(config)
    base = config.model_type.split("_")[0]
    part = config.model_type.removeprefix(base)
    ends = CLASSES[part] if part else sum(CLASSES.values(), ())
    if base == "siglip":
        ends = tuple(end for end in ends if not end.endswith("WithProjection"))
    class_name, end = class_and_end(config, class_name, FAMILIES[base], ends)
    alone = end in ("TextModel", "VisionModel")
    text = text_config(config, part) if end in ("Model", *CLASSES["_text_model"]) else None
    seen = vision_config(config, part) if not end.startswith("Text") else None
    stacks = (
        *((text_tower(text, "" if alone else "text_model.", base),) if text else ()),
        *((tower(seen, "" if alone else "vision_model."),) if seen else ()),
    )
    main = stacks[0]
    return Architecture(
        model_type=config.model_type,
        class_name=class_name,
        task="encoder",
        stacks=stacks,
        main=main.name,
        vocab_size=text.size("vocab_size") if text else 1,
        hidden_size=main.hidden_size,
        max_positions=max_positions(text) if text else None,
        dtype=dtype_of(config),
        head=head(config, end, text, seen, base),
        final_norm="layer",
    )


def text_config(config: Config, part: str) -> Config:
    return config if part else section(config, "text_config")


def vision_config(config: Config, part: str) -> Config:
    return config if part else section(config, "vision_config")


def text_tower(config: Config, prefix: str, base: str) -> Stack:
    """CLIP's text attends to what came before; SigLIP's to everything, and ends in a projection."""
    hidden = config.size("hidden_size")
    block = clip_like(config)
    if base == "clip":
        block = replace(block, mixers=tuple(replace(m, causal=True) for m in block.mixers if isinstance(m, Attention)))
    projection = linear(f"{prefix}head", hidden, config.size("projection_size", default=hidden), bias=True)
    return Stack(
        name="text",
        prefix=f"{prefix}encoder.layers",
        hidden_size=hidden,
        before=embedding(f"{prefix}embeddings.token_embedding", config.size("vocab_size"), hidden)
        + embedding(f"{prefix}embeddings.position_embedding", config.size("max_position_embeddings"), hidden),
        layers=(block,) * config.layers("num_hidden_layers"),
        after=norm(f"{prefix}final_layer_norm", hidden, bias=True) + (projection if base == "siglip" else ()),
    )


def head(config: Config, end: str, text: Config | None, seen: Config | None, base: str) -> tuple[Param, ...]:
    """Projections into the space that text and images share, with a learned scale; or classes of images."""
    if end == "ForImageClassification" and seen:
        return linear("classifier", seen.size("hidden_size"), num_labels(config), bias=True, kind="head")
    if end == "Model" and base == "siglip":
        return Param("logit_scale", (1,), "other"), Param("logit_bias", (1,), "other")
    if end == "Model" and text and seen:
        space = config.size("projection_dim")
        projections = linear("visual_projection", seen.size("hidden_size"), space)
        projections += linear("text_projection", text.size("hidden_size"), space)
        return (*projections, Param("logit_scale", (), "other"))
    if end == "TextModelWithProjection" and text:
        return linear("text_projection", text.size("hidden_size"), text.size("projection_dim"))
    if end == "VisionModelWithProjection" and seen:
        return linear("visual_projection", seen.size("hidden_size"), seen.size("projection_dim"))
    return ()
