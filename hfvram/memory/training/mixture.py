"""Mixtures of experts with gradients: the router's choice, experts by a grouped matmul, and shared experts.

Routing is taken to be balanced (as in `memory/exact/data_dependent.py`), which changes no size: tokens are copied for
each of their k experts and sorted by expert, whichever these are. Experts that are frozen (LoRA) keep no inputs.
Source: transformers 5.17, integrations/moe.py `grouped_mm_experts_forward`, models/mixtral/modeling_mixtral.py.
"""

from collections.abc import Sequence
from dataclasses import replace

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training import selection
from hfvram.memory.training.blocks import activate, unknown
from hfvram.memory.training.feed_forward import DOWN, fused_gated, gated
from hfvram.memory.training.routing import ROUTERS
from hfvram.memory.training.sequence_parallel import enter, leave
from hfvram.memory.training.states import Leaf, Weights
from hfvram.memory.training.surroundings import Surroundings
from hfvram.memory.training.tape import Tape
from hfvram.memory.training.tensors import Tensor
from hfvram.memory.training.wrapped import Wrapped
from hfvram.model.layers import MixtureOfExperts

GROUPED = "transformers 5.17: grouped_mm_experts_forward"
ORDER = Tag("experts, order of tokens", "activations", "b·s·k·8", GROUPED)
CHOSEN = Tag("experts, tokens by expert", "activations", "b·s·k·h·e", GROUPED)
SENT = Tag("tokens exchanged with other ranks", "activations", "b·s·k·h·e", "Megatron-LM: token_dispatcher.py")
EXPERT = Tag("experts, gate and up", "activations", "b·s·k·2·f·e", GROUPED)
PRODUCT = Tag("experts, product", "activations", "b·s·k·f·e", GROUPED)
WEIGHTED = Tag("experts, weighted outputs", "activations", "b·s·k·h·4", GROUPED)
NOISE = Tag("noise on the router's input", "activations", "b·s·h·e", "transformers 5.17: MixtralSparseMoeBlock.forward")
SHARED = Tag("shared expert's gate", "activations", "b·s·h·e", "transformers 5.17: Qwen2MoeSparseMoeBlock.forward")


def mixture(t: Tape, part: MixtureOfExperts, leaves: Sequence[Leaf], x: Tensor, around: Surroundings) -> Tensor:
    """The mixture of one layer over its normed input (b, s, h)."""
    kind = around.kind
    if kind.router is None or part.every_token or not part.fused or part.latent_size:
        raise unknown(f"the experts of {around.class_name}")
    route = ROUTERS[kind.router]
    if part.expert_bias:
        raise unknown(f"biases of the experts of {around.class_name}")
    own = [leaf for leaf in leaves if leaf.param.kind == "experts"]
    shared = Weights([leaf for leaf in leaves if "shared" in leaf.param.name])
    (router,) = [leaf for leaf in leaves if leaf not in own and "shared" not in leaf.param.name]
    x = enter(t, x, [leaf.param for leaf in leaves])
    b, s, h = x.shape
    if part.jitter:
        x = selection.noisy(t, x, NOISE)
    if part.auxiliary and (not kind.balance or around.request.padding):
        raise unknown(f"output_router_logits of {around.class_name}")
    last = kind.shared == "last"
    flat = x if last else op.reshape(t, x, b * s, h)
    beside = None
    if part.shared_intermediate_size and not last:
        beside = gated(t, part.activation, shared, flat)
    logits, weights, chosen = route(t, part, Wrapped(t, router), flat)
    if part.auxiliary and t.redone is None:
        around.router_logits.append(logits)
    flat = op.reshape(t, x, b * s, h) if last else flat
    out = experts(t, part, own, flat, weights, chosen, around.request.ep)
    if last:
        out = op.reshape(t, out, b, s, h)
        both = op.add(t, out, gated(t, part.activation, shared, x), DOWN) if part.shared_intermediate_size else out
        return leave(t, both)
    if beside is not None and kind.shared == "weighted":
        beside = op.mul(t, op.of_output(t, shared.linear(t, flat, SHARED), SHARED), beside, SHARED)
    if beside is not None:
        out = op.add(t, out, beside, DOWN)
    return leave(t, op.reshape(t, out, b, s, h))


def routed_then_shared(
    t: Tape, part: MixtureOfExperts, leaves: Sequence[Leaf], x: Tensor, around: Surroundings
) -> tuple[Tensor, Tensor]:
    """What the routed experts return, which the layer holds, and the sum with the shared one's (Granite 4)."""
    routed = mixture(
        t,
        replace(part, shared_intermediate_size=0),
        [leaf for leaf in leaves if "shared" not in leaf.param.name],
        x,
        around,
    )
    shared = Weights([leaf for leaf in leaves if "shared" in leaf.param.name])
    return routed, op.add(t, routed, fused_gated(t, part.activation, shared, x), DOWN)


