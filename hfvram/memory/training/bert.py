"""Encoders of BERT's line with gradients: embeddings, a layer with a norm after each part, heads.

Source: transformers 5.17, models/{bert, roberta, distilbert, electra}/modeling_*.py.
"""

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training.attention import KEY_VALUE, OUT, PROJECTED, QUERY, Attended, attend
from hfvram.memory.training.blocks import DROPPED, HIDDEN, activate, normalize
from hfvram.memory.training.feed_forward import DOWN, WIDE
from hfvram.memory.training.gpt import parts
from hfvram.memory.training.states import Blocks, Leaf, Weights
from hfvram.memory.training.surroundings import Surroundings
from hfvram.memory.training.tape import Tape
from hfvram.memory.training.tensors import Tensor
from hfvram.model.layers import Attention, FeedForward, Layer

EMBEDDED = Tag("embeddings", "activations", "b·s·h·e", "transformers 5.17: BertEmbeddings.forward")
TYPES = Tag("token types", "activations", "b·s·8", "transformers 5.17: BertEmbeddings.forward")
PLACES = Tag("positions", "activations", "b·s·8", "transformers 5.17: RobertaEmbeddings.forward")


def embed(t: Tape, leaves: list[Leaf], ids: Tensor, around: Surroundings) -> Tensor:
    """The embeddings, projected where they are of another width than the layers (ELECTRA)."""
    w = Weights([leaf for leaf in leaves if leaf.param.kind != "embedding"])
    embeddings = _embeddings(t, leaves, w, ids, around)
    return w.linear(t, embeddings, EMBEDDED) if w.rest else embeddings


def _embeddings(t: Tape, leaves: list[Leaf], w: Weights, ids: Tensor, around: Surroundings) -> Tensor:
    """Words, token types (where the model has them) and positions, normed and dropped."""
    b, s = ids.shape
    tables = {leaf.param.name.split(".")[-2]: leaf.tensor for leaf in leaves if leaf.param.kind == "embedding"}
    if around.kind.embedding == "counted positions":
        places = _counted(t, b, s)
    else:
        places = Tensor(ids.storage, (1, s), (s, 1), "int64")
    if "token_type_embeddings" in tables:
        types = t.new(places.shape, "int64", None, TYPES)
        words = op.embedding(t, ids, tables["word_embeddings"], EMBEDDED)
        of_types = op.embedding(t, types.as_((b, s), (0, 1)), tables["token_type_embeddings"], EMBEDDED)
        embeddings = op.add(t, words, of_types, EMBEDDED)
        of_places = op.embedding(t, places, tables["position_embeddings"], EMBEDDED)
        embeddings = op.add(t, embeddings, of_places, EMBEDDED)
    else:
        words = op.embedding(t, ids, tables["word_embeddings"], EMBEDDED)
        of_places = op.embedding(t, places, tables["position_embeddings"], EMBEDDED)
        embeddings = op.add(t, words, of_places, EMBEDDED)
    embeddings = normalize(t, embeddings, w.norm(2), "layer")
    return op.dropout(t, embeddings, around.dropout.residual, EMBEDDED)


def _counted(t: Tape, b: int, s: int) -> Tensor:
    """RoBERTa's positions: those of tokens that are no padding, counted."""
    shape = (b, s)
    mask = t.new(shape, "bool", None, PLACES)
    mask = t.new(shape, "int32", None, PLACES)
    sums = t.new(shape, "int64", None, PLACES)
    sums = t.new(shape, "int32", None, PLACES)
    sums = t.new(shape, "int32", None, PLACES)
    indices = t.new(shape, "int32", None, PLACES)
    del sums
    whole = t.new(shape, "int64", None, PLACES)
    places = t.new(shape, "int64", None, PLACES)
    del mask, indices, whole
    return places


def norm_after(t: Tape, layer: Layer, blocks: Blocks, hidden: Tensor, around: Surroundings) -> Tensor:
    """A norm after each part, over its sum with the residual; the attention's weights are held to the end."""
    part, feed = parts(layer, around)
    own = Weights(blocks.own)
    w = Weights(blocks.mixers[0])
    attended, _weights = _attention(t, part, w, hidden, around)
    attended = _output(t, w, own, attended, hidden, around)
    return _fed(t, feed, Weights(blocks.feed_forward), own, attended, around)


def _attention(t: Tape, part: Attention, w: Weights, x: Tensor, around: Surroundings) -> Attended:
    b, s, _ = x.shape
    q = op.transpose(t, op.reshape(t, w.linear(t, x, QUERY), b, s, -1, part.head_dim), 1, 2)
    k = op.transpose(t, op.reshape(t, w.linear(t, x, KEY_VALUE), b, s, -1, part.head_dim), 1, 2)
    v = op.transpose(t, op.reshape(t, w.linear(t, x, KEY_VALUE), b, s, -1, part.value_dim), 1, 2)
    out, weights = attend(t, part, q, k, v, around)
    out = op.dense(t, op.reshape(t, out, b, s, -1, tag=OUT), OUT)
    return (out if part.output_apart else w.linear(t, out, PROJECTED)), weights


def _output(t: Tape, w: Weights, own: Weights, out: Tensor, residual: Tensor, around: Surroundings) -> Tensor:
    """What is attended, projected, dropped, added to the residual, and normed."""
    hidden = w.linear(t, out, PROJECTED)
    hidden = op.dropout(t, hidden, around.dropout.residual, DROPPED)
    return normalize(t, op.add(t, hidden, residual, HIDDEN), own.norm(2), "layer")


def _fed(t: Tape, feed: FeedForward, w: Weights, own: Weights, attended: Tensor, around: Surroundings) -> Tensor:
    inner = _intermediate(t, feed, w, attended)
    return _last(t, w, own, inner, attended, around)


def _intermediate(t: Tape, feed: FeedForward, w: Weights, hidden: Tensor) -> Tensor:
    hidden = w.linear(t, hidden, WIDE)
    return activate(t, hidden, feed.activation)


def _last(t: Tape, w: Weights, own: Weights, inner: Tensor, attended: Tensor, around: Surroundings) -> Tensor:
    hidden = w.linear(t, inner, DOWN)
    hidden = op.dropout(t, hidden, around.dropout.residual, DROPPED)
    return normalize(t, op.add(t, hidden, attended, HIDDEN), own.norm(2), "layer")


def plain_norm_after(t: Tape, layer: Layer, blocks: Blocks, hidden: Tensor, around: Surroundings) -> Tensor:
    """DistilBERT: the attention projects its output itself, and nothing of it is dropped."""
    part, feed = parts(layer, around)
    own = Weights(blocks.own)
    attended, _weights = _attention(t, part, Weights(blocks.mixers[0]), hidden, around)
    attended = normalize(t, op.add(t, attended, hidden, HIDDEN), own.norm(2), "layer")
    fed = _ffn(t, feed, Weights(blocks.feed_forward), attended, around)
    return normalize(t, op.add(t, fed, attended, HIDDEN), own.norm(2), "layer")


def _ffn(t: Tape, feed: FeedForward, w: Weights, hidden: Tensor, around: Surroundings) -> Tensor:
    hidden = w.linear(t, hidden, WIDE)
    hidden = activate(t, hidden, feed.activation)
    hidden = w.linear(t, hidden, DOWN)
    return op.dropout(t, hidden, around.dropout.residual, DROPPED)
