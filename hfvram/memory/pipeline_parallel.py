"""Pipeline parallelism by formula: a stage's part of a model is a model of fewer layers, and its schedule says which
forward and backward passes it runs in which order.

With `--pp-chunks` there are more parts than ranks, which they go round (Narayanan et al., arXiv 2104.04473): a rank has
more microbatches in flight then, each of fewer layers. Layers are split evenly, as Megatron-LM does; of a remainder
each of the first stages takes one more, as DeepSpeed does. The first stage has the embeddings, the last one the norm,
the head and the loss; a tied table stands on both. Hidden states are received as their turn comes and kept, as the sent
ones are, until the microbatch's backward pass. A padding mask is every stage's, as Megatron-LM's batches have it.

Source: Megatron-LM, megatron/core/pipeline_parallel/schedules.py `get_pp_rank_microbatches`; DeepSpeed 0.19.8,
runtime/utils.py `partition_uniform`; PyTorch 2.13, distributed/pipelining/schedules.py `Schedule1F1B`, `ScheduleGPipe`.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

from hfvram.errors import HfvramError
from hfvram.model.architecture import Architecture
from hfvram.request import Request


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of `of`, and how many microbatches it has passed forward and not yet back, at most; in chunks, how many
    of a chunk."""

    index: int = 0
    of: int = 1
    in_flight: int = 1
    chunks: int = 1
    """Parts of a rank's layers, between which all other ranks' are."""

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def last(self) -> bool:
        return self.index == self.of - 1


def stages(request: Request) -> list[Stage]:
    """All stages of a request.

    >>> [x.in_flight for x in stages(Request(pp=4, grad_accum=8))]
    [4, 3, 2, 1]
    >>> [x.in_flight for x in stages(Request(pp=4, grad_accum=8, pp_schedule="gpipe"))]
    [8, 8, 8, 8]
    >>> [x.in_flight for x in stages(Request(pp=4, grad_accum=8, pp_chunks=2))]
    [11, 9, 7, 5]
    """
    p, m, v = request.pp, request.grad_accum, request.pp_chunks
    if v > 1:
        return [Stage(i, p, min(2 * (p - i - 1) + (v - 1) * p + 1, m * v), v) for i in range(p)]
    if request.pp_schedule == "gpipe":
        return [Stage(i, p, m) for i in range(p)]
    return [Stage(i, p, min(p - i, m)) for i in range(p)]


def schedule(stage: Stage, microbatches: int) -> list[tuple[bool, int, int]]:
    """(whether forward, microbatch, chunk) in order; of one forward and one backward in turn as few microbatches as
    show all that happens: those in flight, and two more.

    >>> ["FB"[not forward] + str(i) for forward, i, _ in schedule(Stage(2, 4, 2), 9)]
    ['F0', 'F1', 'B0', 'F2', 'B1', 'F3', 'B2', 'B3']
    """
    if stage.chunks > 1:
        return _interleaved(stage, microbatches)
    n = min(microbatches, stage.in_flight + 2 if stage.of > 1 else 2)
    out = [(True, i, 0) for i in range(min(stage.in_flight, n))]
    for i in range(n):
        out.append((False, i, 0))
        if i + stage.in_flight < n:
            out.append((True, i + stage.in_flight, 0))
    return out


