"""How routers choose the experts of a token, with gradients: logits, the chosen experts' weights, and which they are.

Source: transformers 5.17, models/{mixtral, olmoe, qwen2_moe, granitemoe, deepseek_v2, deepseek_v3}/modeling_*.py.
"""

from collections.abc import Callable
from typing import Final

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training import selection
from hfvram.memory.training.states import Weights
from hfvram.memory.training.tape import Tape
from hfvram.memory.training.tensors import Tensor
from hfvram.model.layers import MixtureOfExperts

TOP_K = "transformers 5.17: MixtralTopKRouter.forward"
LOGITS = Tag("router, logits", "activations", "b·s·E·e", TOP_K)
SCORES = Tag("router, probabilities", "activations", "b·s·E·4", TOP_K)
CHOICE = Tag("router, chosen experts", "activations", "b·s·k·12", TOP_K)
BALANCE = Tag("router, loss of balance", "activations", "b·s·E·4", "transformers 5.17: load_balancing_loss_func")

Routed = tuple[Tensor, Tensor, Tensor]


def probabilities(t: Tape, part: MixtureOfExperts, w: Weights, x: Tensor) -> Routed:
    """A softmax over the logits in fp32; the chosen ones are divided by their sum (Mixtral)."""
    logits = op.linear(t, op.reshape(t, x, *x.shape), w.take(), None, LOGITS)
    scores = op.softmax(t, op.to(t, logits, "fp32", SCORES), None, SCORES)
    weights, chosen = selection.top_k(t, scores, part.top_k, CHOICE)
    return logits, selection.divide_in_place(t, weights, _sum(t, weights), CHOICE), chosen


def cast_back(t: Tape, part: MixtureOfExperts, w: Weights, x: Tensor) -> Routed:
    """A softmax in fp32, of which the chosen ones are cast to the logits' dtype (OLMoE, Qwen)."""
    logits = op.linear(t, op.reshape(t, x, *x.shape), w.take(), None, LOGITS)
    scores = op.softmax(t, logits, "fp32", SCORES)
    weights, chosen = selection.top_k(t, scores, part.top_k, CHOICE)
    if part.normalized:
        weights = selection.divide_in_place(t, weights, _sum(t, weights), CHOICE)
    return logits, op.to(t, weights, logits.dtype, CHOICE), chosen


def chosen_first(t: Tape, part: MixtureOfExperts, w: Weights, x: Tensor) -> Routed:
    """A softmax over the chosen logits alone (Granite)."""
    logits = op.to(t, op.linear(t, x, w.take(), None, LOGITS), "fp32", SCORES)
    top, chosen = selection.top_k(t, logits, part.top_k, CHOICE)
    return logits, op.to(t, op.softmax(t, top, None, CHOICE), x.dtype, CHOICE), chosen


def _sum(t: Tape, x: Tensor) -> Tensor:
    return selection.total(t, x, -1, True, CHOICE)


def balance(t: Tape, logits: list[Tensor], top_k: int) -> Tensor:
    """A loss that asks for balance, of the logits of all layers: `load_balancing_loss_func`."""
    experts = logits[0].shape[-1]
    counts, sums = t.new((experts,), "fp32", None, BALANCE), t.new((experts,), "fp32", None, BALANCE)
    for layer in logits:
        weights = op.softmax(t, layer, None, BALANCE)
        _values, _chosen = selection.top_k(t, weights, top_k, BALANCE)  # held until the next layer's
        found = t.new((experts,), "int64", None, BALANCE)
        wide = t.new((experts,), "fp32", None, BALANCE)
        del found
        counts = t.elementwise(counts, wide, tag=BALANCE)
        del wide
        sums = op.add(t, sums, selection.total(t, op.to(t, weights, "fp32", BALANCE), 0, tag=BALANCE), BALANCE)
    shares = t.elementwise(counts, tag=BALANCE)
    means = op.scale(t, sums, BALANCE)
    overall = selection.all_of(t, op.mul(t, shares, op.reshape(t, means, 1, experts), BALANCE), BALANCE)
    return op.scale(t, overall, BALANCE)


ROUTERS: Final[dict[str, Callable[[Tape, MixtureOfExperts, Weights, Tensor], Routed]]] = {
    "probabilities": probabilities,
    "cast back": cast_back,
    "chosen first": chosen_first,
}
