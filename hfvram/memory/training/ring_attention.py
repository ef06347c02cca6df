"""Attention over a sequence of which each rank has a part (context parallelism): keys and values go around.

A rank has two halves, one from the start of the sequence and one from its end, so that all compute as much. The first
step attends to its own keys and values. They are gathered from all ranks at once; of an earlier rank's the first half
is seen by all own queries, of a later rank's both halves by the second half of them. Outputs are merged in fp32; in the
backward pass the gradients of keys and values go from rank to rank in fp32.

Source: PyTorch 2.13, distributed/tensor/experimental/_context_parallel/_attention.py `_templated_ring_attention` and
its backward, which rotate by all-gather (`_RotateMethod.ALL_GATHER`) as accelerate has it by default. Derived from that
code, and held against it event by event over stand-in kernels; never measured. Left out: copies that flash attention
makes of halves of several sequences.
"""

from collections.abc import Iterator
from functools import partial
from typing import Final

from hfvram.errors import HfvramError
from hfvram.memory.cuda_kernels import Kernel
from hfvram.memory.timeline import Tag
from hfvram.memory.training.operators import Found, Grads, attach, first, low
from hfvram.memory.training.scaled_dot_product import LOG_SUM, fused_gradient, kernel_for, run_fused
from hfvram.memory.training.tape import Saved, Tape
from hfvram.memory.training.tensors import Shape, Tensor, contiguous, is_contiguous, preserved

RING: Final = "PyTorch 2.13: _context_parallel/_attention.py"
OWN = Tag("context parallel, keys and values to send", "activations", "b·s/cp·2·a_kv·d·e", RING)
GATHERED = Tag("context parallel, keys and values of all ranks", "activations", "b·s·2·a_kv·d·e", RING)
MERGED = Tag("context parallel, outputs merged in fp32", "activations", "b·s/cp·a·d·4", RING)
TRAVELLING = Tag("context parallel, gradients of keys and values", "activations", "b·s/cp·2·a_kv·d·4", RING)


def ring_attention(t: Tape, q: Tensor, k: Tensor, v: Tensor, *, gqa: bool, p: float, tag: Tag) -> Tensor:
    """Causal attention of this rank's (b, heads, s÷cp, d) tensors to the whole sequence."""
    v, k, q = low(t, v), low(t, k), low(t, q)
    kernel = kernel_for(t, q, k, v, None, gqa, p)
    if kernel is None or (kernel == "flash" and q.shape[-1] % 8):
        raise HfvramError(
            "usage",
            f"--cp needs a kernel of flash, cuDNN or efficient attention, {q.dtype} heads of {q.shape[-1]} have none "
            "here: valid are --dtype bf16 and fp16, or --cp 1",
        )
    node = t.record(partial(_gradient, kernel), (q, k, v))
    out, log_sum, seeds = _forward(t, kernel, q, k, v, tag)
    t.keep(node, q, k, v, None, out, log_sum, *seeds)
    return attach(out, node)