def experts(
    t: Tape,
    part: MixtureOfExperts,
    own: Sequence[Leaf],
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    ranks: int = 1,
) -> Tensor:
    """Tokens sorted by expert, the experts' products over them, weighted and put back in order; of several `ranks`
    sent to the ranks of their experts between, and back. Experts with biases have matrices that are not turned."""
    n, k = chosen.shape
    size = n * k
    biased = 2 if part.expert_bias else 1
    down, up = Wrapped(t, own[biased]), Wrapped(t, own[0])
    flat_weights = op.reshape(t, weights, size)
    by_expert, order = t.new((size,), "int64", None, ORDER), t.new((size,), "int64", None, ORDER)
    t.moment(size * 8, size * 8)  # of the sort
    tokens = selection.rows(t, x, t.new((size,), "int64", None, ORDER), CHOSEN)
    sorted_weights = selection.rows(t, flat_weights, order, WEIGHTED)
    whole = t.new((size,), "int32", None, ORDER)
    counts = t.new((part.experts,), "int32", None, ORDER)
    ends = t.new((part.experts,), "int32", None, ORDER)
    beyond = t.new((size,), "bool", None, ORDER).as_((size, 1), (1, 1))
    first = up.weight(t)
    biases = selection.rows(t, own[1].tensor, by_expert, EXPERT) if part.expert_bias else None
    if ranks > 1:
        tokens = _by_expert(t, selection.exchange(t, tokens, SENT), first)
    tokens = selection.masked_in_place(t, tokens, beyond)
    out = _product(t, tokens, first, ends, EXPERT, biases)
    out = selection.masked(t, out, beyond, EXPERT)
    out = _apply(t, part, out)
    last = down.weight(t)
    biases = selection.rows(t, own[3].tensor, by_expert, CHOSEN) if part.expert_bias else None
    out = _product(t, out, last, ends, CHOSEN, biases)
    out = selection.masked(t, out, beyond, CHOSEN)
    if ranks > 1:
        out = selection.exchange(t, _by_expert(t, out, first), SENT)
    weighted = op.mul(t, out, op.reshape(t, sorted_weights, size, 1), WEIGHTED)
    back = t.new((size,), "int64", None, ORDER)
    count = t.new((size,), "int64", None, ORDER)
    del count
    weighted = selection.rows(t, weighted, back, WEIGHTED)
    total = selection.total(t, op.reshape(t, weighted, n, k, x.shape[1]), 1, tag=WEIGHTED)
    found = op.to(t, total, x.dtype, DOWN)
    del by_expert, whole, counts
    return found


def _by_expert(t: Tape, x: Tensor, weight: Tensor) -> Tensor:
    """What came from each rank sorted by expert is sorted by expert over all ranks, or back."""
    if weight.shape[0] == 1:
        return x
    return selection.rows(t, x, t.new((x.shape[0],), "int64", None, ORDER), CHOSEN)


def _product(t: Tape, x: Tensor, weight: Tensor, ends: Tensor, tag: Tag, biases: Tensor | None = None) -> Tensor:
    if biases is not None:
        out = selection.grouped_product(t, op.to(t, x, weight.dtype, tag), weight, ends, False, tag)
        return op.add_in_place(t, out, biases)
    turned = op.transpose(t, weight, 1, 2)
    return selection.grouped_product(t, op.to(t, x, weight.dtype, tag), turned, ends, True, tag)


def _apply(t: Tape, part: MixtureOfExperts, both: Tensor) -> Tensor:
    if part.expert_bias:
        return _clamped_gate(t, both)
    if not part.gated:
        return activate(t, both, part.activation)
    gate, up = op.split(t, both, -1, part.intermediate_size, part.intermediate_size)
    return op.mul(t, activate(t, gate, part.activation), up, PRODUCT)


def _clamped_gate(t: Tape, both: Tensor) -> Tensor:
    """(clamp(up) + 1) · gate · sigmoid(1.702·gate) of a clamped gate, in turns (`GptOssExperts._apply_gate`)."""
    gate, up = selection.every_second(t, both), selection.every_second(t, both)
    gate = op.clamp(t, gate, False, PRODUCT)
    up = op.clamp(t, up, True, PRODUCT)
    glu = op.mul(t, gate, op.of_output(t, op.scale(t, gate, PRODUCT), PRODUCT), PRODUCT)
    return op.mul(t, op.shift(t, up, PRODUCT), glu, PRODUCT)
