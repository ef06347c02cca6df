"""Qwen2-Audio: Whisper's encoder before a Qwen2 text model.

Source: transformers 5.17, models/qwen2_audio/{modeling, configuration}_qwen2_audio.py.
"""

from dataclasses import replace

from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families.defaults import opened, section
from hfvram.model.families.multimodal import text_stack, wrapper
from hfvram.model.families.whisper import encoder
from hfvram.model.layers import linear


def read(config: Config, class_name: str | None) -> Architecture:
    config, class_name, prefix = opened(config, class_name)
    text, audio = section(config, "text_config"), section(config, "audio_config")
    projector = linear(
        f"{prefix}multi_modal_projector.linear", audio.size("d_model"), text.size("hidden_size"), bias=True
    )
    stacks = (
        replace(encoder(audio, f"{prefix}audio_tower", audio.size("d_model")), name="audio"),
        Stack("projector", (), before=projector),
        text_stack(text, f"{prefix}language_model."),
    )
    return replace(wrapper(config, class_name, text, stacks, may_tie=False), logits_of_all_tokens=True)
