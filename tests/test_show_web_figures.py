"""An answer as HTML: the figures of the estimate, ways as links, and nothing of a stranger's as markup."""

import re
from dataclasses import replace
from html.parser import HTMLParser

from estimates import mixtral, too_much

from hfvram.answer.estimate import Way
from hfvram.errors import HfvramError
from hfvram.show.web import figures
from hfvram.show.web.asked import Asked
from hfvram.show.web.run import Waiting
from hfvram.units import GiB

NASTY = "<img src=x onerror=alert(1)>\"'&${alert(2)}{{x}}"
ASKED = Asked("mistralai/Mixtral-8x7B-v0.1", {"ctx": "8192", "gpu": "24GB"})


class Tags(HTMLParser):
    """Every element, by its id where it has one, with the text in it; and every tag's name and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str | None] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("br", "img", "input"):
            self._open.append(dict(attrs).get("id"))

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for id_ in filter(None, self._open):
            self.found[id_] = self.found.get(id_, "") + data


def test_the_main_figures_are_the_estimates() -> None:
    e = mixtral()
    page = Tags(figures.answer(e, ASKED))
    exact = {a["id"]: a["data-bytes"] for _, a in page.tags if "data-bytes" in a}
    expected = {
        "device": e.device_bytes,
        "peak-reserved": e.peak_reserved_bytes,
        "peak-allocated": e.peak_allocated_bytes,
    }
    assert exact == {k: str(v) for k, v in expected.items()}
    for id_, count in expected.items():
        number, unit = page.found[id_].split()
        assert unit == "GiB"
        assert abs(float(number) - count / GiB) <= 0.005
    assert page.found["verdict"]
    assert "error" not in page.found


def test_ways_are_links_where_the_page_has_their_options() -> None:
    e = too_much()
    assert e.fit
    ways = (Way(change="--quant nf4", device_bytes=5), Way(change="--max-model-len 512", device_bytes=6))
    e = replace(e, fit=replace(e.fit, ways=ways))
    html = figures.answer(e, ASKED)
    links = re.findall(r'<a href="\?([^"]*)"><code>', html)
    asked = "model=mistralai/Mixtral-8x7B-v0.1&amp;ctx=8192"
    assert links == [f"{asked}&amp;gpu=24GB&amp;quant=nf4", f"{asked}&amp;gpu=H100+NVL+94GB"]
    assert "<code>--max-model-len 512</code>" in html


def test_what_a_stranger_wrote_is_text() -> None:
    e = too_much()
    clean = [tag for tag, _ in Tags(figures.answer(e, ASKED)).tags]
    assert e.fit
    nasty = replace(
        e,
        model=replace(e.model, id=NASTY, architecture=NASTY, layer_kinds={NASTY: 32}, commit=NASTY, source=NASTY),
        items=tuple(replace(i, name=NASTY + i.name, formula=NASTY) for i in e.items),
        fit=replace(e.fit, gpu=NASTY),
        warnings=tuple(NASTY for _ in e.warnings),
        peak_phase=NASTY,
    )
    dirty = Tags(figures.answer(nasty, Asked(NASTY, {"gpu": NASTY}))).tags
    assert [tag for tag, _ in dirty] == clean
    assert not [a for _, a in dirty if "onerror" in a]
    for html in (figures.failure(HfvramError("usage", NASTY)), figures.progress(Waiting(1, False), Asked(NASTY))):
        assert [tag for tag, _ in Tags(html).tags] == ["p"]


def test_an_error_is_a_sentence() -> None:
    page = Tags(figures.failure(HfvramError("not_found", "there is no model a/b")))
    assert page.found == {"error": "there is no model a/b"}
