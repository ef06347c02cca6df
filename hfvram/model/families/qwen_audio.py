"""Qwen2-Audio: Whisper's encoder before a Qwen2 text model.

Source: transformers 5.17, models/qwen2_audio/{modeling, configuration}_qwen2_audio.py.
"""

from dataclasses import replace

from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families import blocks
from hfvram.model.families.defaults import opened, section
from hfvram.model.families.encoder import ENCODER, encoder_layer
from hfvram.model.families.multimodal import text_stack, wrapper
from hfvram.model.layers import Layer, linear, norm


def read(config: Config, class_name: str | None) -> Architecture:
    config, class_name, prefix = opened(config, class_name)
    text, audio = section(config, "text_config"), section(config, "audio_config")
    projector = linear(
        f"{prefix}multi_modal_projector.linear", audio.size("d_model"), text.size("hidden_size"), bias=True
    )
    stacks = (
        tower(audio, f"{prefix}audio_tower."),
        Stack("projector", (), before=projector),
        text_stack(text, f"{prefix}language_model."),
    )
    return replace(wrapper(config, class_name, text, stacks, may_tie=False), logits_of_all_tokens=True)


def whisper_layer(config: Config) -> Layer:
    """A layer of Whisper's encoder; its keys have no bias."""
    hidden, heads = config.size("d_model"), config.size("encoder_attention_heads")
    attention = blocks.attention(
        "self_attn",
        hidden,
        heads,
        config.divided("d_model", hidden, heads),
        bias=True,
        k_bias=False,
        projections=("q_proj", "k_proj", "v_proj", "out_proj"),
        **ENCODER,
    )
    feed = blocks.mlp(
        "fc1", "fc2", hidden, config.size("encoder_ffn_dim"), config.text("activation_function", default="gelu")
    )
    return encoder_layer(attention, feed, "self_attn_layer_norm", "final_layer_norm")


def tower(config: Config, prefix: str) -> Stack:
    hidden = config.size("d_model")
    return Stack(
        name="audio",
        prefix=f"{prefix}layers",
        hidden_size=hidden,
        before=blocks.convolution(f"{prefix}conv1", hidden, config.size("num_mel_bins"), 3)
        + blocks.convolution(f"{prefix}conv2", hidden, hidden, 3)
        + blocks.embedding(f"{prefix}embed_positions", config.size("max_source_positions"), hidden),
        layers=(whisper_layer(config),) * config.layers("encoder_layers"),
        after=norm(f"{prefix}layer_norm", hidden, True),
    )
