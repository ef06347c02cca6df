"""ALBERT: all layers share the weights of one, or of a few groups.

Source: transformers 5.17, models/albert/modeling_albert.py.
"""

from hfvram.errors import HfvramError
from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import MAX_LAYERS, Config
from hfvram.model.families.blocks import embedding, mlp
from hfvram.model.families.defaults import known
from hfvram.model.families.encoder import (
    Head,
    class_and_head,
    encoder,
    encoder_layer,
    label_head,
    masked_head,
    self_attention,
)
from hfvram.model.layers import Layer, Param, linear, norm

HEADS: tuple[Head, ...] = ("bare", "masked", "sequence", "tokens", "answers", "choice", "pretraining")


def read(config: Config, class_name: str | None) -> Architecture:
    """Layer i runs group ⌊i · groups ÷ layers⌋, each group `inner_group_num` layers; a group's first run owns it."""
    config = known(config)
    class_name, head = class_and_head(config, class_name, "Albert", HEADS)
    prefix = "" if head == "bare" else "albert."
    hidden, vocab, width = config.size("hidden_size"), config.size("vocab_size"), config.size("embedding_size")
    layers, groups = config.layers("num_hidden_layers"), config.layers("num_hidden_groups")
    inner = config.layers("inner_group_num")
    if not layers * inner <= MAX_LAYERS or groups > layers:
        raise HfvramError("bad_config", f"config.json: {groups} groups of {inner} layers don't make {layers} layers")
    runs = [(i * groups // layers, j) for i in range(layers) for j in range(inner)]
    path = f"{prefix}encoder.albert_layer_groups"
    shared = {(g, j): layer(config, hidden, f"{path}.{g}.albert_layers.{j}") for g, j in dict.fromkeys(runs)}
    firsts = {run: i for i, run in reversed(list(enumerate(runs)))}
    name, pooled = f"{prefix}embeddings", head in ("bare", "sequence", "choice", "pretraining")
    stack = Stack(
        name="text",
        hidden_size=hidden,
        before=embedding(f"{name}.word_embeddings", vocab, width)
        + embedding(f"{name}.position_embeddings", config.size("max_position_embeddings"), width)
        + embedding(f"{name}.token_type_embeddings", config.size("type_vocab_size"), width)
        + norm(f"{name}.LayerNorm", width, bias=True)
        + linear(f"{prefix}encoder.embedding_hidden_mapping_in", width, hidden, bias=True),
        layers=tuple(shared[run] for run in runs),
        repeated=frozenset(range(len(runs))) - frozenset(firsts.values()),
        after=linear(f"{prefix}pooler", hidden, hidden, bias=True) if pooled else (),
    )
    tied = head in ("masked", "pretraining") and config.flag("tie_word_embeddings")
    return encoder(config, class_name, stack, top(config, head, hidden, width, vocab, tied), tied_head=tied)


def layer(config: Config, hidden: int, name: str) -> Layer:
    projections = ("query", "key", "value", "dense")
    scores = self_attention(config, f"{name}.attention", hidden, projections, scores="own dtype")
    width, activation = config.size("intermediate_size"), config.text("hidden_act", default="gelu_new")
    feed = mlp(f"{name}.ffn", f"{name}.ffn_output", hidden, width, activation)
    norms = (f"{name}.attention.LayerNorm", f"{name}.full_layer_layer_norm")
    return encoder_layer(scores, feed, *norms, position="post")


def top(config: Config, head: Head, hidden: int, width: int, vocab: int, tied: bool) -> tuple[Param, ...]:
    """What stands on the encoder."""
    if head == "bare":
        return ()
    if head not in ("masked", "pretraining"):
        return label_head(config, head, hidden)
    order = label_head(config, head, hidden, "sop_classifier.classifier") if head == "pretraining" else ()
    return masked_head("predictions", hidden, width, vocab, tied) + order
