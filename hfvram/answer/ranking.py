"""Several answers side by side: in which order, and which of those that fit is the cheapest."""

from collections.abc import Sequence
from dataclasses import dataclass

from hfvram.answer.estimate import Estimate
from hfvram.errors import HfvramError


@dataclass(frozen=True, slots=True)
class Ranking:
    """Places of answers from the cheapest that fits on, where a GPU is named, else as they were asked; and that one."""

    order: tuple[int, ...]
    cheapest: int | None


def ranking(answers: Sequence[Estimate | HfvramError]) -> Ranking:
    """What fits comes first, on the fewest bytes of GPUs, and on the same GPUs what takes the least of them; then what
    does not fit, what comes nearest first; then what failed."""
    keys = [_key(a) for a in answers]
    if not any(kind < FAILED for kind, *_ in keys):
        return Ranking(tuple(range(len(answers))), None)
    order = tuple(sorted(range(len(answers)), key=lambda i: keys[i]))
    return Ranking(order, order[0] if keys[order[0]][0] == FITS else None)


FITS, NOT, FAILED = range(3)


def _key(answer: Estimate | HfvramError) -> tuple[int, int, int]:
    if isinstance(answer, HfvramError) or answer.fit is None:
        return FAILED, 0, 0
    gpus = answer.request.gpus or 1
    if answer.fit.fits:
        return FITS, gpus * answer.fit.capacity_bytes, answer.device_bytes
    return NOT, -answer.fit.headroom_bytes, answer.device_bytes
