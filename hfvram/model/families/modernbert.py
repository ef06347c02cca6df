"""ModernBERT and Nomic BERT: encoders with rotary positions and gated feed-forwards.

Source: transformers 5.17, models/{modernbert, nomic_bert}/modeling_*.py and configuration_*.py.
"""

from functools import cache

from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families.blocks import attention, embedding, fused_attention, fused_gated_mlp, gated_mlp
from hfvram.model.families.common import num_labels
from hfvram.model.families.decoder import hybrid_kinds
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
from hfvram.model.layers import Attention, Layer, Param, Rotary, linear, norm

MODERN: tuple[Head, ...] = ("bare", "masked", "sequence", "tokens", "answers", "choice")
NOMIC: tuple[Head, ...] = ("bare", "masked", "sequence", "tokens")


def read(config: Config, class_name: str | None) -> Architecture:
    config = known(config)
    return nomic(config, class_name) if config.model_type == "nomic_bert" else modern(config, class_name)


def modern(config: Config, class_name: str | None) -> Architecture:
    """Every third layer attends to all tokens, the others to `local_attention` around each; the first has no norm."""
    class_name, head = class_and_head(config, class_name, "ModernBert", MODERN)
    prefix = "" if head == "bare" else "model."
    hidden, vocab, bias = config.size("hidden_size"), config.size("vocab_size"), config.flag("norm_bias")
    layers, every = config.layers("num_hidden_layers"), config.size("global_attn_every_n_layers", default=3)
    pattern = ["sliding_attention" if i % every else "full_attention" for i in range(layers)]
    kinds = hybrid_kinds(config, pattern, known=("sliding_attention", "full_attention"))
    activation, width = config.text("hidden_activation", default="gelu"), config.size("intermediate_size")

    @cache
    def layer(kind: str, first: bool) -> Layer:
        feed = fused_gated_mlp("mlp", hidden, width, activation, ("Wi", "Wo"), config.flag("mlp_bias"))
        return Layer(
            mixers=(modern_attention(config, hidden, kind),),
            feed_forward=feed,
            norm="layer",
            params=(() if first else norm("attn_norm", hidden, bias)) + norm("mlp_norm", hidden, bias),
        )

    stack = Stack(
        name="text",
        prefix=f"{prefix}layers",
        hidden_size=hidden,
        before=embedding(f"{prefix}embeddings.tok_embeddings", vocab, hidden)
        + norm(f"{prefix}embeddings.norm", hidden, bias),
        layers=tuple(layer(kind, i == 0) for i, kind in enumerate(kinds)),
        after=norm(f"{prefix}final_norm", hidden, bias),
    )
    tied = head == "masked" and config.flag("tie_word_embeddings")
    decoder = linear("decoder", hidden, vocab, config.flag("decoder_bias"), kind="head")
    labels = linear("classifier", hidden, 1 if head == "choice" else num_labels(config), bias=True, kind="head")
    last = (decoder[1:] if tied else decoder) if head == "masked" else labels
    top = linear("head.dense", hidden, hidden, config.flag("classifier_bias")) + norm("head.norm", hidden, bias) + last
    return encoder(config, class_name, stack, () if head == "bare" else top, tied_head=tied, final_norm="layer")


def modern_attention(config: Config, hidden: int, kind: str) -> Attention:
    heads = config.size("num_attention_heads")
    head_dim = config.divided("hidden_size", hidden, heads)
    return fused_attention(
        "attn",
        hidden,
        heads,
        head_dim,
        bias=config.flag("attention_bias"),
        projections=("Wqkv", "Wo"),
        kind=kind,
        window=config.size("local_attention") // 2 + 1 if kind == "sliding_attention" else None,
        rotary=Rotary(dim=head_dim),
        **ENCODER,
    )


def nomic(config: Config, class_name: str | None) -> Architecture:
    class_name, head = class_and_head(config, class_name, "NomicBert", NOMIC)
    prefix = "" if head == "bare" else "nomic_bert."
    hidden, vocab, heads = config.size("hidden_size"), config.size("vocab_size"), config.size("num_attention_heads")
    head_dim = config.size("head_dim", default=0, low=0) or config.divided("hidden_size", hidden, heads)
    activation = config.text("hidden_act", default="silu")
    scores = attention("self_attn", hidden, heads, head_dim, rotary=Rotary(dim=head_dim), **ENCODER)
    feed = gated_mlp("mlp", hidden, config.size("intermediate_size"), activation)
    layer = encoder_layer(scores, feed, "post_attention_layernorm", "post_mlp_layernorm", position="post")
    stack = Stack(
        name="text",
        prefix=f"{prefix}layers",
        hidden_size=hidden,
        before=embedding(f"{prefix}embeddings.word_embeddings", vocab, hidden)
        + embedding(f"{prefix}embeddings.token_type_embeddings", config.size("type_vocab_size"), hidden)
        + norm(f"{prefix}embeddings.LayerNorm", hidden, bias=True)
        + (linear(f"{prefix}pooler.dense", hidden, hidden, bias=True) if head == "sequence" else ()),
        layers=(layer,) * config.layers("num_hidden_layers"),
    )
    tied = head == "masked" and config.flag("tie_word_embeddings", default=True)
    top: tuple[Param, ...] = () if head == "bare" else label_head(config, head, hidden)
    if head == "masked":
        top = masked_head("cls.predictions", hidden, hidden, vocab, tied, "transform.dense", "transform.layer_norm")
    return encoder(config, class_name, stack, top, tied_head=tied)
