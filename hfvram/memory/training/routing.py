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
from hfvram.memory.training.tensors import Storage, Tensor
from hfvram.memory.training.wrapped import Wrapped
from hfvram.model.layers import MixtureOfExperts

TOP_K = "transformers 5.17: MixtralTopKRouter.forward"
LOGITS = Tag("router, logits", "activations", "b·s·E·e", TOP_K)
SCORES = Tag("router, probabilities", "activations", "b·s·E·4", TOP_K)
CHOICE = Tag("router, chosen experts", "activations", "b·s·k·12", TOP_K)
WIDE = Tag("router, tokens in fp32", "activations", "b·s·h·4", "transformers 5.17: DeepseekV3TopkRouter.forward")
GROUPS = Tag("router, groups of experts", "activations", "b·s·E·4", "transformers 5.17: DeepseekV3TopkRouter.forward")
BALANCE = Tag("router, loss of balance", "activations", "b·s·E·4", "transformers 5.17: load_balancing_loss_func")

Routed = tuple[Tensor, Tensor, Tensor]


def probabilities(t: Tape, part: MixtureOfExperts, w: Wrapped, x: Tensor) -> Routed:
    """A softmax over the logits in fp32; the chosen ones are divided by their sum (Mixtral)."""
    logits = op.linear(t, op.reshape(t, x, -1, x.shape[-1]), w.weight(t), None, LOGITS)
    scores = op.softmax(t, op.to(t, logits, "fp32", SCORES), None, SCORES)
    weights, chosen = selection.top_k(t, scores, part.top_k, CHOICE)
    return logits, selection.divide_in_place(t, weights, _sum(t, weights), CHOICE), chosen


def cast_back(t: Tape, part: MixtureOfExperts, w: Wrapped, x: Tensor) -> Routed:
    """A softmax in fp32, of which the chosen ones are cast to the logits' dtype (OLMoE, Qwen)."""
    logits = op.linear(t, op.reshape(t, x, -1, x.shape[-1]), w.weight(t), None, LOGITS)
    return _cast_back(t, part, logits, logits.dtype)


def flat_cast_back(t: Tape, part: MixtureOfExperts, w: Wrapped, x: Tensor) -> Routed:
    """The same over tokens that the caller flattened (Jamba)."""
    return _cast_back(t, part, op.linear(t, x, w.weight(t), None, LOGITS), x.dtype)


def _cast_back(t: Tape, part: MixtureOfExperts, logits: Tensor, dtype: str) -> Routed:
    scores = op.softmax(t, logits, "fp32", SCORES)
    weights, chosen = selection.top_k(t, scores, part.top_k, CHOICE)
    if part.normalized:
        weights = selection.divide_in_place(t, weights, _sum(t, weights), CHOICE)
    return logits, op.to(t, weights, dtype, CHOICE), chosen


def chosen_first(t: Tape, part: MixtureOfExperts, w: Wrapped, x: Tensor) -> Routed:
    """A softmax over the chosen logits alone (Granite)."""
    logits = op.to(t, op.linear(t, x, w.weight(t), None, LOGITS), "fp32", SCORES)
    top, chosen = selection.top_k(t, logits, part.top_k, CHOICE)
    return logits, op.to(t, op.softmax(t, top, None, CHOICE), x.dtype, CHOICE), chosen


def chosen_alone(t: Tape, part: MixtureOfExperts, w: Weights, x: Tensor) -> Routed:
    """The same in the logits' dtype, of a router with a bias (gpt-oss)."""
    logits = op.linear(t, x, w.take(), w.take(), LOGITS)
    top, chosen = selection.top_k(t, logits, part.top_k, CHOICE)
    return logits, op.softmax(t, top, top.dtype, CHOICE), chosen


