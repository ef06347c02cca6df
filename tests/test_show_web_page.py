"""The page in Chromium, as people use it: the form, an address, the keyboard, a phone; it shows what the command line
says.

`HFVRAM_SHOTS=FOLDER` keeps pictures of it, to be looked at.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from website import website

from hfvram.show.cli import main
from hfvram.show.layout import size
from hfvram.units import GiB

pytestmark = pytest.mark.slow
SECONDS = 60_000
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
FIGURES = {"peak-allocated": "peak_allocated_bytes", "peak-reserved": "peak_reserved_bytes", "device": "device_bytes"}


def or_skip(reason: str) -> None:
    """Continuous integration installs all of it: there it is a failure."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = shutil.which("chromium")
    if not path:
        or_skip("there is no chromium on this machine: apt-get install chromium")
    try:
        import gradio  # noqa: F401
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        or_skip(f"{error.name} is not installed: pip install 'hfvram[web]' playwright")
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def address(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with website(tmp_path_factory.mktemp("home")) as found:
        yield found


@pytest.fixture(scope="module")
def wide(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield context
    context.close()


@pytest.fixture
def page(wide: Any, address: str) -> Iterator[Any]:
    """A page of which nothing may go wrong, and that asks nobody else."""
    found = opened(wide, address)
    yield found
    found.close()


def opened(context: Any, address: str) -> Any:
    page = context.new_page()
    page.set_default_timeout(SECONDS)
    page.wrong = []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("request", lambda r: r.url.startswith((address, "data:", "blob:")) or page.wrong.append(r.url))
    return page


def field(page: Any, name: str) -> Any:
    return page.locator(f"#{name} input:not([type=range]), #{name} textarea").first


def shot(page: Any, name: str) -> None:
    if folder := os.environ.get("HFVRAM_SHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> dict[str, Any]:
    """What the command line says."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    capsys.readouterr()
    assert main([*args, "--json", "-q"]) in (0, 3)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def hold(page: Any, answer: dict[str, Any]) -> None:
    """The page's figures are the answer's."""
    for id_, key in FIGURES.items():
        shown = page.locator(f"#{id_}")
        assert int(shown.get_attribute("data-bytes")) == answer[key]
        number, unit = shown.inner_text().split()
        assert unit == "GiB"
        assert float(number) == pytest.approx(answer[key] / GiB, abs=0.006)


@pytest.mark.usefixtures("hf_home")
def test_a_question_in_the_form_is_answered_as_on_the_command_line(
    page: Any, address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page.goto(address)
    field(page, "model").fill("mistralai/Mixtral-8x7B")
    field(page, "ctx").fill("8k")
    field(page, "gpu").fill("H100")
    page.keyboard.press("Enter")
    page.click("#ask")
    page.wait_for_selector("#peak-allocated")
    answer = said(capsys, monkeypatch, "mistralai/Mixtral-8x7B", "--ctx", "8k", "--gpu", "H100 SXM 80GB")
    hold(page, answer)
    assert page.locator("#verdict").inner_text().startswith("Does not fit H100 SXM 80GB: ")
    ways = page.locator("table:has(caption:text('It fits with')) tr").all_inner_texts()
    assert [w.split("\t") for w in ways] == [[w["change"], size(w["device_bytes"])] for w in answer["fit"]["ways"]]
    page.wait_for_selector("#curve .js-plotly-plot")
    page.wait_for_function("location.search.includes('Mixtral')")
    shot(page, "wide")

    field(page, "ctx").fill("1000")
    page.click("#ask")
    page.wait_for_selector("#link[href*='ctx=1000']")
    hold(page, said(capsys, monkeypatch, "mistralai/Mixtral-8x7B", "--ctx", "1000", "--gpu", "H100 SXM 80GB"))
    assert page.wrong == []


@pytest.mark.usefixtures("hf_home")
def test_an_address_is_answered_without_a_click_and_the_link_restores_it(
    page: Any, wide: Any, address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page.goto(f"{address}/?model=gpt2")
    page.wait_for_selector("#peak-allocated")
    hold(page, said(capsys, monkeypatch, "gpt2"))
    options = ("mode=train", "method=formula", "ctx=512", "batch=4", "gradient-checkpointing=true", "gpu=24GB")
    page.goto(f"{address}/?model=Qwen/Qwen3-0.6B&{'&'.join(options)}")
    page.wait_for_selector("#peak-allocated")
    answer = said(capsys, monkeypatch, "Qwen/Qwen3-0.6B", *(f"--{o.removesuffix('=true')}" for o in options))
    hold(page, answer)
    shown = [field(page, name).input_value() for name in ("model", "ctx", "batch", "gpu", "more")]
    assert shown == ["Qwen/Qwen3-0.6B", "512", "4", "24GB", "--method formula --gradient-checkpointing"]
    page.wait_for_selector("#course .js-plotly-plot")
    named = page.locator("#course .annotation-text").all_text_contents()
    assert f"peak {size(answer['peak_allocated_bytes'])}" in named[-1] + named[-2]
    assert {"forward", "backward", "optimizer step"} <= set(named)
    shot(page, "training")
    again = opened(wide, address)
    again.goto(page.locator("#link").evaluate("a => a.href"))
    again.wait_for_selector("#peak-allocated")
    hold(again, answer)
    assert [field(again, name).input_value() for name in ("model", "ctx", "batch", "gpu", "more")] == shown
    again.close()
    assert page.wrong == []


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("model=nobody/nothing", "nobody/nothing"),
        ("model=/etc/hostname", "/etc/hostname' is no Hub id"),
        ("model=gpt2&ctx=many", "--ctx"),
        ("model=gpt2&colour=red", "--colour"),
        ("model=gpt2&gpu=H1000", "H1000"),
        ("model=<img src=x onerror=hacked=1>${hacked=1}", "<img src=x"),
    ],
)
def test_what_can_not_be_answered_is_a_sentence(page: Any, address: str, query: str, words: str) -> None:
    page.goto(f"{address}/?{query}")
    page.wait_for_selector("#error")
    assert words in page.locator("#error").inner_text()
    assert page.locator("#peak-allocated").count() == 0
    assert "Traceback" not in page.content()
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.wrong == []
    shot(page, "error")


def test_the_keyboard_alone_will_do(page: Any, address: str) -> None:
    page.goto(address)
    page.wait_for_selector("#ask")

    def focus(selector: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("s => !!document.activeElement.closest(s)", selector):
                return
        raise AssertionError(f"Tab never comes to {selector}")

    focus("#model")
    page.keyboard.type("gpt2")
    focus("#mode")
    focus("input[type=range][data-for=ctx]")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline not in ("none", "")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert field(page, "ctx").input_value() == "256"
    focus("#ask")
    page.keyboard.press("Enter")
    page.wait_for_selector("#link[href='?model=gpt2&ctx=256']")
    focus("#link")
    assert page.wrong == []


def test_on_a_phone_nothing_is_wider_than_the_screen_and_the_answer_is_in_sight(browser: Any, address: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = opened(context, address)
    page.goto(f"{address}/?model=mistralai/Mixtral-8x7B-v0.1&ctx=32k&gpu=24GB")
    page.wait_for_selector("#curve .js-plotly-plot")
    page.wait_for_function("document.querySelector('#verdict').getBoundingClientRect().top < innerHeight / 2")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    wide = "[...document.querySelectorAll('.answer *, #curve *')].filter(e => e.getBoundingClientRect().right > 391)"
    assert page.evaluate(f"{wide}.map(e => e.outerHTML.slice(0, 80))") == []
    assert page.evaluate("parseFloat(getComputedStyle(document.querySelector('#verdict')).fontSize)") >= 16
    shot(page, "phone")
    assert page.wrong == []
    context.close()


def test_while_a_simulation_runs_others_are_answered_and_it_can_be_cancelled(
    page: Any, wide: Any, address: str
) -> None:
    pytest.importorskip("transformers")
    page.goto(f"{address}/?model=Qwen/Qwen3-32B&mode=train&ctx=2048")
    page.wait_for_selector("#progress")
    page.wait_for_selector("#stop")
    other = opened(wide, address)
    other.goto(f"{address}/?model=gpt2&ctx=512")
    other.wait_for_selector("#peak-allocated")
    other.close()
    assert re.search(r"\d+ s", page.locator("#progress").inner_text())
    shot(page, "progress")
    start = time.monotonic()
    page.click("#stop button, button#stop")
    page.wait_for_selector("#progress:text('Cancelled')")
    assert time.monotonic() - start < 10
    assert page.locator("#peak-allocated").count() == 0
    assert page.wrong == []
