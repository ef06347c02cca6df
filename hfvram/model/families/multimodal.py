"""A language model with towers: the text stack of whatever type the configuration nests, and the whole around it."""

from dataclasses import replace
from importlib import import_module
from typing import Any

from hfvram.errors import HfvramError, printable
from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families.common import causal_head, dtype_of, max_positions

TEXTS = {
    "llama": (
        *("llama", "mistral", "ministral3", "qwen2", "qwen3", "gemma3_text", "granite", "phi3", "cohere2"),
        *("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "glm4v_text"),
        *("qwen2_5_omni_text", "qwen2_5_omni_talker"),
    ),
    "moe": ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "qwen3_vl_moe_text", "glm4v_moe_text"),
    "deepseek": ("deepseek_v2", "deepseek_v3"),
    "llama4": ("llama4_text",),
    "gemma4": ("gemma4_text",),
    "qwen3_next": ("qwen3_5_text", "qwen3_5_moe_text"),
}
"""Module of this package → the types of nested text models that its `stack(config, prefix)` builds."""

TIED_BY_TEXT = ("qwen2_vl", "qwen2_5_vl", "glm4v", "glm4v_moe")
"""Types whose nested `tie_word_embeddings` counts as well."""

_MODULE_OF = {model_type: module for module, types in TEXTS.items() for model_type in types}


def text_stack(config: Config, prefix: str) -> Stack:
    """The stack of a nested text configuration, its tensors named under `prefix`."""
    if (module := _MODULE_OF.get(config.model_type)) is None:
        raise HfvramError("unknown_architecture", f"text model {printable(config.model_type, 40)!r} is not known")
    stack: Stack = import_module(f"hfvram.model.families.{module}").stack(config, prefix)
    return stack


def wrapper(
    config: Config,
    class_name: str,
    text: Config,
    stacks: tuple[Stack, ...],
    head: str = "",
    may_tie: bool = True,
    **facts: Any,
) -> Architecture:
    """The model of these stacks, in the order in which they are built; one of them is called `text`.

    `head` stands before `lm_head`. The outer configuration decides whether it is tied (`may_tie` false: it never is).
    """
    hidden, vocab = text.size("hidden_size"), text.size("vocab_size")
    tied = may_tie and config.flag("tie_word_embeddings")
    if config.model_type in TIED_BY_TEXT and text.flag("tie_word_embeddings"):
        tied = True
    params, is_tied = causal_head(Config({**config.values, "tie_word_embeddings": tied}), class_name, hidden, vocab)
    return Architecture(
        **{
            "model_type": config.model_type,
            "class_name": class_name,
            "task": "causal",
            "stacks": stacks,
            "main": "text",
            "vocab_size": vocab,
            "hidden_size": hidden,
            "max_positions": max_positions(text),
            "dtype": dtype_of(config),
            "text_type": text.model_type,
            "head": tuple(replace(p, name=head + p.name) for p in params),
            "tied_head": is_tied,
            "logits_softcap": bool(text.number("final_logit_softcapping", default=0.0)),
            **facts,
        }
    )
