"""Scans of Mamba and Mamba-2 in plain PyTorch, where their kernels are not installed: they write out what the kernels
keep in registers, b·s·d·N and b·s·Q·H·N elements in fp32.

b sequences of s tokens, d inner width, N state size, H heads of P, c chunks of Q tokens, e bytes of an element.
Source: transformers 5.17, models/mamba/modeling_mamba.py (`mamba_selective_scan`) and mamba2/modeling_mamba2.py
(`mamba2_chunk_scan`); checked event by event on the meta device.
"""

from hfvram.memory.forward import Forward
from hfvram.memory.timeline import Tag, Timeline
from hfvram.model.layers import Mamba2

DISCRETE = Tag(
    "state space, states of every token", "activations", "b·s·d·N·4", "transformers 5.17: mamba_selective_scan"
)
CHUNKED = Tag(
    "state space, products of every pair of tokens in a chunk",
    "activations",
    "b·s·Q·H·N·4",
    "transformers 5.17: mamba2_chunk_scan",
)
SCANNED = Tag("state space, output of the scan", "activations", "b·s·d·4", "transformers 5.17: mamba2_chunk_scan")


def scan(t: Timeline, f: Forward, inner: int, d_state: int) -> tuple[int, int]:
    """A, B and B·x of every token stand while a loop runs over the tokens; each leaves a column of the output.

    Returns the handles of the output and of the last state.
    """
    wide, wide32 = f.bytes(inner), f.fp32_bytes(inner)
    states, state = f.fp32_bytes(inner * d_state), f.batch * inner * d_state * 4
    biased = t.alloc(wide, DISCRETE)
    step = t.alloc(wide, DISCRETE)
    t.free(biased)
    exponent = t.alloc(states, DISCRETE)
    held = [step, t.alloc(states, DISCRETE)]
    t.free(exponent)
    held.append(t.alloc(states, DISCRETE))
    upcast = [t.alloc(wide32, DISCRETE)] if f.half else []
    held.append(t.alloc(states, DISCRETE))
    t.free(*upcast)
    held.append(t.alloc(f.tokens * -(-f.batch * inner * f.element_bytes // 512) * 512, SCANNED))
    last = t.alloc(state, DISCRETE)
    t.moment(DISCRETE, state, state)
    stacked = t.alloc(wide, SCANNED)
    skip = t.alloc(wide32, SCANNED)
    total = t.alloc(wide32, SCANNED)
    t.free(skip, stacked)
    gate = t.alloc(wide, SCANNED)
    out = t.alloc(wide32, SCANNED)
    t.free(gate, total, *held)
    return out, last


def chunk_scan(t: Timeline, f: Forward, part: Mamba2) -> tuple[int, int]:
    """Chunks as batched products: C·B of every pair of tokens before it is summed over N is by far the widest.

    Returns the handles of the output and of the states that the last is a part of.
    """
    heads, size, inner, n = part.heads, part.chunk_size, part.d_inner, part.d_state
    chunks = f.batch * -(-f.tokens // size)
    rows = chunks * size
    wide, state = rows * inner * 4, inner * n * 4
    upcast = [t.alloc(f.fp32_bytes(inner), CHUNKED)] if f.half else []
    repeated = []
    for _ in "BC":
        small = t.alloc(f.fp32_bytes(part.groups * n), CHUNKED) if f.half else None
        repeated.append(t.alloc(f.fp32_bytes(heads * n), CHUNKED))
        if small is not None:
            t.free(small)
    padded = t.alloc(wide, CHUNKED)
    skip = t.alloc(wide, CHUNKED)
    t.free(padded)
    scaled = t.alloc(f.fp32_bytes(inner), CHUNKED)
    t.free(*upcast)
    x, b, c = t.alloc(wide, CHUNKED), t.alloc(rows * heads * n * 4, CHUNKED), t.alloc(rows * heads * n * 4, CHUNKED)
    t.free(scaled, *repeated)
    pairs = rows * size * heads * 4
    filled = t.alloc(pairs, CHUNKED)
    sums = t.alloc(pairs, CHUNKED)
    causal = t.alloc(pairs, CHUNKED)
    t.free(sums, filled)
    decay = t.alloc(pairs, CHUNKED)
    t.free(causal)
    product = t.alloc(pairs * n, CHUNKED)
    weights = t.alloc(pairs, CHUNKED)
    t.free(product)
    product = t.alloc(pairs, CHUNKED)
    masked = t.alloc(pairs, CHUNKED)
    t.free(product)
    product = t.alloc(pairs * part.head_dim, CHUNKED)
    diagonal = t.alloc(wide, CHUNKED)
    t.free(product)
    decayed = t.alloc(rows * heads * n * 4, CHUNKED)
    product = t.alloc(rows * state, CHUNKED)
    by_chunk = t.alloc(chunks * state, CHUNKED)
    t.free(product)
    first = t.alloc(f.batch * state, CHUNKED)
    joined = t.alloc((chunks + f.batch) * state, CHUNKED)
    t.free(by_chunk)
    product = t.alloc(f.batch * (chunks // f.batch + 1) ** 2 * state, CHUNKED)
    passed = t.alloc((chunks + f.batch) * state, CHUNKED)
    t.free(product, joined)
    product = t.alloc(rows * state, CHUNKED)
    summed = t.alloc(wide, CHUNKED)
    off_diagonal = t.alloc(wide, CHUNKED)
    t.free(summed)
    both = t.alloc(wide, SCANNED)
    out = t.alloc(wide, SCANNED)
    t.free(both, skip, b, c, x, decay, weights, masked, diagonal, decayed, first, product, off_diagonal)
    return out, passed
