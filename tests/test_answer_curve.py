"""Memory over the context: points are estimates, to the byte."""

from pathlib import Path

from estimates import llama_folder

import hfvram
from hfvram.answer.curve import contexts, curve_of
from hfvram.answer.question import Session
from hfvram.request import Request


def test_points_are_what_is_estimated_at_that_context(tmp_path: Path) -> None:
    session, path = Session(), llama_folder(tmp_path)
    asked = Request(ctx=3000, batch=2)
    points = curve_of(session.model(path, asked), session.estimate(path, asked).request)
    lengths = [p.ctx for p in points]
    assert lengths == sorted({*lengths, 256, 384, 3000, 16384})
    for p in points[::4]:
        e = hfvram.estimate(path, ctx=p.ctx, batch=2)
        assert p.device_bytes == e.device_bytes
        assert sum(n for _, n in p.live_bytes) == e.peak_allocated_bytes
        assert sum(n for _, n in p.parts) == e.device_bytes
        assert dict(p.live_bytes)["cache"] == sum(i.bytes for i in e.items if i.category == "cache")


def test_training_has_a_curve_by_formula_whichever_engine_answers(tmp_path: Path) -> None:
    session, path = Session(), llama_folder(tmp_path)
    model = session.model(path, Request())
    request = session.estimate(path, Request(mode="train", method="formula")).request
    assert curve_of(model, request) == curve_of(model, request.with_(method="simulate"))
    assert [p.ctx for p in curve_of(model, request)] == [256 << n for n in range(7)]


def test_no_curve_where_the_context_is_not_the_question(tmp_path: Path) -> None:
    session, path = Session(), llama_folder(tmp_path)
    for options in ({"method": "guide"}, {"engine": "vllm", "gpu": "H100"}):
        request = Request(**options)
        assert curve_of(session.model(path, request), session.estimate(path, request).request) == ()


def test_contexts_of_a_model_with_a_short_limit_or_asked_beyond_it() -> None:
    assert contexts(100, 128, halves=True) == [100, 128]
    assert contexts(2048, 1024, halves=False) == [256, 512, 1024, 2048]
