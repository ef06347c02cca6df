"""Heads that judge a sequence as a whole, with gradients, and their losses: a class of each sequence, or a number.

Source: transformers 5.17, modeling_layers.py `GenericForSequenceClassification`, models/{bert, roberta, electra,
distilbert}/modeling_*.py, loss/loss_utils.py `ForSequenceClassificationLoss`.
"""

from functools import partial
from typing import Final

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training.blocks import activate, unknown
from hfvram.memory.training.operators import Found, Grads, attach, first
from hfvram.memory.training.states import States, Weights
from hfvram.memory.training.tape import Saved, Tape
from hfvram.memory.training.tensors import Shape, Tensor
from hfvram.model.architecture import Architecture

CLASSES: Final = "ForSequenceClassification"
GENERIC = "transformers 5.17: GenericForSequenceClassification"
LABELS = Tag("labels", "inputs", "b·8", "the batch", "exact")
LOGITS = Tag("logits", "activations", "b·s·labels·e", GENERIC)
PLACES = Tag("places of last tokens", "activations", "b·s·4", GENERIC)
POOLED = Tag("first token of each sequence", "activations", "b·h·e", "transformers 5.17: BertPooler.forward")
LOSS = Tag("loss", "activations", "b·labels·4", "transformers 5.17: ForSequenceClassificationLoss")
LAST: Final = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "starcoder2", "smollm3"),
    *(
        "olmo",
        "olmo2",
        "olmo3",
        "glm",
        "glm4",
        "exaone4",
        "helium",
        "hunyuan_v1_dense",
        "nemotron",
        "stablelm",
        "arcee",
    ),
    *("ministral", "ministral3", "opt", "bloom", "gpt_bigcode", "gpt_neox"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3"),
)
TYPES: Final = {
    **dict.fromkeys(LAST, "last token"),
    "bert": "pooler",
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), "tanh"),
    "electra": "gelu",
    "distilbert": "relu",
}
"""By model type: what of the sequence is judged, or the activation of the head over its first token."""


def judges(architecture: Architecture) -> bool:
    """Whether it has such a head. Raises `usage` for types whose head was not held against its code."""
    found = architecture.class_name.endswith(CLASSES)
    if found and architecture.model_type not in TYPES:
        raise unknown(architecture.class_name)
    return found


def labels(t: Tape, architecture: Architecture, batch: int, dtype: str) -> Tensor:
    """A class of each sequence, or a number where there is but one."""
    return t.new((batch,), "int64" if _classes(architecture) > 1 else dtype, None, LABELS)


def _classes(architecture: Architecture) -> int:
    return next(p for p in architecture.head[::-1] if p.kind == "head").shape[0]


def last_token(t: Tape, architecture: Architecture, states: States, hidden: Tensor, ids: Tensor) -> Tensor:
    """Logits of all tokens, of which those of each sequence's last one are taken. Returns the loss."""
    b, s = ids.shape
    logits = Weights(states.head).linear(t, hidden, LOGITS)
    seen = t.new((b, s), "bool", None, PLACES)
    hidden_not = t.new((b, s), "int32", None, PLACES)
    del seen
    places = t.new((s,), "int32", None, PLACES)
    product = t.new((b, s), "int32", None, PLACES)
    last = t.new((b,), "int64", None, PLACES)
    del product
    each = t.new((b,), "int64", None, PLACES)
    node = t.record(partial(_put, logits.shape), (logits,), each, last)
    pooled = attach(t.new((b, logits.shape[2]), logits.dtype, None, LOGITS), node)
    del each
    t.held.append(pooled)
    found = loss(t, pooled, b)
    del hidden_not, places
    return found


def _put(shape: Shape, t: Tape, saved: Saved, grads: Grads) -> Found:
    zeros = t.new(shape, first(grads).dtype)
    return (t.new(shape, zeros.dtype) if t.on_meta else zeros,)


def first_token(
    t: Tape, architecture: Architecture, states: States, hidden: Tensor, embedded: list[Tensor], p: float
) -> Tensor:
    """A dense layer over the first token, dropout, and the classes; the embeddings are held through a pooler, which is
    the bare model's. Returns the loss."""
    how = TYPES[architecture.model_type]
    pooler, w = Weights(states.after), Weights(states.head)
    if how != "pooler":
        embedded.clear()
    x = op.select(t, hidden, 1)
    if how == "pooler":
        x = pooler.linear(t, x, POOLED)
        x = op.of_output(t, x, POOLED)
        embedded.clear()
    elif how == "relu":
        x = activate(t, w.linear(t, x, POOLED), "relu")
    else:
        x = w.linear(t, op.dropout(t, x, p, POOLED), POOLED)
        x = op.of_output(t, x, POOLED) if how == "tanh" else activate(t, x, how)
    x = op.dropout(t, x, p, POOLED)
    logits = w.linear(t, x, LOGITS)
    t.held.append(logits)
    return loss(t, logits, hidden.shape[0])


def loss(t: Tape, logits: Tensor, batch: int) -> Tensor:
    """Cross entropy of the classes; the mean square of a single number's error."""
    given = Tensor(logits.storage, (batch,), (1,), "int64")  # the batch's own, which stay
    if logits.shape[1] > 1:
        return op.cross_entropy(t, logits, given, LOSS)
    number = op.wide(t, op.reshape(t, logits, batch))
    node = t.record(_squared, (number,), number)
    return attach(t.new((), number.dtype, None, LOSS), node)


def _squared(t: Tape, saved: Saved, grads: Grads) -> Found:
    (number,) = saved
    assert number is not None
    return (t.like(number),)
