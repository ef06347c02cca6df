"""State spaces without gradients: Mamba and Mamba-2, by their fused kernels (what they need without them is in
`ssm_fallback`), and their states.

b sequences of s tokens, d inner width, N state size, H heads of P, G groups, k columns of the convolution, c chunks of
Q tokens, e bytes of an element. Source: transformers 5.17, models/mamba/modeling_mamba.py (`MambaMixer.forward`) and
mamba2/modeling_mamba2.py (`Mamba2Mixer.forward`), of which the hybrids' mixers are copies; kernels: state-spaces/mamba
2.2, selective_scan_interface.py and ops/triton/ssd_*.py; causal-conv1d 1.5.
"""

from hfvram.memory.blocks import HIDDEN, NORM, normalize, project
from hfvram.memory.forward import Forward
from hfvram.memory.ssm_fallback import chunk_scan as fallback_chunk_scan
from hfvram.memory.ssm_fallback import scan as fallback_scan
from hfvram.memory.timeline import Tag, Timeline
from hfvram.model.layers import Mamba1, Mamba2

CACHES = "transformers 5.17: cache_utils.py, LinearAttentionLayer"
SCAN_SOURCE = "state-spaces/mamba 2.2: selective_scan_interface.py, ssd_combined.py"
CONV_STATE = Tag("convolution states", "cache", "b·(d+2·G·N)·k·e", CACHES, "exact")
STATE = Tag("recurrent states", "cache", "b·d·N·4", CACHES, "exact")
PROJECTED = Tag(
    "state space, projections", "activations", "b·s·(2·d+2·G·N+H)·e", "transformers 5.17: Mamba2Mixer.forward"
)
CONVOLVED = Tag("state space, convolution", "activations", "b·s·(d+2·G·N)·e", "transformers 5.17: causal_conv1d_fn")
SCAN = Tag("state space, scan", "activations", "b·c·d·N·4", SCAN_SOURCE)
SCANNED = Tag("state space, output of the scan", "activations", "b·s·d·e", SCAN_SOURCE)
TUNING = Tag(
    "Triton's autotuner", "workspace", "", "Triton 3: testing.py do_bench, a buffer that clears the L2 cache", "derived"
)
TUNING_BYTES = 256 << 20


def mamba1(t: Timeline, f: Forward, part: Mamba1, states: list[int]) -> int:
    """A Mamba mixer; `states` holds its two states, empty before the prefill. Returns the output's handle."""
    recurrent = f.batch * part.d_inner * part.d_state * 4
    if f.past:
        return step(t, f, 2 * part.d_inner, part.d_inner, part.d_inner, part.hidden_size, 5 * recurrent)
    masked = f.masked or (part.mask_of_ones and f.mask_of_ones)
    wide, low_rank = f.bytes(part.d_inner), part.dt_rank + 2 * part.d_state
    held = [t.alloc(f.bytes(part.hidden_size), HIDDEN)] if masked else []
    held.append(project(t, f, part.hidden_size, 2 * part.d_inner, PROJECTED))
    decay = part.d_inner * part.d_state * 4
    t.moment(PROJECTED, decay, decay)
    held.append(t.alloc(decay, PROJECTED))
    by_head = [t.alloc(wide, PROJECTED)] if part.heads > 1 else []  # x in order of the heads
    convolved = convolve(t, f, part.d_inner, part.d_conv, states)
    t.free(*by_head)
    if masked:
        convolved = _replace(t, convolved, wide)
    low = t.alloc(f.bytes(low_rank), PROJECTED)
    if part.inner_norms:
        normed = [normalize(t, f, width, "rms", PROJECTED) for width in (part.dt_rank, part.d_state, part.d_state)]
        t.free(low)
        held += normed
    else:
        held.append(low)
    step_size = t.alloc(wide, PROJECTED)  # Δ; the matmul leaves a layout that only heads of their own can use
    held += [convolved, step_size if part.heads > 1 else _replace(t, step_size, wide)]
    out, last = _scan_by_head(t, f, part)
    keep(t, f, states, recurrent, STATE)
    cast = [t.alloc(wide, SCANNED)] if f.half and f.kernels != "fused" else []
    projected = project(t, f, part.d_inner, part.hidden_size, HIDDEN)
    t.free(*cast, *held, out, last)
    return projected


