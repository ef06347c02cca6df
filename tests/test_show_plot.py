"""Pictures: that they are files of their kind, hold what they should, and can't be broken by a name."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from estimates import llama_folder, mixtral, roomy, too_much

from hfvram.answer.course import course_of
from hfvram.answer.curve import curve_of
from hfvram.answer.question import Session
from hfvram.errors import HfvramError
from hfvram.request import Request
from hfvram.show.cli import main
from hfvram.show.plot import COLOURS, Picture, check, drawn

pytestmark = pytest.mark.slow
pytest.importorskip("matplotlib")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def training(tmp_path: Path) -> Picture:
    session, path = Session(), llama_folder(tmp_path)
    request = Request(mode="train", method="formula", gpu="24GB")
    e, model = session.estimate(path, request), session.model(path, request)
    return Picture(("llama",), (e,), curve_of(model, e.request), course_of(model, e.request))


def texts(picture: Picture, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text in a picture, which a font of paths would hide."""
    monkeypatch.setitem(__import__("matplotlib").rcParams, "svg.fonttype", "none")
    svg = ET.fromstring(drawn(picture, "svg"))
    return [" ".join("".join(t.itertext()).split()) for t in svg.iter("{http://www.w3.org/2000/svg}text")]


def test_all_panels_with_their_figures(training: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    e = training.estimates[0]
    said = texts(training, monkeypatch)
    for words in ("Memory over the context", "A training step", "forward", "backward", "optimizer step", "weights"):
        assert words in said
    assert any(words.startswith(f"peak, in {e.peak_phase}: ") for words in said)
    assert any(words.startswith("24GB, 22.4 GiB") for words in said)
    assert any(words.startswith("4,096 tokens: ") for words in said)


def test_one_answer_without_curve_and_several_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    said = texts(Picture(("Mixtral",), (too_much(),)), monkeypatch)
    assert "Memory over the context" not in said
    assert any("does not fit" in words for words in said)
    several = texts(Picture(("one", "two"), (too_much(), roomy())), monkeypatch)
    assert {"one", "two", "GPU memory of 2 requests"} <= set(several)


def test_each_kind_of_file_is_what_it_says_and_twice_the_same(training: Picture) -> None:
    for kind, start in (("png", PNG), ("svg", b"<?xml"), ("html", b"<!doctype html>")):
        data = drawn(training, kind)
        assert data.startswith(start)
        assert data == drawn(training, kind)
    assert b"20" + b"26-" not in drawn(training, "svg")
    assert b'role="img" aria-label="GPU memory. llama: ' in drawn(training, "html")


def test_a_name_is_text_and_nothing_else() -> None:
    evil = "a$\\frac{1}{0}$<script>\x1b\u4e00" + "x" * 300
    e = replace(mixtral(), model=replace(mixtral().model, id=evil))
    for kind in ("png", "svg", "html"):
        assert kind == "png" or b"<script>" not in drawn(Picture((evil, evil), (e, e)), kind)
        assert drawn(Picture((evil,), (e,)), kind)


def test_every_category_has_a_colour_of_its_own() -> None:
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_the_command_line_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = llama_folder(tmp_path), tmp_path / "out.PNG"
    assert main([folder, "--gpu", "24GB", "--plot", str(file), "--json"]) == 0
    assert file.read_bytes().startswith(PNG)
    assert capsys.readouterr().out.startswith("{")
    grid = tmp_path / "grid.svg"
    assert main([folder, "--ctx", "1k,2k", "--plot", str(grid)]) == 0
    assert ET.parse(grid)


@pytest.mark.parametrize(
    ("file", "code", "words"), [("x.pdf", 2, ".png, .svg, .html"), ("png", 2, ".png"), ("no/such/x.png", 1, "can't be")]
)
def test_what_can_t_be_drawn_is_one_line(
    file: str, code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([llama_folder(tmp_path), "--plot", str(tmp_path / file)]) == code
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfvram.show.plot.find_spec", lambda name: None)
    with pytest.raises(HfvramError, match=r"pip install 'hfvram\[plot\]'") as raised:
        check("x.png")
    assert raised.value.kind == "missing_extra"


def test_nothing_of_matplotlib_is_loaded_without_need(tmp_path: Path) -> None:
    code = f"""
import sys
from hfvram.show.cli import main
main([{llama_folder(tmp_path)!r}, "-q"])
import hfvram.show.plot
print(sorted({{"matplotlib", "numpy", "PIL"}} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert done.stderr == "[]\n"
