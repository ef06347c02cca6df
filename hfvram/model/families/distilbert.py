"""DistilBERT: BERT at half the depth, without token types and pooler.

Source: transformers 5.17, models/distilbert/modeling_distilbert.py.
"""

from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families.blocks import embedding, mlp
from hfvram.model.families.defaults import known
from hfvram.model.families.encoder import Head, class_and_head, encoder, encoder_layer, label_head, self_attention
from hfvram.model.layers import Param, linear, norm

HEADS: tuple[Head, ...] = ("bare", "masked", "sequence", "tokens", "answers", "choice")


def read(config: Config, class_name: str | None) -> Architecture:
    config = known(config)
    class_name, head = class_and_head(config, class_name, "DistilBert", HEADS)
    prefix = "" if head == "bare" else "distilbert."
    hidden, vocab = config.size("hidden_size"), config.size("vocab_size")
    projections = ("q_lin", "k_lin", "v_lin", "out_lin")
    scores = self_attention(config, "attention", hidden, projections, scores="own dtype")
    feed = mlp("ffn.lin1", "ffn.lin2", hidden, config.size("hidden_dim"), config.text("activation", default="gelu"))
    block = encoder_layer(scores, feed, "sa_layer_norm", "output_layer_norm", position="post")
    name = f"{prefix}embeddings"
    stack = Stack(
        name="text",
        prefix=f"{prefix}transformer.layer",
        hidden_size=hidden,
        before=embedding(f"{name}.word_embeddings", vocab, hidden)
        + embedding(f"{name}.position_embeddings", config.size("max_position_embeddings"), hidden)
        + norm(f"{name}.LayerNorm", hidden, bias=True),
        layers=(block,) * config.layers("num_hidden_layers"),
    )
    tied = head == "masked" and config.flag("tie_word_embeddings")
    return encoder(config, class_name, stack, top(config, head, hidden, vocab, tied), tied_head=tied)


def top(config: Config, head: Head, hidden: int, vocab: int, tied: bool) -> tuple[Param, ...]:
    """What stands on the encoder."""
    if head == "bare":
        return ()
    if head == "masked":
        projector = linear("vocab_projector", hidden, vocab, bias=True, kind="head")
        transform = linear("vocab_transform", hidden, hidden, bias=True) + norm("vocab_layer_norm", hidden, bias=True)
        return transform + (projector[1:] if tied else projector)
    first = linear("pre_classifier", hidden, hidden, bias=True) if head in ("sequence", "choice") else ()
    return first + label_head(config, head, hidden)
