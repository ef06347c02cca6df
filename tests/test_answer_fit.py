"""Fit against stand-in estimates whose limits are known by hand, with the allocator's staircase and without."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfvram.answer.fit import MOST_RUNS, judge, largest
from hfvram.answer.gpus import Gpu
from hfvram.errors import HfvramError
from hfvram.request import Request

KB = 1000


def straight(request: Request) -> int:
    """1,000 kB of weights (halved by int8, quartered by nf4), 1 kB a token and sequence."""
    weights = {"int8": 500, "nf4": 250}.get(request.quant, 1000)
    return (weights + (request.ctx or 0) * request.batch) * KB


def gpu(kb: int) -> Gpu:
    return Gpu("test", kb * KB)


def test_what_fits_has_headroom_and_limits_exact_to_the_token() -> None:
    fit = judge(straight, Request(ctx=1000), gpu(5_500))
    assert (fit.fits, fit.headroom_bytes, fit.max_ctx, fit.max_batch, fit.ways) == (True, 3_500 * KB, 4500, 4, ())


def test_the_context_is_searched_up_to_the_models_own_limit_or_the_one_asked() -> None:
    assert judge(straight, Request(ctx=1000), gpu(5_500), max_positions=2048).max_ctx == 2048
    assert judge(straight, Request(ctx=4000), gpu(5_500), max_positions=2048).max_ctx == 4000


def test_what_does_not_fit_still_has_limits() -> None:
    fit = judge(straight, Request(ctx=4096), gpu(3_000))
    assert (fit.fits, fit.headroom_bytes, fit.max_ctx, fit.max_batch) == (False, -2_096 * KB, 2000, 0)


def test_nothing_fits() -> None:
    fit = judge(straight, Request(ctx=4096), gpu(200))
    assert (fit.fits, fit.max_ctx, fit.max_batch, fit.ways) == (False, 0, 0, ())


def test_ways_each_fit_by_the_estimate_itself_mildest_first() -> None:
    # 1000 + 1050 = 2050 kB of 2000: ctx 1000 costs 5 %; int8 takes 1550, nf4 1300
    fit = judge(straight, Request(ctx=1050), gpu(2_000))
    assert [(w.change, w.device_bytes // KB) for w in fit.ways] == [
        ("--ctx 1000", 2000),
        ("--quant int8", 1550),
        ("--quant nf4", 1300),
    ]


def test_a_pair_is_listed_only_where_neither_change_is_enough() -> None:
    # 250 + 4096 never fits 900; ctx alone never (1000 of weights): int8 leaves 400 tokens, nf4 650
    fit = judge(straight, Request(ctx=4096), gpu(900))
    assert {(w.change, w.device_bytes // KB) for w in fit.ways} == {
        ("--ctx 400 --quant int8", 900),
        ("--ctx 650 --quant nf4", 900),
    }


def test_a_batch_is_reduced_before_the_context() -> None:
    fit = judge(straight, Request(ctx=1000, batch=8), gpu(5_000))
    assert [w.change for w in fit.ways][:2] == ["--batch 4", "--ctx 500"]


def test_a_change_that_makes_no_sense_for_the_model_is_left_out() -> None:
    def quantized_already(request: Request) -> int:
        if request.quant != "auto":
            raise HfvramError("usage", "quantized already")
        return straight(request)

    assert [w.change for w in judge(quantized_already, Request(ctx=1050), gpu(2_000)).ways] == ["--ctx 1000"]


def test_slow_choices_are_undone_first() -> None:
    def eager(request: Request) -> int:
        return straight(request) + (5_000 * KB if request.attention == "eager" else 0)

    ways = judge(eager, Request(ctx=1000, attention="eager"), gpu(2_000)).ways
    assert ways[0].change == "--attention sdpa"


def test_new_tokens_shrink_with_the_context() -> None:
    seen: list[Request] = []

    def watched(request: Request) -> int:
        seen.append(request)
        return straight(request)

    assert judge(watched, Request(ctx=512, new_tokens=256), gpu(1_001)).max_ctx == 1
    assert all(r.new_tokens is None if r.ctx == 1 else 0 < (r.new_tokens or 0) < (r.ctx or 0) for r in seen)


@given(
    weights=st.integers(0, 2**36),
    slope=st.integers(1, 2**22),
    square=st.integers(0, 9),
    stair=st.sampled_from([1, 512, 2 << 20, 20 << 20]),
    capacity=st.integers(2**20, 2**37),
    start=st.integers(1, 2**17),
    most=st.integers(1, 10**9),
)
def test_largest_is_exact_and_takes_few_evaluations(
    weights: int, slope: int, square: int, stair: int, capacity: int, start: int, most: int
) -> None:
    calls = 0

    def taken(n: int) -> int:
        nonlocal calls
        calls += 1
        return -(-(weights + slope * n + square * n * n) // stair) * stair

    found = largest(taken, capacity, start, most)
    assert calls < 110
    assert 0 <= found <= most
    assert found == 0 or taken(found) <= capacity
    assert found == most or taken(found + 1) > capacity


def test_a_request_without_ctx_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="ctx"):
        judge(straight, Request(), gpu(1))


def test_ways_to_train_are_few_runs_the_mildest_first() -> None:
    asked: list[Request] = []

    def needed(r: Request) -> int:
        asked.append(r)
        full = {"train": 80, "lora": 30, "qlora": 20}[r.mode]
        return full - 10 * r.gradient_checkpointing - 20 * (r.optimizer == "adamw_8bit" and r.mode == "train")

    request = Request(mode="train", ctx=4096)
    fit = judge(needed, request, Gpu("48", 48), max_positions=8192)
    assert [way.change for way in fit.ways] == ["--mode lora", "--mode qlora"]
    assert (fit.max_ctx, fit.max_batch) == (None, None)  # each step of a search would take seconds
    assert len(asked) <= 1 + MOST_RUNS
    assert asked[1:4] == [
        request.with_(gradient_checkpointing=True),
        request.with_(optimizer="adamw_8bit"),
        request.with_(gradient_checkpointing=True, optimizer="adamw_8bit"),
    ]


def test_layers_that_are_not_recomputed_are_offered_to_be() -> None:
    request = Request(mode="lora", ctx=4096, gradient_checkpointing=True, checkpoint_every=4)
    fit = judge(lambda r: 10 * r.checkpoint_every, request, Gpu("20", 20), max_positions=8192)
    assert fit.ways[0].change == "--checkpoint-every 1"


def sharded(request: Request) -> int:
    """10,000 kB of states, which sharding divides by the GPUs and offloading takes away; 1 kB a token."""
    if "params" in request.offload or "optimizer" in request.offload:
        states = 1_000
    else:
        states = 10_000 // (request.gpus or 1) if request.fsdp or request.zero == 3 else 10_000
    return (states + (request.ctx or 0) // (8 if request.gradient_checkpointing else 1)) * KB


def train(**options: object) -> Request:
    return Request.from_dict({"mode": "train", "ctx": 256, "method": "formula", **options})


def test_ways_of_several_gpus() -> None:
    changes = [w.change for w in judge(sharded, train(gpus=4), gpu(3_000)).ways]
    assert changes[:2] == ["--fsdp full_shard", "--zero 3"]
    assert not any("--gpus 8 --fsdp" in change for change in changes)  # 4 are enough
    changes = [w.change for w in judge(sharded, train(gpus=4, fsdp="full_shard"), gpu(1_600)).ways]
    assert changes == ["--offload params", "--gpus 8"]
    changes = [w.change for w in judge(sharded, train(gpus=2, zero=3), gpu(1_600)).ways]
    assert changes[:2] == ["--offload optimizer", "--offload optimizer,params"]
    changes = [w.change for w in judge(sharded, train(), gpu(5_500)).ways]
    assert changes[0] == "--gpus 2 --fsdp full_shard"


def test_layers_over_several_gpus_are_a_way() -> None:
    def split(request: Request) -> int:
        return (10_000 // request.tp + (request.ctx or 0)) * KB

    changes = [w.change for w in judge(split, train(gpus=4), gpu(3_000)).ways]
    assert "--tp 4" in changes
    assert not any("--tp 2" in change for change in changes)  # 5,256 kB
    changes = [w.change for w in judge(split, train(gpus=8), gpu(3_000)).ways]
    assert changes[0] == "--tp 4 --fsdp full_shard"
    inference = Request(ctx=256, gpus=4, quant="none")
    assert "--tp 4" in [w.change for w in judge(split, inference, gpu(3_000)).ways]
    seen: list[Request] = []

    def watched(request: Request) -> int:
        seen.append(request)
        return split(request)

    judge(watched, train(gpus=6, offload=["activations"]), gpu(3_000))
    assert not any(r.tp > 1 for r in seen)


def test_what_the_exact_engine_cannot_run_is_no_way() -> None:
    seen: list[Request] = []

    def watched(request: Request) -> int:
        seen.append(request)
        return sharded(request)

    judge(watched, train(gpus=4, method="simulate"), gpu(2_000))
    assert len(seen) > 3
    assert not any(r.zero or r.offload for r in seen)


def test_three_changes_where_no_two_are_enough() -> None:
    def stubborn(request: Request) -> int:
        saved = 3_000 * (request.gradient_checkpointing + ("optimizer" in request.offload) + (request.ctx == 1024))
        return (10_000 - saved) * KB

    request = train(gpus=4, zero=3, ctx=4096)
    assert "--ctx 1024 --gradient-checkpointing --offload optimizer" in [
        w.change for w in judge(stubborn, request, gpu(2_000)).ways
    ]
    assert judge(stubborn, request, gpu(4_500)).ways[0].change == "--gradient-checkpointing --offload optimizer"
