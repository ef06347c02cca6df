"""The gated delta rule with gradients, by chunks of 64 tokens in fp32, as transformers computes it itself.

Both engines train so: what flash-linear-attention's kernels keep for a backward pass has not been held against a GPU.
b sequences of s tokens, H heads, d_k and d_v sizes of a head's keys and values, n chunks.
Source: transformers 5.17, models/qwen3_next/modeling_qwen3_next.py `torch_chunk_gated_delta_rule`; PyTorch 2.11,
torch/csrc/autograd/FunctionsManual.cpp (`cumsum_backward`, `linalg_solve_triangular_backward`).
"""

from functools import partial

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training import selection
from hfvram.memory.training.operators import Found, Grads, attach, first, there
from hfvram.memory.training.tape import Saved, Tape
from hfvram.memory.training.tensors import Shape, Tensor, contiguous, preserved

DELTA = "transformers 5.17: torch_chunk_gated_delta_rule"
WIDE = Tag("delta rule, queries, keys and values in fp32", "activations", "b·s·H·d·4", DELTA)
PAIRS = Tag("delta rule, pairs of tokens of a chunk", "activations", "b·s·H·64·4", DELTA)
SOLVED = Tag("delta rule, solutions for each chunk", "activations", "b·s·H·d·4", DELTA)
STATE = Tag("delta rule, states of each chunk", "activations", "b·n·H·d_k·d_v·4", DELTA)
OUT = Tag("delta rule, output", "activations", "b·s·H·d_v·4", DELTA)
CHUNK = 64


def chunked(
    t: Tape, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, cached: bool
) -> tuple[Tensor, Tensor | None]:
    """Outputs (b, s, H, d_v) of queries and keys (b, s, H, d_k), values, decays and β (b, s, H); and, if it is to be
    cached, the last state."""
    dtype, (b, s, h, d_k), d_v = query.dtype, key.shape, value.shape[-1]
    wide = [_wide(t, x) for x in (query, key, value, beta, decay)]
    query, key, value, beta, decay = wide
    del wide
    query = _normed(t, query)
    key = _normed(t, key)
    query = op.scale(t, query, WIDE)
    pad = -s % CHUNK
    padded = [_padded(t, x, pad) for x in (query, key, value)]
    query, key, value = padded
    padded = [_padded(t, x, pad) for x in (beta, decay)]
    beta, decay = padded
    del padded
    v_beta = op.mul(t, value, op.reshape(t, beta, *beta.shape, 1), WIDE)
    k_beta = op.mul(t, key, op.reshape(t, beta, *beta.shape, 1), WIDE)
    n = (s + pad) // CHUNK
    query, key, k_beta, v_beta = [op.reshape(t, x, b, h, n, CHUNK, x.shape[-1]) for x in (query, key, k_beta, v_beta)]
    decay = op.reshape(t, decay, b, h, n, CHUNK)
    square = t.new((CHUNK, CHUNK), "bool", None, PAIRS)
    hidden = t.new((CHUNK, CHUNK), "bool", None, PAIRS)
    del square
    sums = _cumulated(t, decay)
    pairs = op.subtract(t, op.reshape(t, sums, *sums.shape, 1), op.reshape(t, sums, b, h, n, 1, CHUNK), PAIRS)
    pairs = selection.masked(t, pairs, hidden, PAIRS)
    pairs = op.of_output(t, pairs, PAIRS)
    system = op.mul(t, op.matmul(t, k_beta, op.transpose(t, key, 3, 4), PAIRS), pairs, PAIRS)
    within = op.mul(t, op.matmul(t, query, op.transpose(t, key, 3, 4), PAIRS), pairs, PAIRS)
    decayed = op.mul(t, k_beta, _last(t, op.of_output(t, sums, PAIRS)), WIDE)
    new_values = _solved(t, system, v_beta)
    read = _solved(t, system, decayed)
    state = t.new((b, h, d_k, d_v), "fp32", None, STATE)
    out = t.like(new_values, tag=OUT)
    query = op.mul(t, query, _last(t, op.of_output(t, sums, PAIRS)), WIDE)
    left = op.subtract(t, op.narrow(t, sums, 3, 1), sums, PAIRS)
    left = op.of_output(t, left, PAIRS)
    key = op.mul(t, key, _last(t, left), WIDE)
    del left
    ends = op.of_output(t, op.select(t, sums, 3), PAIRS)
    ends = op.reshape(t, ends, *ends.shape, 1, 1)
    for _ in range(n):
        new = _corrected(t, new_values, read, state)
        earlier = op.matmul(t, op.select(t, query, 2), state, OUT)
        out = _with_chunk(t, out, earlier, within, new)
        state = _next_state(t, state, ends, key, new)
    last = state if cached else None
    del state
    out = op.reshape(t, out, b, h, -1, d_v, tag=OUT)
    out = op.narrow(t, out, 2, s)
    return _dense(t, op.transpose(t, out, 1, 2), dtype), last