def greedy(t: Tape, part: MixtureOfExperts, w: Wrapped, x: Tensor) -> Routed:
    """A softmax in fp32 of logits computed in fp32, of all experts or of the best groups' (DeepSeek-V2)."""
    logits = _wide_logits(t, w, x)
    scores = op.softmax(t, logits, "fp32", SCORES)
    if part.group_limited:
        best = selection.largest(t, op.reshape(t, scores, logits.shape[0], part.groups, -1), GROUPS)[0]
        held = _in_groups(t, part, best)
        scores = selection.masked(t, scores, _outside(t, part, held[-1]), SCORES)
    weights, chosen = selection.top_k(t, scores, part.top_k, CHOICE)
    return logits, op.scale(t, weights, CHOICE), chosen


def balanced(t: Tape, part: MixtureOfExperts, w: Wrapped, x: Tensor) -> Routed:
    """Sigmoids in fp32, chosen after a bias was added that needs no gradient, of the best groups' (DeepSeek-V3)."""
    logits = _wide_logits(t, w, x)
    scores = op.of_output(t, logits, SCORES)
    bias = Tensor(Storage(), (part.experts,), (1,), "fp32")
    biased = op.mask(t, scores, bias, SCORES)
    by_group = op.reshape(t, biased, logits.shape[0], part.groups, -1)
    best = selection.total(t, selection.top_k(t, by_group, 2, GROUPS)[0], -1, tag=GROUPS)
    del by_group
    held = _in_groups(t, part, best)
    biased = selection.masked(t, biased, _outside(t, part, held[-1]), SCORES)
    chosen = selection.top_k(t, biased, part.top_k, CHOICE)[1]
    weights = selection.gather(t, scores, chosen, CHOICE)
    if part.normalized:
        denominator = op.shift(t, _sum(t, weights), CHOICE)
        weights = selection.divide_in_place(t, weights, denominator, CHOICE)
    return logits, op.scale(t, weights, CHOICE), chosen


def sigmoids(t: Tape, part: MixtureOfExperts, w: Wrapped, x: Tensor) -> Routed:
    """Sigmoids in the logits' dtype, chosen after a bias in fp32 was added where there is one (LFM2)."""
    logits = op.linear(t, x, w.weight(t), None, LOGITS)
    weights = op.of_output(t, logits, SCORES)
    if part.choice_bias:
        biased = op.mask(t, weights, Tensor(Storage(), (part.experts,), (1,), "fp32"), SCORES)
        _values, chosen = selection.top_k(t, biased, part.top_k, CHOICE)
        weights = selection.gather(t, weights, chosen, CHOICE)
    else:
        weights, chosen = selection.top_k(t, weights, part.top_k, CHOICE)
    if part.normalized:
        weights = selection.divide(t, weights, op.shift(t, _sum(t, weights), CHOICE), CHOICE)
    return logits, op.scale(t, weights, CHOICE), chosen


def _wide_logits(t: Tape, w: Wrapped, x: Tensor) -> Tensor:
    x = op.reshape(t, x, -1, x.shape[-1])
    return op.linear(t, op.to(t, x, "fp32", WIDE), op.to(t, w.weight(t), "fp32", WIDE), None, LOGITS)


def _in_groups(t: Tape, part: MixtureOfExperts, best: Tensor) -> tuple[Tensor, ...]:
    """The best groups, and masks of them and of their experts, which are held."""
    n = best.shape[0]
    chosen = selection.top_k(t, best, part.groups_chosen, GROUPS)[1]
    groups = t.like(best, tag=GROUPS)
    return chosen, groups, groups if part.groups == 1 else t.new((n, part.experts), best.dtype, None, GROUPS)


def _outside(t: Tape, part: MixtureOfExperts, inside: Tensor) -> Tensor:
    shape = (inside.shape[0], part.experts)
    as_booleans = t.new(shape, "bool", None, GROUPS)
    outside = t.new(shape, "bool", None, GROUPS)
    del as_booleans
    return outside


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


ROUTERS: Final[dict[str, Callable[[Tape, MixtureOfExperts, Wrapped, Tensor], Routed]]] = {
    "probabilities": probabilities,
    "cast back": cast_back,
    "flat, cast back": flat_cast_back,
    "chosen first": chosen_first,
    "greedy": greedy,
    "balanced": balanced,
    "sigmoids": sigmoids,
}
