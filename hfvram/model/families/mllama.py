"""Llama 3.2 Vision: some layers attend to the image's features instead of the text.

Source: transformers 5.17, models/mllama/{modeling, configuration}_mllama.py.
"""

from dataclasses import replace

from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families import blocks, llama
from hfvram.model.families.common import head_sizes
from hfvram.model.families.defaults import opened, section
from hfvram.model.families.encoder import ENCODER, encoder_layer
from hfvram.model.families.multimodal import wrapper
from hfvram.model.families.vision import image_size
from hfvram.model.layers import Layer, Param, linear, norm

CROSS_LAYERS = (3, 8, 13, 18, 23, 28, 33, 38)
EXTRA_TOKENS = 8
"""Rows of the embedding beyond the vocabulary, for the image."""


def read(config: Config, class_name: str | None) -> Architecture:
    config, class_name, prefix = opened(config, class_name)
    text, vision = section(config, "text_config"), section(config, "vision_config")
    projector = linear(
        f"{prefix}multi_modal_projector", vision.size("vision_output_dim"), text.size("hidden_size"), bias=True
    )
    stacks = (
        *towers(vision, f"{prefix}vision_model."),
        stack(text, f"{prefix}language_model."),
        Stack("projector", (), before=projector),
    )
    return wrapper(config, class_name, text, stacks, may_tie=False)


def stack(config: Config, prefix: str) -> Stack:
    """The text stack under `prefix`."""
    hidden, vocab = config.size("hidden_size"), config.size("vocab_size")
    text = llama.stack(config, prefix)
    crossed = config.items("cross_attention_layers") or CROSS_LAYERS
    cross = cross_layer(config, hidden)
    return replace(
        text,
        before=blocks.embedding(f"{prefix}embed_tokens", vocab + EXTRA_TOKENS, hidden),
        layers=tuple(cross if i in crossed else layer for i, layer in enumerate(text.layers)),
    )


def cross_layer(config: Config, hidden: int) -> Layer:
    heads, kv_heads, head_dim = head_sizes(config, hidden)
    attention = blocks.attention(
        "cross_attn",
        hidden,
        heads,
        head_dim,
        kv_heads,
        extra=norm("cross_attn.q_norm", head_dim) + norm("cross_attn.k_norm", head_dim),
        kind="cross_attention",
        causal=False,
        qk_norm="head",
    )
    feed = blocks.gated_mlp("mlp", hidden, config.size("intermediate_size"), config.text("hidden_act", default="silu"))
    return Layer(
        mixers=(attention,),
        feed_forward=feed,
        params=(
            Param("cross_attn_attn_gate", (1,), "other"),
            Param("cross_attn_mlp_gate", (1,), "other"),
            *norm("input_layernorm", hidden),
            *norm("post_attention_layernorm", hidden),
        ),
    )


def towers(config: Config, prefix: str) -> tuple[Stack, Stack]:
    """The encoder of the image's tiles, and the gated one over all of them."""
    hidden, heads = config.size("hidden_size"), config.size("attention_heads")
    patch = image_size(config, "patch_size")
    tokens = (image_size(config, "image_size") // patch) ** 2 + 1
    tiles = config.size("max_num_tiles")
    ratios = len(config.items("supported_aspect_ratios") or [()] * 8) + 1
    attention = blocks.attention("self_attn", hidden, heads, config.divided("hidden_size", hidden, heads), **ENCODER)
    feed = blocks.mlp(
        "mlp.fc1", "mlp.fc2", hidden, config.size("intermediate_size"), config.text("hidden_act", default="gelu")
    )
    layer = encoder_layer(attention, feed, "input_layernorm", "post_attention_layernorm")
    gates = (Param("gate_attn", (1,), "other"), Param("gate_ffn", (1,), "other"))
    positions = f"{prefix}gated_positional_embedding"
    before = (
        Param(f"{prefix}class_embedding", (hidden,), "other"),
        *blocks.convolution(f"{prefix}patch_embedding", hidden, config.size("num_channels"), patch, patch, bias=False),
        Param(f"{positions}.gate", (1,), "other"),
        Param(f"{positions}.embedding", (tokens, hidden), "other"),
        *blocks.embedding(f"{positions}.tile_embedding", ratios, tiles * tokens * hidden),
        *(
            p
            for name in ("pre_tile_positional_embedding", "post_tile_positional_embedding")
            for p in (
                Param(f"{prefix}{name}.gate", (1,), "other"),
                *blocks.embedding(f"{prefix}{name}.embedding", ratios, tiles * hidden),
            )
        ),
        *norm(f"{prefix}layernorm_pre", hidden, True),
        *norm(f"{prefix}layernorm_post", hidden, True),
    )
    local = Stack(
        name="vision",
        prefix=f"{prefix}transformer.layers",
        hidden_size=hidden,
        before=before,
        layers=(layer,) * config.layers("num_hidden_layers"),
    )
    whole = Stack(
        name="vision_global",
        prefix=f"{prefix}global_transformer.layers",
        hidden_size=hidden,
        layers=(replace(layer, params=gates + layer.params),) * config.layers("num_global_layers"),
    )
    return local, whole
