"""GLM-4V and its mixture of experts: a vision tower whose features are downsampled and merged.

Source: transformers 5.17, models/{glm4v, glm4v_moe}/modeling_*.py.
"""

from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families import blocks
from hfvram.model.families.defaults import opened, section
from hfvram.model.families.encoder import ENCODER, encoder_layer
from hfvram.model.families.multimodal import text_stack, wrapper
from hfvram.model.families.qwen_vl import patches
from hfvram.model.families.vision import image_size
from hfvram.model.layers import Rotary, linear, norm


def read(config: Config, class_name: str | None) -> Architecture:
    config, class_name, prefix = opened(config, class_name)
    text = section(config, "text_config")
    tower = vision(section(config, "vision_config"), f"{prefix}visual.")
    return wrapper(config, class_name, text, (tower, text_stack(text, f"{prefix}language_model.")))


def vision(config: Config, prefix: str) -> Stack:
    hidden, heads, out = config.size("hidden_size"), config.size("num_heads"), config.size("out_hidden_size")
    head_dim = config.divided("hidden_size", hidden, heads)
    grid = image_size(config, "image_size") // image_size(config, "patch_size")
    merge, width = config.size("spatial_merge_size"), config.size("intermediate_size")
    attention = blocks.fused_attention(
        "attn",
        hidden,
        heads,
        head_dim,
        bias=config.flag("attention_bias"),
        out_bias=False,
        projections=("qkv", "proj"),
        rotary=Rotary(dim=head_dim),
        **ENCODER,
    )
    # The blocks are as wide as the tower's output; `intermediate_size` is the merger's.
    feed = blocks.gated_mlp("mlp", hidden, out, config.text("hidden_act", default="silu"))
    return Stack(
        name="vision",
        prefix=f"{prefix}blocks",
        hidden_size=hidden,
        before=blocks.embedding(f"{prefix}embeddings.position_embedding", grid * grid, hidden)
        + patches(config, f"{prefix}patch_embed", hidden, bias=True),
        layers=(encoder_layer(attention, feed, "norm1", "norm2", bias=False),) * config.layers("depth"),
        after=linear(f"{prefix}merger.proj", out, out)
        + norm(f"{prefix}merger.post_projection_norm", out, True)
        + blocks.gated_mlp(f"{prefix}merger", out, width).params
        + norm(f"{prefix}post_conv_layernorm", hidden)
        + blocks.convolution(f"{prefix}downsample", out, hidden, merge, merge)
        + norm(f"{prefix}post_layernorm", hidden),
    )