def _scan_by_head(t: Timeline, f: Forward, part: Mamba1) -> tuple[int, int]:
    """One scan as a rule; Zamba's heads are scanned one by one and joined."""
    inner, heads = part.d_inner // part.heads, range(part.heads)
    if f.kernels == "fused":
        done = [_selective_scan(t, f, inner, part.d_state, part.heads == 1) for _ in heads]
    else:
        done = [fallback_scan(t, f, inner, part.d_state) for _ in heads]
    if part.heads == 1:
        return done[0]
    outs, lasts = zip(*done, strict=True)
    out = t.alloc(sum(t.sizes[x] for x in outs), SCANNED)
    last = t.alloc(f.batch * part.d_inner * part.d_state * 4, SCAN)
    t.free(*outs, *lasts)
    return out, last


def _selective_scan(t: Timeline, f: Forward, inner: int, d_state: int, transposed: bool) -> tuple[int, int]:
    """`selective_scan_fn`: contiguous copies of x (if it is transposed), B, C and gate, and states every 2,048 tokens.

    Returns the handles of the output and of those states, of which the last is a view.
    """
    wide, narrow = f.bytes(inner), f.bytes(d_state)
    copies = [t.alloc(n, SCAN) for n in ((wide,) if transposed else ()) + (narrow, narrow, wide)]
    out = t.alloc(wide, SCANNED)
    checkpoints = t.alloc(f.batch * inner * -(-f.tokens // 2048) * 2 * d_state * 4, SCAN)
    gated = t.alloc(wide, SCANNED)
    t.free(out, *reversed(copies))
    return gated, checkpoints


def mamba2(t: Timeline, f: Forward, part: Mamba2, states: list[int]) -> int:
    """A Mamba-2 mixer; `states` holds its two states, empty before the prefill. Returns the output's handle."""
    width = part.d_inner + part.conv_dim + part.heads
    recurrent = f.batch * part.d_inner * part.d_state * 4
    if f.past:
        return step(t, f, width, part.conv_dim, part.d_inner, part.hidden_size, 4 * recurrent)
    inputs = [t.alloc(f.bytes(part.hidden_size), HIDDEN)] if f.masked else []
    if part.multipliers:
        inputs.append(t.alloc(f.bytes(part.hidden_size), HIDDEN))
        t.free(*inputs[:-1])
        inputs = inputs[-1:]
    projected = project(t, f, part.hidden_size, width, PROJECTED)
    if part.multipliers:
        projected = _replace(t, projected, f.bytes(width))
    convolved = convolve(t, f, part.conv_dim, part.d_conv, states)
    if f.masked:
        convolved = _replace(t, convolved, f.bytes(part.conv_dim))
    t.free(*inputs)
    scan = _chunk_scan if f.kernels == "fused" else fallback_chunk_scan
    scanned, last = scan(t, f, part)
    keep(t, f, states, recurrent, STATE)
    normed = _gate(t, f, part)
    out = project(t, f, part.d_inner, part.hidden_size, HIDDEN)
    t.free(projected, convolved, normed, scanned, last)
    return out


def _chunk_scan(t: Timeline, f: Forward, part: Mamba2) -> tuple[int, int]:
    """`mamba_chunk_scan_combined`: cumulative decays, states of every chunk (fp32, then in the computing dtype), C·B.

    Triton times its variants at the first launch of each of the five kernels, and holds a buffer meanwhile. Returns
    output and final states.
    """
    chunks = f.batch * -(-f.tokens // part.chunk_size)
    positions = chunks * part.chunk_size
    state = part.d_inner * part.d_state
    decays = [t.alloc(positions * part.heads * 4, SCAN) for _ in range(2)]
    tune(t, "chunk cumsum", part.chunk_size, part.heads)
    by_chunk = t.alloc(chunks * state * 4, SCAN)
    tune(t, "chunk state", part.chunk_size, part.head_dim, part.d_state)
    passed = t.alloc(chunks * state * f.element_bytes, SCAN)
    last = t.alloc(f.batch * state * 4, SCAN)
    tune(t, "state passing", part.head_dim * part.d_state)
    t.free(by_chunk)
    products = t.alloc(positions * part.groups * part.chunk_size * 4, SCAN)
    tune(t, "chunk products", part.chunk_size, part.d_state)
    out = t.alloc(f.bytes(part.d_inner), SCANNED)
    tune(t, "chunk scan", part.chunk_size, part.head_dim, part.d_state)
    t.free(decays[1], passed, products, decays[0])
    return out, last


def _gate(t: Timeline, f: Forward, part: Mamba2) -> int:
    """Gated RMSNorm in fp32, or the gate alone. After the fallback, the scan's output is fp32 already."""
    wide, wide32 = f.bytes(part.d_inner), f.fp32_bytes(part.d_inner)
    cast = f.half and f.kernels == "fused"
    if not part.gated_norm:
        silu = t.alloc(wide, SCANNED)
        gated = t.alloc(wide if cast else wide32, SCANNED)
        t.free(silu)
    else:
        upcast = [t.alloc(wide32, NORM)] if cast else []
        gate = t.alloc(wide32, NORM) if f.half else None
        silu = t.alloc(wide32, NORM)
        if gate is not None:
            t.free(gate)
        product = t.alloc(wide32, NORM)
        t.free(silu, *upcast)
        t.moment(NORM, wide32)  # the square
        scaled = t.alloc(wide32, NORM)
        t.free(product)
        if cast:
            half = t.alloc(wide, NORM)
            gated = t.alloc(wide, SCANNED)
            t.free(half, scaled)
        else:
            gated = t.alloc(wide32, SCANNED)
            t.free(scaled)
    if f.half and f.kernels != "fused":
        gated = _replace(t, gated, wide)
    return gated


def convolve(t: Timeline, f: Forward, channels: int, d_conv: int, states: list[int], activated: bool = True) -> int:
    """The causal convolution of a prefill, whose state is its last k columns. Returns the output's handle.

    The fused kernel writes its output alone; `nn.Conv1d` pads it by k − 1 columns, and the activation is a second one.
    """
    keep(t, f, states, f.batch * channels * d_conv * f.element_bytes, CONV_STATE)
    if f.kernels == "fused":
        return t.alloc(f.bytes(channels), CONVOLVED)
    padded = t.alloc(f.batch * (f.tokens + d_conv - 1) * channels * f.element_bytes, CONVOLVED)
    return _replace(t, padded, f.bytes(channels)) if activated else padded


def step(t: Timeline, f: Forward, width: int, channels: int, inner: int, hidden: int, update_bytes: int) -> int:
    """One token more: projection, convolution and output; without kernels, temporaries of `update_bytes` in between."""
    held = [project(t, f, hidden, width, PROJECTED), t.alloc(f.bytes(channels), CONVOLVED)]
    if f.kernels != "fused":
        t.moment(SCAN, update_bytes)
    held.append(t.alloc(f.bytes(inner), SCANNED))
    out = project(t, f, inner, hidden, HIDDEN)
    t.free(*held)
    return out


def keep(t: Timeline, f: Forward, states: list[int], nbytes: int, tag: Tag) -> None:
    """A state that outlives the pass, where there is a cache."""
    if f.use_cache:
        states.append(t.alloc(nbytes, tag))


def tune(t: Timeline, *kernel: object) -> None:
    """The first launch of a Triton kernel for these sizes."""
    if kernel not in t.tuned:
        t.tuned.add(kernel)
        t.moment(TUNING, TUNING_BYTES)


def _replace(t: Timeline, old: int, nbytes: int) -> int:
    """A tensor computed from another, which nothing holds after it."""
    new = t.alloc(nbytes, t.tags[old])
    t.free(old)
    return new
