"""The course of a training step: by hand, and against the estimate and the other engine."""

from itertools import pairwise
from pathlib import Path

import pytest
from estimates import llama_folder

from hfvram.answer.course import course, course_of
from hfvram.answer.question import Session
from hfvram.memory.timeline import Standing, Tag, Timeline
from hfvram.request import Request

MB = 1 << 20


def by_hand() -> Timeline:
    """Two steps: 100 MB of weights, 30 of activations, 50 of gradients; then 7 of states."""
    t = Timeline(Standing(((100 * MB, Tag("weights", "weights")),)))
    for first in (True, False):
        t.mark("forward")
        saved = t.alloc(30 * MB, Tag("saved", "activations"))
        t.mark("backward")
        gradient = t.alloc(50 * MB, Tag("gradient", "gradients"))
        t.free(saved)
        t.mark("optimizer step")
        if first:
            t.alloc(7 * MB, Tag("states", "optimizer"))
        t.moment(Tag("step", "activations"), 1 * MB)
        t.free(gradient)
    t.mark("end")
    return t


def test_the_step_of_the_peak_moment_by_moment() -> None:
    c = course(by_hand())
    assert c.categories == ("weights", "activations", "gradients", "optimizer")
    rows = [[count // MB for count in row] for row in c.live_bytes]
    assert rows == [[100] * 6, [30, 30, 0, 1, 0, 0], [0, 50, 50, 50, 50, 0], [7] * 6]
    assert c.phases == ((0, "forward"), (1, "backward"), (3, "optimizer step"))
    assert (c.peak, c.peak_phase, c.peak_category) == (1, "backward", "weights")


def test_a_long_step_keeps_its_fullest_moments() -> None:
    t = Timeline(Standing(()))
    t.mark("forward")
    for i in range(3000):
        t.moment(Tag("x", "activations"), (i + 1) * 2 * MB)
    t.mark("end")
    c = course(t)
    (row,) = c.live_bytes
    assert 300 < len(row) <= 400
    assert all(a < b for a, b in pairwise(row))
    assert row[c.peak] == max(row) == 6000 * MB


@pytest.mark.parametrize(
    "options", [{"mode": "train"}, {"mode": "lora", "grad_accum": 2}, {"mode": "train", "zero": 2, "gpus": 2}]
)
def test_the_peak_is_the_estimates(options: dict[str, object], tmp_path: Path) -> None:
    session, path = Session(), llama_folder(tmp_path)
    request = Request(method="formula", **options)  # type: ignore[arg-type]
    e = session.estimate(path, request)
    c = course_of(session.model(path, request), e.request)
    assert c
    rounding = sum(i.bytes for i in e.items if i.category == "rounding")
    assert sum(row[c.peak] for row in c.live_bytes) == e.peak_allocated_bytes - rounding
    assert c.peak_phase == e.peak_phase
    for category, row in zip(c.categories, c.live_bytes, strict=True):
        assert row[c.peak] == sum(i.bytes for i in e.items if i.category == category)


def test_inference_has_no_step(tmp_path: Path) -> None:
    session, path = Session(), llama_folder(tmp_path)
    assert course_of(session.model(path, Request()), session.estimate(path, Request()).request) is None


@pytest.mark.slow
def test_the_models_own_code_has_the_same_course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    session, path = Session(), llama_folder(tmp_path)
    found = []
    for method in ("formula", "simulate", "simulate"):
        request = Request(mode="train", ctx=64, method=method)
        c = course_of(session.model(path, request), session.estimate(path, request).request)
        assert c
        found.append(c)
        if method == "simulate":
            monkeypatch.setattr("hfvram.answer.course.run", None)  # the second time nothing runs
    formula, simulated, kept = found
    assert simulated == kept
    assert [name for _, name in formula.phases] == [name for _, name in simulated.phases]
    peaks = [sum(row[c.peak] for row in c.live_bytes) for c in (formula, simulated)]
    assert peaks[0] == pytest.approx(peaks[1], rel=0.001)
