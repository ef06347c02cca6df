"""Qwen2.5-Omni: a thinker that sees and hears, a talker that turns its thoughts into speech codes, and their sound.

Source: transformers 5.17, models/qwen2_5_omni/{modeling, configuration}_qwen2_5_omni.py.
"""

from dataclasses import replace

from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families import blocks
from hfvram.model.families.defaults import class_of, known, section
from hfvram.model.families.multimodal import text_stack, wrapper
from hfvram.model.families.qwen_omni_speech import speech
from hfvram.model.families.qwen_vl import vision_2_5
from hfvram.model.families.whisper import layer
from hfvram.model.layers import Param, linear, norm


def read(config: Config, class_name: str | None) -> Architecture:
    config = known(config)
    thinker = section(config, "thinker_config")
    text = section(thinker, "text_config")
    stacks = (
        hearing(section(thinker, "audio_config"), "thinker.audio_tower."),
        vision_2_5(section(thinker, "vision_config"), "thinker.visual.", fused=False),
        text_stack(text, "thinker.model."),
    )
    architecture = wrapper(
        thinker,
        class_of(config, class_name),
        text,
        stacks,
        head="thinker.",
        model_type=config.model_type,
    )
    if not config.flag("enable_audio_output", default=True):
        return replace(architecture, logits_of_all_tokens=True)
    # The thinker's head is built before the talker: it ends the text stack.
    thinking = replace(stacks[-1], after=stacks[-1].after + architecture.head)
    talking = talker(section(config, "talker_config"), "talker.")
    sound = speech(section(config, "token2wav_config"), "token2wav.")
    return replace(architecture, stacks=(*stacks[:-1], thinking, talking, sound), head=(), logits_of_all_tokens=True)


def hearing(config: Config, prefix: str) -> Stack:
    """Whisper's encoder with fixed positions, and a projection into the thinker's width."""
    hidden, out = config.size("d_model"), config.size("output_dim")
    positions = (config.size("max_source_positions"), hidden)
    return Stack(
        name="audio",
        prefix=f"{prefix}layers",
        hidden_size=hidden,
        before=(
            *blocks.convolution(f"{prefix}conv1", hidden, config.size("num_mel_bins"), 3),
            *blocks.convolution(f"{prefix}conv2", hidden, hidden, 3),
            Param(f"{prefix}positional_embedding.positional_embedding", positions, "buffer", "fp32"),
            *blocks.embedding(f"{prefix}audio_bos_eos_token", 2, out),
        ),
        layers=(layer(config, "encoder", hidden),) * config.layers("encoder_layers"),
        after=norm(f"{prefix}ln_post", hidden, True) + linear(f"{prefix}proj", hidden, out, True),
    )


def talker(config: Config, prefix: str) -> Stack:
    """A text model of its own that reads the thinker's states and writes speech codes."""
    wide, hidden, vocab = config.size("embedding_size"), config.size("hidden_size"), config.size("vocab_size")
    text = text_stack(config, f"{prefix}model.")
    return replace(
        text,
        name="talker",
        before=linear(f"{prefix}thinker_to_talker_proj", wide, hidden, True)
        + blocks.embedding(f"{prefix}model.embed_tokens", vocab, wide),
        after=text.after + linear(f"{prefix}codec_head", hidden, vocab),
    )
