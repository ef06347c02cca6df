"""GIT: CLIP's vision tower, and a decoder over its patches and the text, built like BERT.

Source: transformers 5.17, models/git/modeling_git.py and configuration_git.py.
"""

from dataclasses import replace
from typing import Any

from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families.blocks import embedding, mlp
from hfvram.model.families.common import class_and_end, dtype_of, max_positions
from hfvram.model.families.defaults import known, section
from hfvram.model.families.encoder import encoder_layer, self_attention
from hfvram.model.families.vision import clip
from hfvram.model.layers import Attention, Layer, Param, linear, norm


def read(config: Config, class_name: str | None) -> Architecture:
    config = known(config)
    class_name, end = class_and_end(config, class_name, "Git", ("ForCausalLM", "Model"))
    generates = end == "ForCausalLM"
    prefix, tied = "git." if generates else "", generates and config.flag("tie_word_embeddings")
    hidden, vocab = config.size("hidden_size"), config.size("vocab_size")
    seen = section(config, "vision_config")
    output = linear("output", hidden, vocab, bias=True, kind="head")
    return Architecture(
        model_type="git",
        class_name=class_name,
        task="causal",
        stacks=(tower(seen, f"{prefix}image_encoder.vision_model."), decoder(config, seen, prefix, hidden, vocab)),
        main="text",
        vocab_size=vocab,
        hidden_size=hidden,
        max_positions=max_positions(config),
        dtype=dtype_of(config),
        head=() if not generates else output[1:] if tied else output,
        tied_head=tied,
        final_norm=None,
    )


def tower(config: Config, prefix: str) -> Stack:
    """CLIP's tower with GIT's code, which has the eager implementation alone."""
    stack = clip(config, prefix)
    layer = stack.layers[0] if stack.layers else Layer()
    attention = (replace(m, implementations=("eager",)) for m in layer.mixers if isinstance(m, Attention))
    return replace(stack, layers=(replace(layer, mixers=tuple(attention)),) * len(stack.layers))


def decoder(config: Config, seen: Config, prefix: str, hidden: int, vocab: int) -> Stack:
    """Its layers see the projected patches and then the text, all with the eager implementation."""
    patches, activation = seen.size("hidden_size"), config.text("hidden_act", default="gelu")
    frames = config.size("num_image_with_embedding", default=0, low=0, high=4096)
    name = f"{prefix}embeddings"
    projections = ("self.query", "self.key", "self.value", "output.dense")
    style: dict[str, Any] = {"causal": True, "cached": True, "implementations": ("eager",), "scores": "own dtype"}
    scores = self_attention(config, "attention", hidden, projections, **style)
    feed = mlp("intermediate.dense", "output.dense", hidden, config.size("intermediate_size"), activation)
    layer = encoder_layer(scores, feed, "attention.output.LayerNorm", "output.LayerNorm", position="post")
    return Stack(
        name="text",
        prefix=f"{prefix}encoder.layer",
        hidden_size=hidden,
        before=embedding(f"{name}.word_embeddings", vocab, hidden)
        + embedding(f"{name}.position_embeddings", config.size("max_position_embeddings"), hidden)
        + norm(f"{name}.LayerNorm", hidden, bias=True),
        layers=(layer,) * config.layers("num_hidden_layers"),
        after=linear(f"{prefix}visual_projection.visual_projection.0", patches, hidden, bias=True)
        + norm(f"{prefix}visual_projection.visual_projection.1", hidden, bias=True)
        + tuple(Param(f"{prefix}img_temporal_embedding.{i}", (1, 1, patches), "other") for i in range(frames)),
    )
