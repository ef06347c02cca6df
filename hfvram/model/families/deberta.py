"""DeBERTa and its second version: attention with separate scores of content and relative position.

Source: transformers 5.17, models/{deberta, deberta_v2}/modeling_*.py; He et al., arXiv 2006.03654.
"""

from typing import Any

from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families.blocks import attention, convolution, embedding, fused_attention, mlp
from hfvram.model.families.common import num_labels
from hfvram.model.families.defaults import known
from hfvram.model.families.encoder import (
    ENCODER,
    Head,
    class_and_head,
    encoder,
    encoder_layer,
    label_head,
    masked_head,
)
from hfvram.model.layers import Attention, Param, linear, norm

FAMILIES = {"deberta": "Deberta", "deberta-v2": "DebertaV2"}


def read(config: Config, class_name: str | None) -> Architecture:
    config = known(config)
    kind = config.model_type
    common: tuple[Head, ...] = ("bare", "masked", "sequence", "tokens", "answers")
    known_heads = (*common, "choice") if kind == "deberta-v2" else common
    class_name, head = class_and_head(config, class_name, FAMILIES[kind], known_heads)
    prefix = "" if head == "bare" else "deberta."
    hidden, vocab = config.size("hidden_size"), config.size("vocab_size")
    width = config.size("embedding_size", default=hidden)
    activation = config.text("hidden_act", default="gelu")
    feed = mlp("intermediate.dense", "output.dense", hidden, config.size("intermediate_size"), activation)
    norms = ("attention.output.LayerNorm", "output.LayerNorm")
    block = encoder_layer(self_attention(config, hidden), feed, *norms, position="post")
    stack = Stack(
        name="text",
        prefix=f"{prefix}encoder.layer",
        hidden_size=hidden,
        before=embeddings(config, f"{prefix}embeddings", hidden, width, vocab),
        layers=(block,) * config.layers("num_hidden_layers"),
        after=relative(config, f"{prefix}encoder", hidden),
    )
    tied = head == "masked" and config.flag("tie_word_embeddings")
    return encoder(config, class_name, stack, top(config, head, hidden, width, vocab, tied), tied_head=tied)


def embeddings(config: Config, name: str, hidden: int, width: int, vocab: int) -> tuple[Param, ...]:
    rows, types = config.size("max_position_embeddings"), config.size("type_vocab_size", default=0, low=0)
    absolute = config.flag("position_biased_input", default=True)
    return (
        embedding(f"{name}.word_embeddings", vocab, width)
        + (embedding(f"{name}.position_embeddings", rows, width) if absolute else ())
        + (embedding(f"{name}.token_type_embeddings", types, width) if types else ())
        + (linear(f"{name}.embed_proj", width, hidden) if width != hidden else ())
        + norm(f"{name}.LayerNorm", hidden, bias=True)
    )


def scores(config: Config) -> tuple[str, ...]:
    """The relative scores: content to position (`c2p`), position to content (`p2c`)."""
    given = config.get("pos_att_type")
    if not config.flag("relative_attention") or given is None:
        return ()
    if isinstance(given, str):
        return tuple(word.strip() for word in given.lower().split("|"))
    return tuple(config.strings("pos_att_type") or ())


def self_attention(config: Config, hidden: int) -> Attention:
    """Version 1 makes queries, keys and values in one projection with bare fp32 biases for queries and values."""
    heads = config.size("num_attention_heads")
    head_dim = config.divided("hidden_size", hidden, heads)
    style: dict[str, Any] = {
        **ENCODER,
        "scores": "own dtype",
        "position_bias": bool(scores(config)),
        "implementations": ("eager",),
    }
    name, relative = "attention.self", scores(config)
    if config.model_type == "deberta":
        bare = tuple(Param(f"{name}.{part}_bias", (hidden,), "other", "fp32") for part in "qv")
        mixed = tuple(p for part in ("logits", "weights") for p in linear(f"{name}.head_{part}_proj", heads, heads))
        extra = (
            bare
            + (mixed if config.flag("talking_head") else ())
            + (linear(f"{name}.pos_proj", hidden, hidden) if "c2p" in relative else ())
            + (linear(f"{name}.pos_q_proj", hidden, hidden, bias=True) if "p2c" in relative else ())
        )
        names = ("self.in_proj", "output.dense")
        return fused_attention(
            "attention", hidden, heads, head_dim, out_bias=True, projections=names, extra=extra, **style
        )
    head_dim = config.size("attention_head_size", default=head_dim)
    wide, own = heads * head_dim, not config.flag("share_att_key")
    extra = (linear(f"{name}.pos_key_proj", hidden, wide, bias=True) if own and "c2p" in relative else ()) + (
        linear(f"{name}.pos_query_proj", hidden, wide, bias=True) if own and "p2c" in relative else ()
    )
    projections = ("self.query_proj", "self.key_proj", "self.value_proj", "output.dense")
    return attention("attention", hidden, heads, head_dim, bias=True, projections=projections, extra=extra, **style)


def relative(config: Config, name: str, hidden: int) -> tuple[Param, ...]:
    """The table of relative positions, its norm, and version 2's convolution."""
    rows = config.size("max_relative_positions", default=-1, low=-1)
    rows = rows if rows >= 1 else config.size("max_position_embeddings")
    table = config.flag("relative_attention")
    if config.model_type == "deberta":
        return embedding(f"{name}.rel_embeddings", 2 * rows, hidden) if table else ()
    buckets = config.size("position_buckets", default=-1, low=-1)
    kernel, groups = config.size("conv_kernel_size", default=0, low=0), config.size("conv_groups", default=1)
    normed = "layer_norm" in [w.strip() for w in config.text("norm_rel_ebd", default="none").lower().split("|")]
    channels = config.divided("hidden_size", hidden, groups)
    return (
        (embedding(f"{name}.rel_embeddings", 2 * (buckets if buckets > 0 else rows), hidden) if table else ())
        + (norm(f"{name}.LayerNorm", hidden, bias=True) if normed else ())
        + (convolution(f"{name}.conv.conv", hidden, channels, kernel) if kernel else ())
        + (norm(f"{name}.conv.LayerNorm", hidden, bias=True) if kernel else ())
    )


def top(config: Config, head: Head, hidden: int, width: int, vocab: int, tied: bool) -> tuple[Param, ...]:
    """What stands on the encoder."""
    if head in ("sequence", "choice"):
        pooled = config.size("pooler_hidden_size", default=hidden)
        labels = 1 if head == "choice" else num_labels(config)
        return linear("pooler.dense", pooled, pooled, bias=True) + linear(
            "classifier", pooled, labels, bias=True, kind="head"
        )
    if head in ("tokens", "answers"):
        return label_head(config, head, hidden)
    if head != "masked":
        return ()
    if config.flag("legacy", default=True):
        return masked_head("cls.predictions", hidden, width, vocab, tied, "transform.dense", "transform.LayerNorm")
    return masked_head("lm_predictions.lm_head", hidden, hidden, vocab, tied=True)