def _interleaved(stage: Stage, microbatches: int) -> list[tuple[bool, int, int]]:
    """As many microbatches as there are stages go through a chunk, then through the next; back the other way.

    >>> ["FB"[not forward] + str(i) + "ab"[chunk] for forward, i, chunk in _interleaved(Stage(1, 2, 3, 2), 2)]
    ['F0a', 'F1a', 'F0b', 'B0b', 'F1b', 'B1b', 'B0a', 'B1a']
    """
    p, v = stage.of, stage.chunks
    n = min(microbatches, (-(-stage.in_flight // (p * v)) + 1) * p)

    def place(k: int, forward: bool) -> tuple[bool, int, int]:
        chunk = k % (p * v) // p
        return forward, k // (p * v) * p + k % p, chunk if forward else v - 1 - chunk

    out = [place(k, True) for k in range(stage.in_flight)]
    for k in range(n * v):
        out.append(place(k, False))
        if k + stage.in_flight < n * v:
            out.append(place(k + stage.in_flight, True))
    return out


def chunks(stage: Stage) -> list[Stage]:
    """The parts that a rank holds, as stages of a longer pipeline that comes by it several times.

    >>> [chunk.index for chunk in chunks(Stage(1, 4, chunks=3))]
    [1, 5, 9]
    """
    if stage.chunks == 1:
        return [stage]
    return [Stage(i * stage.of + stage.index, stage.of * stage.chunks) for i in range(stage.chunks)]


def counts(layers: int, pp: int) -> list[int]:
    """Layers of each stage.

    >>> counts(30, 4)
    [8, 8, 7, 7]
    """
    each, more = divmod(layers, pp)
    return [each + (i < more) for i in range(pp)]


@lru_cache(maxsize=1024)
def rank_of(architecture: Architecture, stage: Stage) -> Architecture:
    """What the rank of one stage holds: all of its chunks."""
    first, *_, last = parts = [stage_of(architecture, x.index, x.of) for x in (chunks(stage) * 2)[: 2 * stage.chunks]]
    if stage.chunks == 1:
        return first
    layers = tuple(layer for part in parts[: stage.chunks] for layer in part.text.layers)
    text = replace(last.text, layers=layers, before=first.text.before or last.text.before)
    return replace(last, stacks=(text,))


@lru_cache(maxsize=1024)
def stage_of(architecture: Architecture, index: int, pp: int) -> Architecture:
    """What one stage holds."""
    text = architecture.text
    first, last = index == 0, index == pp - 1
    ends = list(accumulate(counts(len(text.layers), pp), initial=0))
    before = text.before if first else ()
    if last and not first and not architecture.head:
        before = next((p,) for p in text.before if p.kind != "buffer")
    local = replace(
        text, layers=text.layers[ends[index] : ends[index + 1]], before=before, after=text.after if last else ()
    )
    return replace(
        architecture,
        stacks=(local,),
        head=architecture.head if last else (),
        final_norm=architecture.final_norm if last else None,
    )


def check(architecture: Architecture, request: Request) -> None:
    """Raises `usage` for a model that can't be split into so many stages, or by no formula."""
    layers = len(architecture.text.layers)
    if request.pp > layers:
        raise HfvramError("usage", f"--pp {request.pp} is more than the {layers} layers: valid are 1 to {layers}")
    parts = request.pp * request.pp_chunks
    if request.pp_chunks > 1 and layers % parts:
        most = layers // request.pp
        valid = [n for n in range(1, most + 1) if n == 1 or not layers % (request.pp * n)]
        shown = ", ".join(map(str, valid))
        raise HfvramError(
            "usage",
            f"--pp-chunks {request.pp_chunks}: {layers} layers are not divisible by "
            f"{request.pp}·{request.pp_chunks}: valid are {shown}",
        )
    if request.pp_chunks > 1 and request.grad_accum % request.pp:
        many = f"{request.pp}, {2 * request.pp}, …"
        raise HfvramError(
            "usage",
            f"--pp-chunks: --grad-accum {request.grad_accum} microbatches are not divisible by --pp {request.pp}: "
            f"valid are {many}",
        )
    if architecture.task != "causal" or len(architecture.stacks) > 1:
        raise _unknown(architecture.class_name)
    if architecture.moe and architecture.moe.auxiliary:
        raise _unknown(f"{architecture.class_name} with output_router_logits, whose loss is of all stages")
    if len([p for p in architecture.text.before if "project" in p.name]):
        raise _unknown(f"{architecture.class_name} whose embeddings are projected")


def _unknown(what: str) -> HfvramError:
    return HfvramError("usage", f"--pp has no formula for {what} yet: valid is --pp 1")
