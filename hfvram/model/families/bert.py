"""BERT and those that are built like it: RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, MPNet.

Source: transformers 5.17, models/{bert, roberta, xlm_roberta, camembert, electra, mpnet}/modeling_*.py.
"""

from typing import Any

from hfvram.errors import HfvramError
from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families.blocks import embedding, mlp
from hfvram.model.families.common import max_positions
from hfvram.model.families.defaults import known
from hfvram.model.families.encoder import (
    Head,
    class_and_head,
    dense_head,
    encoder,
    encoder_layer,
    label_head,
    masked_head,
    self_attention,
)
from hfvram.model.layers import Attention, Param, linear, norm

FAMILIES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
    "electra": "Electra",
    "mpnet": "MPNet",
}
BASES = {"xlm-roberta": "roberta", "camembert": "roberta"}
"""The inner model's name where it is not the model type."""
POOLED: dict[str, tuple[Head, ...]] = {
    "bert": ("bare", "sequence", "choice", "pretraining", "next"),
    "electra": (),
    "mpnet": ("bare", "choice"),
    "roberta": ("bare", "choice"),
}
"""Heads that stand on the first token's pooled state."""


def read(config: Config, class_name: str | None) -> Architecture:
    config = known(config)
    kind = config.model_type
    base = BASES.get(kind, kind)
    class_name, head = class_and_head(config, class_name, FAMILIES[kind], heads(base))
    prefix = "" if head == "bare" else f"{base}."
    hidden, vocab = config.size("hidden_size"), config.size("vocab_size")
    width = config.size("embedding_size") if kind == "electra" else hidden
    decodes = config.flag("is_decoder")
    if config.flag("add_cross_attention"):
        raise HfvramError("unknown_architecture", f"{kind} with cross attention (add_cross_attention) is not known")
    activation = config.text("hidden_act", default="gelu")
    feed = mlp("intermediate.dense", "output.dense", hidden, config.size("intermediate_size"), activation)
    first = "attention.LayerNorm" if kind == "mpnet" else "attention.output.LayerNorm"
    block = encoder_layer(scores(config, hidden, decodes), feed, first, "output.LayerNorm", position="post")
    stack = Stack(
        name="text",
        prefix=f"{prefix}encoder.layer",
        hidden_size=hidden,
        before=embeddings(config, f"{prefix}embeddings", vocab, width)
        + (linear(f"{prefix}embeddings_project", width, hidden, bias=True) if width != hidden else ()),
        layers=(block,) * config.layers("num_hidden_layers"),
        after=position_bias(config, prefix)
        + (linear(f"{prefix}pooler.dense", hidden, hidden, bias=True) if head in POOLED[base] else ()),
    )
    tied = head in ("masked", "causal", "pretraining") and config.flag("tie_word_embeddings")
    tied = tied and not (base == "electra" and head == "pretraining")
    return encoder(
        config,
        class_name,
        stack,
        top(config, base, head, hidden, width, vocab, tied),
        tied_head=tied,
        task="causal" if decodes else "encoder",
        max_positions=positions(config),
    )


def heads(base: str) -> tuple[Head, ...]:
    """The heads that this family has."""
    common: tuple[Head, ...] = ("bare", "masked", "sequence", "tokens", "answers")
    if base == "bert":
        return (*common, "causal", "choice", "pretraining", "next")
    if base == "electra":
        return (*common, "causal", "pretraining")
    return (*common, "choice") if base == "mpnet" else (*common, "causal", "choice")


def positions(config: Config) -> int | None:
    """Tokens that the position embeddings serve: RoBERTa and MPNet count from behind the padding token's id."""
    rows = max_positions(config)
    if rows is None or config.model_type in ("bert", "electra"):
        return rows
    return max(rows - config.size("pad_token_id", default=1, low=0) - 1, 1)


def embeddings(config: Config, name: str, vocab: int, width: int) -> tuple[Param, ...]:
    rows = config.size("max_position_embeddings")
    types = (
        ()
        if config.model_type == "mpnet"
        else embedding(f"{name}.token_type_embeddings", config.size("type_vocab_size"), width)
    )
    words = embedding(f"{name}.word_embeddings", vocab, width)
    places = embedding(f"{name}.position_embeddings", rows, width)
    normed = norm(f"{name}.LayerNorm", width, bias=True)
    if config.model_type in ("bert", "electra"):
        return words + places + types + normed
    return words + types + normed + places


def scores(config: Config, hidden: int, decodes: bool) -> Attention:
    """MPNet has T5's position bias, one for all layers, and only the eager implementation."""
    if config.model_type == "mpnet":
        style: dict[str, Any] = {"position_bias": True, "scores": "own dtype", "implementations": ("eager",)}
        return self_attention(config, "attention.attn", hidden, ("q", "k", "v", "o"), **style)
    style = {"causal": decodes, "cached": decodes, "scores": "own dtype", "output_apart": True}
    projections = ("self.query", "self.key", "self.value", "output.dense")
    return self_attention(config, "attention", hidden, projections, **style)


def position_bias(config: Config, prefix: str) -> tuple[Param, ...]:
    if config.model_type != "mpnet":
        return ()
    buckets, heads = config.size("relative_attention_num_buckets"), config.size("num_attention_heads")
    return embedding(f"{prefix}encoder.relative_attention_bias", buckets, heads)


def top(config: Config, base: str, head: Head, hidden: int, width: int, vocab: int, tied: bool) -> tuple[Param, ...]:
    """What stands on the encoder."""
    if head == "bare":
        return ()
    if head in ("tokens", "answers", "choice") or (head == "sequence" and base == "bert"):
        return label_head(config, head, hidden)
    if head == "sequence":
        return dense_head(config, hidden)
    if base == "electra":
        return electra_top(head, hidden, width, vocab, tied)
    if base != "bert":
        return masked_head("lm_head", hidden, hidden, vocab, tied, normed="layer_norm")
    following = (
        () if head in ("masked", "causal") else linear("cls.seq_relationship", hidden, 2, bias=True, kind="head")
    )
    if head == "next":
        return following
    name = "cls.predictions"
    return masked_head(name, hidden, hidden, vocab, tied, "transform.dense", "transform.LayerNorm") + following


def electra_top(head: Head, hidden: int, width: int, vocab: int, tied: bool) -> tuple[Param, ...]:
    """The generator's language model, or the discriminator that tells replaced tokens."""
    if head == "pretraining":
        name = "discriminator_predictions"
        return linear(f"{name}.dense", hidden, hidden, bias=True) + linear(
            f"{name}.dense_prediction", hidden, 1, bias=True, kind="head"
        )
    decoder = linear("generator_lm_head", width, vocab, bias=True, kind="head")
    return (
        norm("generator_predictions.LayerNorm", width, bias=True)
        + linear("generator_predictions.dense", hidden, width, bias=True)
        + (decoder[1:] if tied else decoder)
    )
