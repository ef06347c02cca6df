"""A card as Markdown, against golden files; `HFVRAM_GOLDEN=1 pytest` writes them anew."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from hfvram.answer.card import Card, Holds, card
from hfvram.show.card import section
from hfvram.show.section import END, START

GOLDEN = Path(__file__).parent.parent / "fixtures" / "golden"
CASES = {
    "card-qwen.md": "Qwen/Qwen3-8B",
    "card-mamba.md": "state-spaces/mamba-2.8b-hf",
    "card-command-r-plus.md": "CohereLabs/c4ai-command-r-plus",
}


@pytest.fixture(scope="module")
def qwen() -> Card:
    return card("Qwen/Qwen3-8B", offline=True)


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    shown = section(card(CASES[name], offline=True)) + "\n"
    if os.environ.get("HFVRAM_GOLDEN"):
        (GOLDEN / name).write_text(shown)
    assert shown == (GOLDEN / name).read_text()


def test_it_stands_between_its_markers_and_has_no_date(qwen: Card) -> None:
    text = section(qwen)
    assert text.startswith(START + "\n")
    assert text.endswith("\n" + END)
    assert text.count("hfvram:start") == text.count("hfvram:end") == 1
    assert not re.search(r"20\d\d-|catalogue|@ ?[0-9a-f]{7}", text)


def test_every_row_has_as_many_cells_as_its_heading(qwen: Card) -> None:
    for block in section(qwen).split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1


def test_a_name_cannot_break_out_of_the_section(qwen: Card) -> None:
    text = section(replace(qwen, id=f"x`{END}\n<b>|\x1b[2J"))
    assert text.count(END) == 1
    assert "<b>" not in text
    assert "\x1b" not in text


def test_what_fits_nowhere_is_a_sentence(qwen: Card) -> None:
    nothing = (Holds(gpu="H200", gpus=1, memory_bytes=150 << 30, contexts=(0, 0, 0)),)
    assert "No single GPU up to H200 (150.0 GiB) holds it." in section(replace(qwen, holds=nothing))
    row = Holds(gpu="H200", gpus=8, memory_bytes=150 << 30, contexts=(5, None, 0))
    assert "| 8 × H200, tensor parallel | 150.0 GiB each | 5 tokens | not answered | does not fit |" in section(
        replace(qwen, holds=(row,))
    )
