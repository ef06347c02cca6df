"""Which answer comes first, and which is the cheapest."""

from dataclasses import replace

from estimates import mixtral, too_much

from hfvram.answer.estimate import Estimate, Fit
from hfvram.answer.ranking import ranking
from hfvram.errors import HfvramError
from hfvram.units import GiB

FAILED = HfvramError("not_found", "no such model")


def answer(device: int, capacity: int, gpus: int = 1) -> Estimate:
    e = mixtral()
    room = (capacity - device) * GiB
    fit = Fit(
        gpu="x", capacity_bytes=capacity * GiB, fits=room >= 0, headroom_bytes=room, max_ctx=1, max_batch=1, ways=()
    )
    return replace(e, request=e.request.with_(gpus=gpus), device_bytes=device * GiB, fit=fit)


def test_the_fewest_bytes_of_gpus_then_the_least_of_them_then_what_comes_nearest() -> None:
    answers = [
        answer(30, 24),
        FAILED,
        answer(20, 24, gpus=2),
        answer(10, 24),
        answer(9, 80),
        answer(25, 24),
        answer(8, 24),
        answer(8, 24),
    ]
    found = ranking(answers)
    assert found.order == (6, 7, 3, 2, 4, 5, 0, 1)
    assert found.cheapest == 6


def test_as_asked_where_no_gpu_is_named_and_none_is_the_cheapest_where_none_fits() -> None:
    assert ranking([mixtral(), FAILED, mixtral()]).order == (0, 1, 2)
    assert ranking([mixtral()]).cheapest is None
    assert ranking([answer(90, 80), too_much()]).cheapest is None
    assert ranking([]).order == ()
