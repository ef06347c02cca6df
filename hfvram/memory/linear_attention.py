"""Linear attention and its kin without gradients: gated delta nets, lightning attention, short convolutions, RG-LRU.

b sequences of s tokens, H heads, d_k and d_v sizes of keys and values of a head, k columns of a convolution, w width,
e bytes of an element. Source: transformers 5.17, models/{qwen3_next, minimax, lfm2, recurrent_gemma}/modeling_*.py,
checked event by event on the meta device; fused delta rule: flash-linear-attention 0.3, ops/gated_delta_rule/chunk.py.
"""

from hfvram.memory.blocks import HIDDEN, NORM, activate, normalize, project
from hfvram.memory.forward import Forward
from hfvram.memory.ssm import CONV_STATE, STATE, convolve, keep, step, tune
from hfvram.memory.timeline import Tag, Timeline
from hfvram.model.layers import RGLRU, GatedDeltaNet, LightningAttention, ShortConv

PROJECTED = Tag(
    "linear attention, projections", "activations", "b·s·H·(2·d_k+2·d_v)·e", "transformers 5.17: Qwen3NextGatedDeltaNet"
)
RULE = Tag("gated delta rule", "activations", "b·s·H·d·4", "transformers 5.17: torch_chunk_gated_delta_rule")
FUSED_RULE = Tag(
    "gated delta rule", "activations", "b·s·H·d·e", "flash-linear-attention 0.3: gated_delta_rule/chunk.py"
)
OUT = Tag("linear attention, output", "activations", "b·s·H·d_v·e", "transformers 5.17: Qwen3NextRMSNormGated")
LIGHTNING = Tag("lightning attention", "activations", "b·s·H·d·e", "transformers 5.17: MiniMaxLightningAttention")
GATES = Tag("recurrence, gates", "activations", "b·s·w·e", "transformers 5.17: RecurrentGemmaRglru")
SHORT = Tag("short convolution", "activations", "b·s·h·3·e", "transformers 5.17: Lfm2ShortConv")
CHUNK = 64


def _delta_state(part: GatedDeltaNet) -> int:
    return part.value_heads * part.key_dim * part.value_dim


def delta_net(t: Timeline, f: Forward, part: GatedDeltaNet, states: list[int]) -> int:
    """A gated delta net; `states` holds its two states, empty before the prefill. Returns the output's handle."""
    keys, values = part.key_heads * part.key_dim, part.value_heads * part.value_dim
    state = f.batch * _delta_state(part) * 4
    if f.past:
        return step(t, f, 2 * keys + 2 * values, part.conv_dim, values, part.hidden_size, 4 * state)
    held = [t.alloc(f.bytes(part.hidden_size), HIDDEN)] if f.masked else []
    if part.fused_projection:
        held.append(project(t, f, part.hidden_size, 2 * keys + 2 * values, PROJECTED))
        sorted_values = t.alloc(f.bytes(values), PROJECTED)
        held.append(t.alloc(f.bytes(values), PROJECTED))  # the gate
        parts = [t.alloc(f.bytes(keys), PROJECTED) for _ in range(2)]
        joined = t.alloc(f.bytes(part.conv_dim), PROJECTED)
        convolved = convolve(t, f, part.conv_dim, part.d_conv, states)
        t.free(joined, *parts, sorted_values)
    else:
        joined = project(t, f, part.hidden_size, part.conv_dim, PROJECTED)
        held.append(project(t, f, part.hidden_size, values, PROJECTED))  # the gate
        convolved = convolve(t, f, part.conv_dim, part.d_conv, states)
        t.free(joined)
    held.append(convolved)
    if part.value_heads > part.key_heads:
        held += [t.alloc(f.bytes(part.value_heads * part.key_dim), PROJECTED) for _ in range(2)]
    rule = _fused_rule if f.kernels == "fused" and f.half else _rule
    out, last = rule(t, f, part)
    keep(t, f, states, state, STATE)
    gated = _gated_norm(t, f, values)
    t.free(out)
    projected = project(t, f, values, part.hidden_size, HIDDEN)
    t.free(*held, gated, last)
    return projected


