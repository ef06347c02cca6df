"""Kimi K2.5: DeepSeek-V3's text model with a vision tower of its own.

Source: transformers 5.17, models/kimi_k25/{modeling, configuration}_kimi_k25.py.
"""

from hfvram.errors import HfvramError
from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families import blocks
from hfvram.model.families.defaults import known, opened, section
from hfvram.model.families.encoder import ENCODER, encoder_layer
from hfvram.model.families.multimodal import text_stack, wrapper
from hfvram.model.families.vision import image_size
from hfvram.model.layers import Param, Rotary, linear, norm


def read(config: Config, class_name: str | None) -> Architecture:
    config, class_name, prefix = opened(config, class_name)
    text, vision = section(config, "text_config"), section(config, "vision_config")
    if text.model_type == "kimi_k2":
        text = known(Config({**text.values, "model_type": "deepseek_v3"}))
    stacks = (
        tower(vision, f"{prefix}vision_tower."),
        text_stack(text, f"{prefix}language_model."),
        Stack("projector", (), before=projector(config, vision, text.size("hidden_size"), f"{prefix}mm_projector")),
    )
    return wrapper(config, class_name, text, stacks)


def projector(config: Config, vision: Config, hidden: int, name: str) -> tuple[Param, ...]:
    merged = vision.size("hidden_size") * area(vision, "merge_kernel_size")
    return (
        *norm(f"{name}.pre_norm", config.size("projection_hidden_size"), True),
        *linear(f"{name}.in_proj", merged, merged, True),
        *linear(f"{name}.out_proj", merged, hidden, True),
    )


def area(config: Config, name: str) -> int:
    """Patches in a window of (height, width)."""
    sides = config.items(name) or [2, 2]
    if len(sides) != 2:
        raise HfvramError("bad_config", f"config.json: {name} is not a pair of sizes")
    return Config({name: sides[0]}).size(name, high=4096) * Config({name: sides[1]}).size(name, high=4096)


def tower(config: Config, prefix: str) -> Stack:
    hidden, heads = config.size("hidden_size", "vt_hidden_size"), config.size("num_attention_heads")
    head_dim, patch = config.divided("hidden_size", hidden, heads), image_size(config, "patch_size")
    attention = blocks.attention(
        "attn",
        hidden,
        heads,
        head_dim,
        bias=True,
        projections=("q_proj", "k_proj", "v_proj", "proj"),
        rotary=Rotary(dim=head_dim),
        **ENCODER,
    )
    activation = config.text("hidden_act", default="gelu_pytorch_tanh")
    feed = blocks.mlp("mlp.fc1", "mlp.fc2", hidden, config.size("intermediate_size"), activation)
    grid = (config.size("pos_emb_height", "init_pos_emb_height"), config.size("pos_emb_width", "init_pos_emb_width"))
    return Stack(
        name="vision",
        prefix=f"{prefix}layers",
        hidden_size=hidden,
        before=(
            *blocks.convolution(f"{prefix}patch_embed.proj", hidden, 3, patch, patch),
            Param(f"{prefix}patch_embed.pos_emb.position_embeddings", (*grid, hidden), "other"),
        ),
        layers=(encoder_layer(attention, feed, "norm1", "norm2"),) * config.layers("num_hidden_layers"),
        after=norm(f"{prefix}final_layernorm", hidden, True),
    )
