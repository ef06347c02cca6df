"""Answers for many: quick ones at once, slow ones in processes that end when they are told to, or took too long."""

import asyncio
import multiprocessing
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import hfvram
from hfvram.answer.estimate import Estimate
from hfvram.errors import HfvramError
from hfvram.request import Request
from hfvram.show.web import run
from hfvram.show.web.asked import Asked
from hfvram.show.web.run import Pictures, RecentModels, Runner, Step, Waiting, is_quick

MODEL = "Qwen/Qwen3-0.6B"
TRAIN = {"mode": "train", "method": "formula", "ctx": "512"}


@pytest.fixture(autouse=True)
def offline(hf_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


async def steps(answer: AsyncIterator[Step]) -> list[Step]:
    return [step async for step in answer if not isinstance(step, Waiting)]


def test_a_quick_answer_is_the_librarys_with_its_curve() -> None:
    found, pictures = asyncio.run(steps(Runner().answer(Asked(MODEL, {"ctx": "8k", "gpu": "24GB"}), "v")))
    assert found == hfvram.estimate(MODEL, ctx=8192, gpu="24GB")
    assert isinstance(pictures, Pictures)
    assert 8192 in [p.ctx for p in pictures.curve]


@pytest.mark.slow
def test_a_slow_answer_comes_from_a_process_and_is_the_librarys() -> None:
    found, first, second = asyncio.run(steps(Runner().answer(Asked(MODEL, TRAIN), "v")))
    assert found == hfvram.estimate(MODEL, mode="train", method="formula", ctx=512)
    assert isinstance(first, Pictures)
    assert isinstance(second, Pictures)
    assert first.curve
    assert second.course
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("options", [{}, pytest.param(TRAIN, marks=pytest.mark.slow)], ids=["quick", "slow"])
def test_a_failure_is_an_error_of_the_same_kind(options: dict[str, Any]) -> None:
    with pytest.raises(HfvramError, match="nobody/nothing") as raised:
        asyncio.run(steps(Runner().answer(Asked("nobody/nothing", options), "v")))
    assert raised.value.kind == "offline"


def endless(pipe: Any, asked: Asked) -> None:
    time.sleep(600)


def crashing(pipe: Any, asked: Asked) -> None:
    raise SystemExit(3)


@pytest.fixture
def forking(monkeypatch: pytest.MonkeyPatch) -> Runner:
    """A runner whose processes run what a test puts in the place of the work."""
    runner = Runner()
    monkeypatch.setattr(runner, "_context", multiprocessing.get_context("fork"))
    return runner


def test_what_is_stopped_ends_at_once(forking: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_send", endless)

    async def stopped() -> tuple[list[Step], float]:
        answer = asyncio.ensure_future(steps(forking.answer(Asked(MODEL, TRAIN), "v")))
        await asyncio.sleep(0.3)
        quick = await steps(forking.answer(Asked(MODEL), "another"))
        assert isinstance(quick[0], Estimate)
        start = time.monotonic()
        assert forking.stop("v")
        return await answer, time.monotonic() - start

    found, seconds = asyncio.run(stopped())
    assert (found, multiprocessing.active_children()) == ([], [])
    assert seconds < 2
    assert not forking.stop("v")


def test_who_asks_again_no_longer_waits_for_the_first(forking: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_send", endless)

    async def twice() -> list[list[Step]]:
        first = asyncio.ensure_future(steps(forking.answer(Asked(MODEL, TRAIN), "v")))
        await asyncio.sleep(0.3)
        second = await steps(forking.answer(Asked(MODEL), "v"))
        return [await first, second]

    first, second = asyncio.run(twice())
    assert first == []
    assert len(second) == 2


@pytest.mark.parametrize(("what", "words"), [(endless, "no answer within"), (crashing, "ended before")])
def test_what_never_answers_has_an_end(forking: Runner, monkeypatch: pytest.MonkeyPatch, what: Any, words: str) -> None:
    monkeypatch.setattr(run, "_send", what)
    monkeypatch.setattr(run, "LIMIT_SECONDS", 0.5)
    with pytest.raises(HfvramError, match=words):
        asyncio.run(steps(forking.answer(Asked(MODEL, TRAIN), "v")))
    assert not multiprocessing.active_children()


def test_what_could_be_slow_is_not_quick() -> None:
    for options, quick in (
        ({}, True),
        ({"ctx": "1m", "gpu": "24GB", "quant": "nf4", "engine": "vllm"}, True),
        ({"mode": "train"}, False),
        ({"method": "simulate"}, False),
        ({"cache": "quantized"}, False),
        ({"requests": "1000000x8"}, False),
    ):
        asked = Asked("a/b", options)
        assert is_quick(asked, Request.from_dict(options)) is quick, options


def test_recent_models_are_few_and_not_old(monkeypatch: pytest.MonkeyPatch) -> None:
    recent = RecentModels()
    first = recent.session("a")
    assert recent.session("a") is first
    for i in range(recent.MOST):
        recent.session(f"b{i}")
    assert recent.session("a") is not first
    again = recent.session("a")
    later = time.monotonic() + 301
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert recent.session("a") is not again