def _rule(t: Timeline, f: Forward, part: GatedDeltaNet) -> tuple[int, int]:
    """The delta rule in fp32, by chunks of 64 tokens. Returns output and last state."""
    padded = f.batch * -(-f.tokens // CHUNK) * CHUNK * part.value_heads
    keys32, values32 = f.fp32_bytes(part.value_heads * part.key_dim), f.fp32_bytes(part.value_heads * part.value_dim)
    keys, values, pairs = (padded * n * 4 for n in (part.key_dim, part.value_dim, CHUNK))
    query, key, value = t.alloc(keys32, RULE), t.alloc(keys32, RULE), t.alloc(values32, RULE)
    normed = []
    for x in (query, key):
        t.moment(RULE, keys32)
        normed.append(t.alloc(keys32, RULE))
        t.free(x)
    scaled = t.alloc(keys32, RULE)
    t.free(normed[0])
    query, key, held = t.alloc(keys, RULE), t.alloc(keys, RULE), [t.alloc(values, RULE)]
    t.free(scaled, normed[1], value)
    v_beta, k_beta = t.alloc(values, RULE), t.alloc(keys, RULE)
    decay = t.alloc(pairs, RULE)
    t.moment(RULE, pairs)
    held += [v_beta, k_beta, decay]
    for _ in range(2):
        product = t.alloc(pairs, RULE)
        held.append(t.alloc(pairs, RULE))
        t.free(product)
    held += [t.alloc(n, RULE) for n in (keys, values, keys)]  # decayed keys, and the two triangular solutions
    state = f.batch * _delta_state(part) * 4
    first, outputs = t.alloc(state, RULE), t.alloc(values, RULE)
    held.append(t.alloc(keys, RULE))
    t.free(query)
    held.append(t.alloc(keys, RULE))
    t.free(key)
    last = t.alloc(state, RULE)
    t.moment(RULE, state, state)  # the loop over the chunks
    t.free(first)
    contiguous = t.alloc(values, OUT)
    t.free(outputs)
    out = t.alloc(f.bytes(part.value_heads * part.value_dim), OUT)
    t.free(contiguous, *held)
    return out, last


def _fused_rule(t: Timeline, f: Forward, part: GatedDeltaNet) -> tuple[int, int]:
    """flash-linear-attention's kernels: states of every 64 tokens in the computing dtype.

    Returns output and last state. Triton's autotuner holds its buffer at the first launch of each kernel: the last one
    stands beside all that the others made.
    """
    heads, d_k, d_v = part.value_heads, part.key_dim, part.value_dim
    keys, values = f.bytes(heads * part.key_dim), f.bytes(heads * part.value_dim)
    held = [t.alloc(keys, FUSED_RULE), t.alloc(keys, FUSED_RULE)]
    products = t.alloc(f.fp32_bytes(heads * CHUNK), FUSED_RULE)
    tune(t, "delta rule, scores", heads, d_k)
    held.append(t.alloc(f.bytes(heads * CHUNK), FUSED_RULE))
    tune(t, "delta rule, inverse", heads)
    t.free(products)
    held += [t.alloc(keys, FUSED_RULE), t.alloc(values, FUSED_RULE)]
    tune(t, "delta rule, w and u", heads, d_k, d_v)
    chunks = f.batch * -(-f.tokens // CHUNK)
    held.append(t.alloc(chunks * _delta_state(part) * f.element_bytes, FUSED_RULE))
    last = t.alloc(f.batch * _delta_state(part) * 4, FUSED_RULE)
    held.append(t.alloc(values, FUSED_RULE))
    tune(t, "delta rule, states", heads, d_k, d_v)
    out = t.alloc(values, OUT)
    tune(t, "delta rule, output", heads, d_k, d_v)
    t.free(*held)
    return out, last


def _gated_norm(t: Timeline, f: Forward, width: int) -> int:
    """RMSNorm over each head, then the gate in fp32."""
    normed = normalize(t, f, width, "rms", OUT)
    gate = t.alloc(f.fp32_bytes(width), NORM) if f.half else None
    silu = t.alloc(f.fp32_bytes(width), NORM)
    if gate is not None:
        t.free(gate)
    product = t.alloc(f.fp32_bytes(width), NORM)
    t.free(silu, normed)
    if not f.half:
        return product
    out = t.alloc(f.bytes(width), OUT)
    t.free(product)
    return out


def lightning(t: Timeline, f: Forward, part: LightningAttention, states: list[int]) -> int:
    """Lightning attention, block by block; `states` holds the state, empty before the prefill. Returns the output."""
    width = part.heads * part.head_dim
    wide = f.bytes(width)
    state = f.batch * part.heads * part.head_dim**2 * f.element_bytes
    projected = project(t, f, part.hidden_size, 3 * width, LIGHTNING)
    active = activate(t, 3 * wide, "silu")
    t.free(projected)
    if f.past:
        t.moment(LIGHTNING, state, state)
        joined = t.alloc(wide, LIGHTNING)
    else:
        block = min(part.block_size, f.tokens)
        by_token = f.batch * part.heads * block
        pairs, rows = by_token * block * f.element_bytes, by_token * part.head_dim * f.element_bytes
        t.moment(LIGHTNING, pairs, pairs, rows, rows, state, state)
        blocks = t.alloc(wide, LIGHTNING)
        keep(t, f, states, state, STATE)
        joined = t.alloc(wide, LIGHTNING)
        t.free(blocks)
    contiguous = t.alloc(wide, LIGHTNING)
    t.free(joined)
    normed = normalize(t, f, width, "rms", LIGHTNING)
    t.free(contiguous)
    gate = project(t, f, part.hidden_size, width, LIGHTNING)
    sigmoid = t.alloc(wide, LIGHTNING)
    t.free(gate)
    gated = t.alloc(wide, LIGHTNING)
    t.free(sigmoid, normed)
    out = project(t, f, width, part.hidden_size, HIDDEN)
    t.free(gated, active)
    return out


def short_convolution(t: Timeline, f: Forward, part: ShortConv, states: list[int]) -> int:
    """A gated short convolution; `states` holds its columns, empty before the prefill. Returns the output's handle."""
    width = f.bytes(part.hidden_size)
    held = [t.alloc(width, HIDDEN)] if f.masked and not f.past else []
    held.append(project(t, f, part.hidden_size, 3 * part.hidden_size, SHORT))
    gated = t.alloc(width, SHORT)
    convolved = t.alloc(width, SHORT) if f.past else convolve(t, f, part.hidden_size, part.d_conv, states, False)
    t.free(gated)
    product = t.alloc(width, SHORT)
    contiguous = t.alloc(width, SHORT)
    t.free(product)
    out = project(t, f, part.hidden_size, part.hidden_size, HIDDEN)
    t.free(*held, convolved, contiguous)
    return out


def rg_lru(t: Timeline, f: Forward, part: RGLRU, states: list[int]) -> int:
    """Griffin's recurrent block; `states` holds its two states, empty before the prefill. Returns the output's handle.

    There is no kernel for it: a loop runs over the tokens, whatever is installed. The module itself keeps the states,
    k − 1 columns of the convolution among them.
    """
    wide = f.bytes(part.width)
    linear = project(t, f, part.hidden_size, part.width, GATES)
    branch = activate(t, wide, "gelu_pytorch_tanh")
    t.free(linear)
    x = project(t, f, part.hidden_size, part.width, GATES)
    if not f.past:
        keep(t, f, states, f.batch * part.width * (part.d_conv - 1) * f.element_bytes, CONV_STATE)
        keep(t, f, states, f.batch * part.width * 4, STATE)
    convolved = t.alloc(f.batch * (f.tokens + part.d_conv - 1) * part.width * f.element_bytes, GATES)
    t.free(x)
    gates, products = [], list[int]()
    for _ in range(2):  # input gate, recurrent gate
        products.append(t.alloc(wide, GATES))
        t.free(*products[:-1])
        contiguous = t.alloc(wide, GATES)
        gates.append(t.alloc(wide, GATES))
        t.free(contiguous)
    # The gate's logarithm, its exponential and its square's, gated inputs, multiplier, normalized inputs, reset gate.
    held = [branch, convolved, gates[0], products[-1], *[t.alloc(wide, GATES) for _ in range(7)]]
    t.free(gates[1])
    out = t.alloc(wide, GATES)
    t.free(*held[1:])
    product = t.alloc(wide, GATES)
    t.free(out, branch)
    projected = project(t, f, part.width, part.hidden_size, HIDDEN)
    t.free(product)
    return projected
