"""Pipeline parallelism by formula: a stage's part of a model is a model of fewer layers, and its schedule says which
forward and backward passes it runs in which order.

Layers are split evenly, as Megatron-LM does; of a remainder each of the first stages takes one more, as DeepSpeed does.
The first stage has the embeddings, the last one the norm, the head and the loss; a tied table stands on both. Hidden
states are received as their turn comes and kept, as the sent ones are, until the microbatch's backward pass.

Source: Megatron-LM, megatron/core/pipeline_parallel/schedules.py; DeepSpeed 0.19.8, runtime/utils.py
`partition_uniform`; PyTorch 2.13, distributed/pipelining/schedules.py `Schedule1F1B`, `ScheduleGPipe`.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

from hfvram.errors import HfvramError
from hfvram.model.architecture import Architecture
from hfvram.request import Request


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of `of`, and how many microbatches it has passed forward and not yet back, at most."""

    index: int = 0
    of: int = 1
    in_flight: int = 1

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
    """
    p, m = request.pp, request.grad_accum
    if request.pp_schedule == "gpipe":
        return [Stage(i, p, m) for i in range(p)]
    return [Stage(i, p, min(p - i, m)) for i in range(p)]


def schedule(stage: Stage, microbatches: int) -> list[tuple[bool, int]]:
    """(whether forward, microbatch) in order; of one forward and one backward in turn as few microbatches as show all
    that happens: those in flight, and two more.

    >>> ["FB"[not forward] + str(i) for forward, i in schedule(Stage(2, 4, 2), 9)]
    ['F0', 'F1', 'B0', 'F2', 'B1', 'F3', 'B2', 'B3']
    """
    n = min(microbatches, stage.in_flight + 2 if stage.of > 1 else 2)
    out = [(True, i) for i in range(min(stage.in_flight, n))]
    for i in range(n):
        out.append((False, i))
        if i + stage.in_flight < n:
            out.append((True, i + stage.in_flight))
    return out


def counts(layers: int, pp: int) -> list[int]:
    """Layers of each stage.

    >>> counts(30, 4)
    [8, 8, 7, 7]
    """
    each, more = divmod(layers, pp)
    return [each + (i < more) for i in range(pp)]


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
    if architecture.task != "causal" or len(architecture.stacks) > 1:
        raise _unknown(architecture.class_name)
    if architecture.moe and architecture.moe.auxiliary:
        raise _unknown(f"{architecture.class_name} with output_router_logits, whose loss is of all stages")
    if len([p for p in architecture.text.before if "project" in p.name]):
        raise _unknown(f"{architecture.class_name} whose embeddings are projected")


def _unknown(what: str) -> HfvramError:
    return HfvramError("usage", f"--pp has no formula for {what} yet: valid is --pp 1")
