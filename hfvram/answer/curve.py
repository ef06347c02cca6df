"""How memory grows with the context: the same request at other lengths, each estimated again."""

from collections.abc import Iterator
from dataclasses import dataclass

from hfvram.answer.fit import LEAST_CTX, with_ctx
from hfvram.answer.parts import parts
from hfvram.answer.question import estimate_of, formula_of
from hfvram.errors import HfvramError
from hfvram.memory.timeline import Category
from hfvram.model.identify import Model
from hfvram.request import Request

UNLIMITED = 128 * 1024
"""As far as a curve goes at least, where a model has no limit of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What a context takes: at the peak by category, and on the device."""

    ctx: int
    live_bytes: tuple[tuple[Category, int], ...]
    parts: tuple[tuple[str, int], ...]
    """Of `device_bytes`: categories, then what the allocator holds and CUDA's own."""
    device_bytes: int


def curve_of(model: Model, request: Request) -> tuple[Point, ...]:
    """Points of a resolved request, by formula wherever there is one; none where each would take seconds, or the
    context changes nothing that is estimated."""
    formula = formula_of(model, request)
    if formula is None or formula.engine not in ("transformers",) or formula.requests:
        return ()
    longest = model.architecture.max_positions or UNLIMITED
    found = []
    for ctx in contexts(formula.ctx or 1, longest, halves=formula.mode == "inference"):
        try:
            e = estimate_of(model, with_ctx(formula, ctx))
        except HfvramError:  # a length that the model can't have
            continue
        sums: dict[Category, int] = {}
        for item in e.items:
            sums[item.category] = sums.get(item.category, 0) + item.bytes
        found.append(Point(ctx=ctx, live_bytes=tuple(sums.items()), parts=parts(e), device_bytes=e.device_bytes))
    return tuple(found)


def contexts(asked: int, longest: int, halves: bool) -> list[int]:
    """Powers of two, and with `halves` one between each two, up to the model's limit; the limit and what was asked.

    >>> contexts(3000, 8192, halves=False)
    [256, 512, 1024, 2048, 3000, 4096, 8192]
    """
    most = max(asked, longest)
    return sorted({*_steps(min(LEAST_CTX, most), most, halves), asked, most})


def _steps(first: int, most: int, halves: bool) -> Iterator[int]:
    n = first
    while n <= most:
        yield n
        if halves and n * 3 // 2 < most:
            yield n * 3 // 2
        n *= 2
