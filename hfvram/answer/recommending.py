"""The smallest GPUs that run a request, and how many of them: each by the estimate for it, run again."""

from collections.abc import Callable
from functools import cache
from typing import Final

from hfvram.answer.estimate import Recommended
from hfvram.answer.fit import difference
from hfvram.answer.gpus import Gpu, fewest
from hfvram.errors import HfvramError
from hfvram.request import Request

COUNTS: Final = (1, 2, 4, 8)
"""GPUs of one machine."""
MARGIN: Final = 0.8
"""Generations of GPUs differ by less in what a request takes: farther from it, one generation's bytes decide."""


def recommended(taken: Callable[[Request], int], request: Request, device_bytes: int) -> tuple[Recommended, ...]:
    """Of each vendor and tier the smallest GPU that runs `request`, which takes `device_bytes` on a GPU as asked; where
    none does, the fewest of them that do, with what has to be asked for then. Smallest first.
    """
    asked = request.with_(gpu=None, max_ctx=False, max_batch=False)
    given = request.gpus or 1

    @cache
    def bytes_of(gpus: int, capability: str | None) -> int | None:
        """What a request of so many GPUs takes on each; None where it makes no sense."""
        changed = over(asked, gpus)
        if changed is None:
            return None
        try:
            return taken(changed if capability is None else changed.with_(compute_capability=capability))
        except HfvramError:
            return None

    def runs(gpu: Gpu, gpus: int) -> bool:
        usual = device_bytes if gpus == given else bytes_of(gpus, None)
        if usual is None or usual * MARGIN > gpu.memory_bytes:
            return False
        exact = None if request.compute_capability else bytes_of(gpus, gpu.capability)
        return (usual if exact is None else exact) <= gpu.memory_bytes

    counts = COUNTS if given == 1 else (given,)
    return tuple(told(request, gpu, gpus, over(asked, gpus) or asked) for gpu, gpus in fewest(runs, counts))


def told(request: Request, gpu: Gpu, gpus: int, changed: Request) -> Recommended:
    """A GPU, how many, and the options that make it so many."""
    options = "" if gpus == (request.gpus or 1) else difference(request.with_(gpu=None), changed)
    return Recommended(gpu=gpu.name, gpus=gpus, capacity_bytes=gpu.memory_bytes, options=options)


def over(request: Request, gpus: int) -> Request | None:
    """The same over so many GPUs: a training sharded by FSDP, anything else with every layer split."""
    if gpus == (request.gpus or 1):
        return request
    if request.offload or request.zero:
        return None
    if request.mode != "inference":
        return request.with_(gpus=gpus, fsdp=request.fsdp or "full_shard")
    return request.with_(gpus=gpus, tp=gpus)
