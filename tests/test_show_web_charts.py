"""The pictures draw the estimate's own figures, and name the peak."""

from pathlib import Path
from typing import Any

import pytest
from estimates import llama_folder

from hfvram.answer.course import course_of
from hfvram.answer.curve import curve_of
from hfvram.answer.question import Session
from hfvram.request import Request
from hfvram.show.layout import size
from hfvram.show.web import charts
from hfvram.units import GiB

pytest.importorskip("plotly")
pytestmark = pytest.mark.slow


def drawn(path: Path, **options: Any) -> tuple[Any, Any, Any]:
    session, folder, request = Session(), llama_folder(path), Request.from_dict(options)
    e = session.estimate(folder, request)
    model = session.model(folder, request)
    found = course_of(model, e.request)
    return e, charts.curve(e, curve_of(model, e.request)), found and charts.course(e, found)


def test_the_curve_has_the_context_asked_for_and_the_gpu(tmp_path: Path) -> None:
    e, curve, course = drawn(tmp_path, ctx=3000, gpu="1GB")
    assert course is None
    by_name = {trace.name: trace for trace in curve.data}
    line = by_name["on the device"]
    assert dict(zip(line.x, line.y, strict=True))[3000] == e.device_bytes / GiB
    assert {"weights", "cache", "activations"} <= set(by_name)
    assert [a.text for a in curve.layout.annotations] == [f"1GB: {size(e.fit.capacity_bytes)}"]


def test_a_training_step_has_its_phases_and_its_peak_by_name(tmp_path: Path) -> None:
    e, _, course = drawn(tmp_path, mode="train", method="formula", ctx=512)
    said = [a.text for a in course.layout.annotations]
    assert said[:4] == ["forward", "backward", "clipping", "optimizer step"]
    assert said[4].startswith(f"peak {size(e.peak_allocated_bytes)}<br>{e.peak_phase}")
    peak = course.data[-1]
    areas = [t.y for t in course.data if t.stackgroup]
    assert peak.y[0] == pytest.approx(max(map(sum, zip(*areas, strict=True))))
    assert 0 <= e.peak_allocated_bytes / GiB - peak.y[0] < 0.001  # but for the allocator's rounding


def test_a_name_is_no_markup(tmp_path: Path) -> None:
    assert charts._plain('<a href="x">&') == '&lt;a href="x">&amp;'