def _forward(
    t: Tape, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, tag: Tag
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    merged: list[Tensor] = []
    held: list[Tensor] = []
    for step, queries, keys, values, _ in _steps(t, q, k, v, held):
        out, log_sum, seeds = run_fused(t, kernel, queries, keys, values, tag)
        block = out if out.dtype == "fp32" else t.like(out, "fp32", MERGED)
        _merge(t, merged, block, log_sum, partly=step > t.ring[1])
        del block
    out = merged[0] if q.dtype == "fp32" else t.like(merged[0], q.dtype, tag)
    return out, merged[1], seeds


Step = tuple[int, Tensor, Tensor, Tensor, Tensor | None]


def _steps(
    t: Tape, q: Tensor, k: Tensor, v: Tensor, held: list[Tensor], log_sum: Tensor | None = None
) -> Iterator[Step]:
    """Of each step: its number, the queries, keys and values that meet, in the backward pass the queries' `log_sum`.

    What is gathered is `held` to the end; what was put together to be sent goes as it was, or stays to the next."""
    (ranks, rank), keys, values = t.ring, _dense(t, k), _dense(t, v)
    flat = (k.numel + v.numel,)
    sent: Tensor | None = t.new(flat, k.dtype, None, OWN)
    gathered = t.new((ranks * flat[0],), k.dtype, None, GATHERED)
    held.append(gathered)
    yield 0, q, keys, values, log_sum
    for step in range(1, ranks):
        if log_sum is None:
            sent = None
        keys = gathered.as_(k.shape, contiguous(k.shape))
        values = gathered.as_(v.shape, contiguous(v.shape))
        if step < ranks - 1:  # put together as if it were sent
            sent = t.new(flat, k.dtype, None, OWN)
            if log_sum is None:
                sent = None
        if step <= rank:
            yield step, q, half(keys), half(values), log_sum
            continue
        logs = None if log_sum is None else t.new((*log_sum.shape[:2], log_sum.shape[2] // 2), "fp32")
        yield step, half(q), keys, values, logs
        del logs
    if sent is not None:
        held.append(sent)


def half(x: Tensor) -> Tensor:
    """One of the two halves of a part of the sequence."""
    return x.as_((*x.shape[:2], x.shape[2] // 2, *x.shape[3:]), x.strides)


def _dense(t: Tape, x: Tensor) -> Tensor:
    return x.alias() if is_contiguous(x.shape, x.strides) else t.new(x.shape, x.dtype, None, OWN)


def _merge(t: Tape, merged: list[Tensor], block: Tensor, log_sum: Tensor, partly: bool) -> None:
    """out − sigmoid(block_lse − lse)·(out − block_out), lse − logsigmoid(lse − block_lse); of half the queries, the
    result is put in its place by a copy of all."""
    if not merged:
        merged += [block, log_sum]
        return
    whole, logs = (x.shape for x in merged)
    out = half(merged[0]) if partly else merged[0]
    weight = t.new(log_sum.shape, "fp32", None, MERGED)
    weight = t.new(log_sum.shape, "fp32", None, MERGED)
    difference = t.elementwise(out, block, tag=MERGED)
    product = t.elementwise(difference, tag=MERGED)
    del weight, difference
    out = t.elementwise(out, product, tag=MERGED)
    del product
    apart = t.new(log_sum.shape, "fp32", None, MERGED)
    sigmoid = t.new(log_sum.shape, "fp32", None, MERGED)
    if t.on_meta:  # a buffer that CUDA's kernel has no use for
        t.moment(log_sum.nbytes)
    del apart
    log = t.new(log_sum.shape, "fp32", None, LOG_SUM)
    del sigmoid
    merged[1] = t.new(logs, "fp32", None, LOG_SUM) if partly else log
    merged[0] = t.new(whole, "fp32", None, MERGED) if partly else out


def _gradient(kernel: Kernel, t: Tape, saved: Saved, grads: Grads) -> Found:
    grad, (q, k, v, _, out, log_sum, *_) = first(grads), saved
    assert q is not None
    assert k is not None
    assert v is not None
    assert out is not None
    assert log_sum is not None
    of_q, of_k, of_v = (t.new(x.shape, "fp32", preserved(x.shape, x.strides)) for x in (q, k, v))
    travelling: list[Tensor] = []
    held: list[Tensor] = []
    for step, queries, keys, values, _logs in _steps(t, q, k, v, held, log_sum):
        partly = step > t.ring[1]
        mine = (half(out), half(grad)) if partly else (out, grad)
        _found = fused_gradient(kernel, t, (queries, keys, values, None, mine[0], None), [mine[1]])
        if step:
            arrived = travelling.pop()
            travelling.clear()
            of_k, of_v = arrived.as_(k.shape, contiguous(k.shape)), arrived.as_(v.shape, contiguous(v.shape))
            if not partly:
                of_k = t.new(k.shape, "fp32")
                of_v = t.new(v.shape, "fp32")
            travelling.append(arrived)
            del arrived
        copies = [t.new(x.shape, "fp32") for x in (of_k, of_v) if not is_contiguous(x.shape, x.strides)]
        packed = _travel(t, k, v)
        del copies
        travelling = [packed, _travel(t, k, v)]
        del packed
        if partly:
            of_q = t.new(q.shape, "fp32")
    of_q = of_q if q.dtype == "fp32" else t.like(of_q, q.dtype)
    arrived = travelling[1]
    back = arrived if k.dtype == "fp32" else t.new(arrived.shape, k.dtype)
    return of_q, back.as_(k.shape, contiguous(k.shape)), back.as_(v.shape, contiguous(v.shape))


def _travel(t: Tape, k: Tensor, v: Tensor) -> Tensor:
    shape: Shape = (k.numel + v.numel,)
    return t.new(shape, "fp32", None, TRAVELLING)