def _wide(t: Tape, x: Tensor) -> Tensor:
    return _dense(t, op.transpose(t, x, 1, 2), "fp32")


def _dense(t: Tape, x: Tensor, dtype: str) -> Tensor:
    """Cast row after row, or left as it lies where it has the dtype (unless that is channels last)."""
    if x.dtype == dtype and not _channels_last(x.shape, x.strides):
        return x
    node = t.record(partial(_cast_back, x.dtype), (x,))
    return attach(t.new(x.shape, dtype, None, WIDE), node)


def _channels_last(shape: Shape, strides: Shape) -> bool:
    """Whether PyTorch takes four dimensions to lie so: `is_channels_last_strides_2d`."""
    if len(shape) != 4 or not strides[1]:
        return False
    least = 0
    for dim in (1, 3, 2, 0):
        if not shape[dim] or strides[dim] < least or (dim == 0 and least == strides[1]):
            return False
        least = strides[dim] * max(shape[dim], 1)
    return True


def _cast_back(dtype: str, t: Tape, saved: Saved, grads: Grads) -> Found:
    grad = first(grads)
    return (grad if grad.dtype == dtype else t.like(grad, dtype),)


def _normed(t: Tape, x: Tensor) -> Tensor:
    """x over its length: `l2norm`."""
    inverse = op.rsqrt(t, op.shift(t, selection.total(t, op.mul(t, x, x, WIDE), -1, True, WIDE), WIDE), WIDE)
    return op.mul(t, x, inverse, WIDE)


def _padded(t: Tape, x: Tensor, pad: int) -> Tensor:
    """Tokens (dimension 2) to a multiple of 64: a copy in any case."""
    node = t.record(partial(_cut, x.shape), (x,))
    shape = (*x.shape[:2], x.shape[2] + pad, *x.shape[3:])
    strides = contiguous(shape) if pad else preserved(x.shape, x.strides)
    return attach(t.new(shape, x.dtype, strides, WIDE), node)


def _cut(shape: Shape, t: Tape, saved: Saved, grads: Grads) -> Found:
    grad = first(grads)
    return (t.like(grad.as_(shape, grad.strides)),)


def _cumulated(t: Tape, x: Tensor) -> Tensor:
    """Sums from the first to each."""
    node = t.record(_from_the_end, (x,))
    return attach(t.new(x.shape, x.dtype, None, PAIRS), node)


def _from_the_end(t: Tape, saved: Saved, grads: Grads) -> Found:
    grad = first(grads)
    held = t.like(grad), t.like(grad)
    out = t.like(grad)
    del held
    return (out,)


def _last(t: Tape, x: Tensor) -> Tensor:
    return op.reshape(t, x, *x.shape, 1)


def _solved(t: Tape, system: Tensor, right: Tensor) -> Tensor:
    """`solve_triangular`: columns after columns."""
    node = t.record(_solved_back, (system, right), system)
    out = _columns(t, right)
    t.keep(node, out)
    return attach(out, node)


def _columns(t: Tape, like: Tensor) -> Tensor:
    *batch, rows, columns = like.shape
    strides = contiguous((*batch, columns, rows))
    return t.new(like.shape, "fp32", (*strides[:-2], 1, rows), SOLVED)


def _solved_back(t: Tape, saved: Saved, grads: Grads) -> Found:
    system, solution = there(*saved)
    of_right = _columns(t, first(grads))
    product = t.new(system.shape, "fp32")
    of_system = t.like(product)
    del product
    lower = t.like(of_system)
    del solution
    return lower, of_right


def _corrected(t: Tape, new_values: Tensor, read: Tensor, state: Tensor) -> Tensor:
    """A chunk's values less what the state has of them."""
    value = op.select(t, new_values, 2)
    return op.subtract(t, value, op.matmul(t, op.select(t, read, 2), state, OUT), OUT)


def _with_chunk(t: Tape, out: Tensor, earlier: Tensor, within: Tensor, new: Tensor) -> Tensor:
    both = op.add(t, earlier, op.matmul(t, op.select(t, within, 2), new, OUT), OUT)
    return selection.put(t, out, both)


def _next_state(t: Tape, state: Tensor, ends: Tensor, key: Tensor, new: Tensor) -> Tensor:
    kept = op.mul(t, state, op.select(t, ends, 2), STATE)
    return op.add(t, kept, op.matmul(t, op.transpose(t, op.select(t, key, 2), 2, 3), new, STATE), STATE)
