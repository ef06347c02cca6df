"""Dense feed-forward and mixture of experts, without gradients, as transformers computes them.

b sequences of s tokens, h hidden size, f width, E experts, k chosen for each token, e bytes of an element.
Source: transformers 5.17, models/{llama, phi3, mixtral}/modeling_*.py and integrations/moe.py.
"""

from hfvram.memory.blocks import HIDDEN, activate, project, split_project
from hfvram.memory.forward import Forward
from hfvram.memory.timeline import Tag, Timeline
from hfvram.model.layers import FeedForward, MixtureOfExperts

WIDE = Tag("feed-forward, gate and up", "activations", "b·s·f·e", "transformers 5.17: LlamaMLP.forward")
PRODUCT = Tag("feed-forward, product", "activations", "b·s·f·e", "transformers 5.17: LlamaMLP.forward")
ROUTER = Tag("router", "activations", "b·s·E·4", "transformers 5.17: MixtralTopKRouter.forward")
CHOSEN = Tag("experts, tokens by expert", "activations", "b·s·k·h·e", "transformers 5.17: grouped_mm_experts_forward")
EXPERT = Tag("experts, gate and up", "activations", "b·s·k·2·f·e", "transformers 5.17: grouped_mm_experts_forward")
WEIGHTED = Tag("experts, weighted outputs", "activations", "b·s·k·h·4", "transformers 5.17: grouped_mm_experts_forward")
GATHERED = Tag(
    "experts, weights copied for each token",
    "activations",
    "b·k·3·f·h·e",
    "transformers 5.17: batched_mm_experts_forward",
)
EXPERT_PRODUCT = Tag("experts, product", "activations", "b·s·k·f·e", "transformers 5.17: grouped_mm_experts_forward")


def feed_forward(t: Timeline, f: Forward, part: FeedForward, source: list[int] | None = None) -> int:
    """down(act(gate)·up) holds three widths at once, down(act(up)) two. Returns the output's handle.

    `source` is the input where it is let go after the first product: it is freed and the list emptied.
    """
    return dense(t, f, part.hidden_size, part.intermediate_size, part, source)


def dense(
    t: Timeline,
    f: Forward,
    hidden: int,
    width: int,
    part: FeedForward | MixtureOfExperts,
    source: list[int] | None = None,
) -> int:
    """A dense feed-forward of these sizes; a mixture's shared expert is one, too."""
    nbytes = f.bytes(width)
    parts: list[int] = []
    if part.gated and part.fused_gate_up:
        both = split_project(t, f, part.params, hidden, 2 * width, WIDE)
        act = activate(t, nbytes, part.activation)
        product = t.alloc(nbytes, PRODUCT)
        t.free(act, both)
    elif part.gated:
        gate = project(t, f, hidden, width, WIDE)
        act = activate(t, nbytes, part.activation)
        t.free(gate)
        up = project(t, f, hidden, width, WIDE)
        product = t.alloc(nbytes, PRODUCT)
        parts = [act, up]
        if not (isinstance(part, FeedForward) and part.keeps_parts):
            t.free(*parts)
            parts = []
    else:
        up = project(t, f, hidden, width, WIDE)
        if source:
            t.free(source.pop())
        product = activate(t, nbytes, part.activation)
        t.free(up)
    if isinstance(part, FeedForward) and part.fp32_in_fp16 and f.dtype == "fp16":
        cast = t.alloc(f.fp32_bytes(width), PRODUCT)
        t.free(product)
        product, out = cast, t.alloc(f.fp32_bytes(hidden), HIDDEN)
    else:
        out = split_project(t, f, part.params, width, hidden, HIDDEN, "rows")
    if isinstance(part, FeedForward) and part.adds_residual:
        total = t.alloc(f.bytes(hidden), HIDDEN)
        t.free(product, out)
        return total
    t.free(product, *parts)
    return out


