"""The pass of an encoder and a decoder with gradients, up to the loss of what the decoder says.

Source: transformers 5.17, models/t5/modeling_t5.py `T5ForConditionalGeneration`, `T5Stack`.
"""

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training import t5
from hfvram.memory.training.decoder import EMBEDDED, LOG_PROBABILITIES, LOGITS, through
from hfvram.memory.training.kinds import kind_of
from hfvram.memory.training.states import States
from hfvram.memory.training.surroundings import Surroundings
from hfvram.memory.training.tape import Tape
from hfvram.memory.training.tensors import Tensor
from hfvram.model.architecture import Architecture
from hfvram.model.layers import Layer
from hfvram.request import Request

SHIFTED = Tag("labels shifted right", "activations", "b·s·8", "transformers 5.17: T5PreTrainedModel._shift_right")
SCALED = Tag("hidden states scaled", "activations", "b·s·h·e", "transformers 5.17: T5ForConditionalGeneration.forward")


def forward(
    t: Tape,
    architecture: Architecture,
    states: States,
    layers: list[tuple[Layer, int | None]],
    ids: Tensor,
    request: Request,
) -> tuple[Tensor, list[Tensor]]:
    """One pass with labels. Returns the loss, and what the model's output holds beside it."""
    kind = kind_of(architecture)
    encoder = states.encoder
    assert encoder is not None
    table = encoder.before[0].tensor
    around = Surroundings(architecture.class_name, kind, request)
    around.dropout = layers[0][0].dropout
    encoded = _stack(t, encoder, encoder.written, ids, table, around)
    around = Surroundings(architecture.class_name, kind, request, encoded=encoded)
    around.dropout = layers[0][0].dropout
    shifted = _shift_right(t, ids)
    decoded = _stack(t, states, layers, shifted, table, around)
    hidden = op.scale(t, decoded, SCALED) if architecture.scales_output else decoded
    head = states.head[0].tensor if states.head else table
    logits = op.linear(t, hidden, head, None, LOGITS)
    rows = op.reshape(t, logits, -1, logits.shape[-1])
    loss = op.cross_entropy(t, rows, ids.as_((ids.numel,), (1,)), LOG_PROBABILITIES)
    return loss, [logits, encoded, *around.cached]


def _shift_right(t: Tape, ids: Tensor) -> Tensor:
    b, s = ids.shape
    shifted = t.new((b, s), "int64", None, SHIFTED)
    copy = t.new((b, s - 1), "int64", None, SHIFTED)
    del copy
    number = t.new((), "int64", None, SHIFTED)
    del number
    padded = t.new((b, s), "bool", None, SHIFTED)
    del padded
    return shifted


def _stack(
    t: Tape,
    states: States,
    layers: list[tuple[Layer, int | None]],
    ids: Tensor,
    table: Tensor,
    around: Surroundings,
) -> Tensor:
    """One tower. Its embeddings and its positions' bias are held to its end."""
    embedded = op.embedding(t, ids, table, EMBEDDED)
    p = around.dropout.residual
    first = [op.dropout(t, embedded, p, EMBEDDED)]
    hidden = through(t, layers, states.layers, first, around)
    hidden = t5.norm(t, hidden, states.after[0].tensor)
    hidden = op.dropout(t, hidden, p, EMBEDDED)
    around.biases.clear()
    del embedded
    return hidden
