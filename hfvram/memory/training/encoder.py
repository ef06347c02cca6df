"""An encoder's forward pass with gradients: embeddings, layers, a masked language model's head, and its loss.

Source: transformers 5.17, models/bert/modeling_bert.py `BertForMaskedLM`.
"""

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training.bert import embed
from hfvram.memory.training.blocks import activate, normalize, unknown
from hfvram.memory.training.classify import first_token, judges
from hfvram.memory.training.decoder import LOG_PROBABILITIES, LOGITS, through
from hfvram.memory.training.kinds import kind_of
from hfvram.memory.training.states import States, Weights
from hfvram.memory.training.surroundings import Surroundings
from hfvram.memory.training.tape import Tape
from hfvram.memory.training.tensors import Tensor
from hfvram.model.architecture import Architecture
from hfvram.model.layers import Dropout, FeedForward, Layer
from hfvram.request import Request

TRANSFORMED = Tag("head, transformed", "activations", "b·s·h·e", "transformers 5.17: BertPredictionHeadTransform")


def forward(
    t: Tape,
    architecture: Architecture,
    states: States,
    layers: list[tuple[Layer, int | None]],
    ids: Tensor,
    request: Request,
) -> tuple[Tensor, list[Tensor]]:
    """One pass with labels. Returns the loss and the logits, which the model's output holds."""
    around = Surroundings(architecture.class_name, kind_of(architecture), request)
    around.dropout = layers[0][0].dropout if layers else Dropout()
    embedded: list[Tensor] = []
    encoded = encode(t, states, layers, ids, around, embedded)
    if judges(architecture):
        return first_token(t, architecture, states, encoded, embedded, around.dropout.residual), []
    embedded.clear()
    logits = _masked_head(t, architecture, states, encoded)
    rows = op.reshape(t, logits, -1, logits.shape[-1])
    return op.cross_entropy(t, rows, ids.as_((ids.numel,), (1,)), LOG_PROBABILITIES), [logits]


def encode(
    t: Tape,
    states: States,
    layers: list[tuple[Layer, int | None]],
    ids: Tensor,
    around: Surroundings,
    held: list[Tensor],
) -> Tensor:
    """Hidden states of every token. The embeddings are `held` to the end of the bare model."""
    held.append(embed(t, states.before, ids, around))
    around.masks[None] = None  # nothing is masked where all tokens see each other
    return through(t, layers, states.layers, held[:], around)


def _masked_head(t: Tape, architecture: Architecture, states: States, hidden: Tensor) -> Tensor:
    """A dense layer, its activation, a norm, and the embeddings' table (or one of its own) with a bias."""
    feed = architecture.text.layers[0].feed_forward
    if not isinstance(feed, FeedForward):
        raise unknown(f"the head of {architecture.class_name}")
    w = Weights(states.head)
    bias = w.take() if w.rest[-1].param.kind == "bias" else None
    if bias and not architecture.tied_head:
        raise unknown(f"{architecture.class_name} with a bias that is never used (tie_word_embeddings: false)")
    activation = "gelu" if kind_of(architecture).head_gelu else feed.activation
    hidden = activate(t, w.linear(t, hidden, TRANSFORMED), activation)
    hidden = normalize(t, hidden, w.norm(2), "layer")
    if not architecture.tied_head:
        return w.linear(t, hidden, LOGITS)
    return op.linear(t, hidden, states.before[0].tensor, bias or w.take(), LOGITS)