def mixture(t: Timeline, f: Forward, part: MixtureOfExperts) -> int:
    """Routed experts by a grouped matmul over tokens sorted by expert, and the shared one. Returns the output's handle.

    Every token is copied for each of its k experts; the widest moment holds gate and up twice (a masked copy), or the
    outputs in the routing weights' dtype twice (weighted, then put back in order).
    """
    if part.every_token:
        return _every_token(t, f, part)
    if f.decoding and part.fused and f.resident_experts is None and f.quant != "fp8":
        return _gathered(t, f, part)
    chosen = f.rows * part.top_k
    e = f.element_bytes
    routed = _route(t, f, part)
    tokens = t.alloc(chosen * part.hidden_size * e, CHOSEN)
    width = chosen * part.intermediate_size * e
    wide = width * (2 if part.gated else 1)
    first = t.alloc(wide, EXPERT)
    if part.expert_bias:
        t.moment(EXPERT, wide)
    masked = t.alloc(wide, EXPERT)
    t.free(first)
    product = activate(t, width, part.activation)
    if part.gated:
        t.moment(EXPERT_PRODUCT, width)
        gated = t.alloc(width, EXPERT_PRODUCT)
        t.free(product)
        product = gated
    t.free(masked)
    down = t.alloc(chosen * part.hidden_size * e, CHOSEN)
    t.free(product)
    out = t.alloc(chosen * part.hidden_size * e, CHOSEN)
    t.free(down)
    weighted_bytes = chosen * part.hidden_size * (4 if part.routing_fp32 else e)
    weighted = t.alloc(weighted_bytes, WEIGHTED)
    ordered = t.alloc(weighted_bytes, WEIGHTED)
    t.free(weighted)
    total = t.alloc(weighted_bytes // part.top_k, WEIGHTED)
    if part.routing_fp32 and f.half:
        cast = t.alloc(f.bytes(part.hidden_size), HIDDEN)
        t.free(tokens, out, ordered, total)
        total = cast
    else:
        t.free(tokens, out, ordered)
    if part.shared_intermediate_size:
        total = _shared(t, f, part, total)
    t.free(*routed)
    return total


def _gathered(t: Timeline, f: Forward, part: MixtureOfExperts) -> int:
    """The experts of a decoding step: generate() switches to a batched matmul, for which the weights of the chosen
    experts are copied, once for each token. Those in fp8 have kernels that take them where they are.

    Source: transformers 5.17, generation/utils.py (`_optimize_model_for_decode`) and integrations/moe.py
    (`batched_mm_experts_forward`); measured on Jamba, whose peak it is.
    """
    chosen, e = f.rows * part.top_k, f.element_bytes
    inner = part.latent_size or part.hidden_size
    routed = _route(t, f, part)
    tokens = t.alloc(chosen * inner * e, CHOSEN)
    width = chosen * part.intermediate_size * e
    wide = width * (2 if part.gated else 1)
    up_weights = t.alloc(wide * inner, GATHERED)
    first = t.alloc(wide, EXPERT)
    product = t.alloc(width, EXPERT_PRODUCT)
    t.free(first)
    down_weights = t.alloc(width * inner, GATHERED)
    t.free(up_weights)
    down = t.alloc(chosen * inner * e, CHOSEN)
    t.free(product, down_weights, tokens)
    total = t.alloc(f.bytes(part.hidden_size), HIDDEN)
    t.free(down)
    if part.shared_intermediate_size:
        total = _shared(t, f, part, total)
    t.free(*routed)
    return total


def _route(t: Timeline, f: Forward, part: MixtureOfExperts) -> list[int]:
    """Logits and probabilities of every expert, and the indices that put tokens in the experts' order."""
    if part.router_fp32 and f.half:
        t.moment(ROUTER, f.fp32_bytes(part.hidden_size))
    logits = t.alloc(f.rows * part.experts * (4 if part.router_fp32 else f.element_bytes), ROUTER)
    t.moment(ROUTER, f.fp32_bytes(part.experts), f.fp32_bytes(part.experts))
    return [logits, *[t.alloc(f.rows * part.top_k * 8, ROUTER) for _ in range(4)]]


def _shared(t: Timeline, f: Forward, part: MixtureOfExperts, routed: int) -> int:
    """The shared expert, and its sum with the routed ones."""
    shared = dense(t, f, part.hidden_size, part.shared_intermediate_size, part)
    total = t.alloc(f.bytes(part.hidden_size), HIDDEN)
    t.free(shared, routed)
    return total


def _every_token(t: Timeline, f: Forward, part: MixtureOfExperts) -> int:
    """Each expert computes all tokens, those not sent to it times zero: one batched matmul over a copy for each expert.

    Source: transformers 5.17, models/llama4/modeling_llama4.py `Llama4TextMoe.forward`.
    """
    rows = f.rows * part.experts * f.element_bytes
    scores = t.alloc(f.rows * part.experts * f.element_bytes, ROUTER)
    copied, sent = t.alloc(rows * part.hidden_size, CHOSEN), t.alloc(rows * part.hidden_size, CHOSEN)
    t.free(copied)
    both = t.alloc(rows * 2 * part.intermediate_size, EXPERT)
    active = t.alloc(rows * part.intermediate_size, EXPERT_PRODUCT)
    product = t.alloc(rows * part.intermediate_size, EXPERT_PRODUCT)
    t.free(active)
    down = t.alloc(rows * part.hidden_size, CHOSEN)
    t.free(product, both)
    shared = dense(t, f, part.hidden_size, part.shared_intermediate_size, part)
    t.moment(HIDDEN, f.bytes(part.hidden_size))
    t.free(down, sent, scores)
    return shared
