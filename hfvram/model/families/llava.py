"""LLaVA, Mistral 3 and Gemma 3: a vision tower, a projector, and a language model of any type.

Source: transformers 5.17, models/{llava, mistral3, gemma3}/modeling_*.py.
"""

from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families.defaults import opened, section
from hfvram.model.families.multimodal import text_stack, wrapper
from hfvram.model.families.vision import tower
from hfvram.model.layers import Param, linear, norm


def read(config: Config, class_name: str | None) -> Architecture:
    config, class_name, prefix = opened(config, class_name)
    text, vision = section(config, "text_config"), section(config, "vision_config")
    seeing, reading = tower(vision, f"{prefix}vision_tower."), text_stack(text, f"{prefix}language_model.")
    joining = Stack("projector", (), before=projector(config, vision, text, f"{prefix}multi_modal_projector"))
    return wrapper(config, class_name, text, (seeing, joining, reading))


def projector(config: Config, vision: Config, text: Config, name: str) -> tuple[Param, ...]:
    """What carries the tower's features into the language model's width."""
    wide, hidden = vision.size("hidden_size"), text.size("hidden_size")
    if config.model_type == "gemma3":
        return (
            Param(f"{name}.mm_input_projection_weight", (wide, hidden), "other"),
            *norm(f"{name}.mm_soft_emb_norm", wide),
        )
    bias = config.flag("multimodal_projector_bias", default=config.model_type == "llava")
    chosen = config.get("vision_feature_layer")
    features = wide * (len(chosen) if isinstance(chosen, list) and chosen else 1)
    merged: tuple[Param, ...] = ()
    if config.model_type == "mistral3":
        merge = config.size("spatial_merge_size", default=2)
        merged = norm(f"{name}.norm", wide) + linear(f"{name}.patch_merger.merging_layer", wide * merge**2, wide)
    joined = linear(f"{name}.linear_1", features, hidden, bias) + linear(f"{name}.linear_2", hidden, hidden, bias)
    return merged + joined
