"""Readers of configurations: model type → the function that knows the family's code.

A reader takes the configuration and the class that is built (the first of `architectures`, or the family's causal or
base class) and returns the `Architecture` whose parameters are exactly those of that class in transformers.
"""

from collections.abc import Callable
from importlib import import_module

from hfvram.model.architecture import Architecture
from hfvram.model.config import Config

Reader = Callable[[Config, str | None], Architecture]

MODULES: dict[str, tuple[str, ...]] = {
    "llama": (
        *("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "granite", "arcee", "cwm", "seed_oss"),
        *("smollm3", "helium", "ernie4_5", "hunyuan_v1_dense", "nanochat", "nemotron", "olmo", "olmo2", "olmo3"),
        *("exaone4", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "starcoder2", "stablelm", "cohere", "cohere2"),
        *("glm", "glm4"),
    ),
    "moe": (
        *("mixtral", "minimax_m2", "olmoe", "qwen2_moe", "qwen3_moe", "phimoe", "granitemoe", "granitemoeshared"),
        *("gpt_oss", "glm4_moe", "ernie4_5_moe"),
    ),
    "gpt": ("gpt2", "gpt_bigcode", "gpt_neo", "gptj", "codegen", "gpt_neox"),
    "bloom": ("opt", "bloom", "falcon", "mpt"),
    "deepseek": ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "glm4_moe_lite", "minicpm3"),
    "deepseek_v4": ("deepseek_v4",),
    "llava": ("llava", "mistral3", "gemma3"),
    "qwen_vl": ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"),
    "glm4v": ("glm4v", "glm4v_moe"),
    "llama4": ("llama4", "llama4_text"),
    "mllama": ("mllama",),
    "gemma4": ("gemma4", "gemma4_text"),
    "kimi": ("kimi_k25",),
    "minicpmv": ("minicpmv4_6",),
    "qwen_audio": ("qwen2_audio",),
    "qwen_omni": ("qwen2_5_omni",),
    "dbrx": ("dbrx",),
    "mamba": ("mamba", "falcon_mamba", "mamba2"),
    "jamba": ("jamba",),
    "bamba": ("bamba", "granitemoehybrid", "falcon_h1"),
    "zamba": ("zamba", "zamba2"),
    "nemotron_h": ("nemotron_h",),
    "qwen3_next": ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
    "lfm2": ("lfm2", "lfm2_moe"),
    "recurrent_gemma": ("recurrent_gemma",),
    "minimax": ("minimax",),
    "olmo_hybrid": ("olmo_hybrid",),
    "bert": ("bert", "roberta", "xlm-roberta", "camembert", "electra", "mpnet"),
    "distilbert": ("distilbert",),
    "albert": ("albert",),
    "deberta": ("deberta", "deberta-v2"),
    "modernbert": ("modernbert", "nomic_bert"),
    "t5": ("t5", "mt5", "umt5"),
    "bart": ("bart", "mbart", "marian", "pegasus", "m2m_100"),
    "whisper": ("whisper",),
    "wav2vec2": ("wav2vec2", "hubert"),
    "vit": ("vit", "deit", "yolos", "dinov2"),
    "clip": ("clip", "clip_text_model", "clip_vision_model", "siglip", "siglip_text_model", "siglip_vision_model"),
    "git": ("git",),
}
"""Module of this package → the model types that it reads, each by its function `read`."""

_MODULE_OF = {model_type: module for module, types in MODULES.items() for model_type in types}


def reader(model_type: str) -> Reader | None:
    """The function that reads configurations of this type, None where no closed form is known."""
    if (module := _MODULE_OF.get(model_type)) is None:
        return None
    read: Reader = import_module(f"{__name__}.{module}").read
    return read
