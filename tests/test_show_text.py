"""What the renderers print, against golden files; `HFVRAM_GOLDEN=1 pytest` writes them anew."""

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path

import pytest
from estimates import llama_folder, mamba, mixtral, roomy, too_much

from hfvram.answer.estimate import Estimate, LiveTensor, Offloaded
from hfvram.answer.question import Session
from hfvram.errors import HfvramError
from hfvram.request import Request
from hfvram.show.bar import bar
from hfvram.show.csv import csv
from hfvram.show.explain import explain
from hfvram.show.json import dumps
from hfvram.show.layout import coloured, plain
from hfvram.show.markdown import markdown
from hfvram.show.table import Row, table
from hfvram.show.table import markdown as markdown_table
from hfvram.show.text import text
from hfvram.units import GiB

GOLDEN = Path(__file__).parent.parent / "fixtures" / "golden"
ROWS = [
    Row("mistralai/Mixtral-8x7B", {"quant": "none"}, roomy()),
    Row("mistralai/Mixtral-8x7B", {"quant": "nf4"}, too_much()),
    Row("no/such-model-anywhere", {"quant": "none"}, HfvramError("not_found", "no such repo")),
]


def with_tensors() -> Estimate:
    path = "model.layers.31.block_sparse_moe.experts.down_proj_with_a_name_that_is_long"
    head = LiveTensor(
        path="lm_head",
        what="weights",
        category="weights",
        operator="",
        shape=(32000, 4096),
        dtype="bf16",
        bytes=262_144_000,
        count=1,
    )
    saved = LiveTensor(
        path=path,
        what="saved activations",
        category="activations",
        operator="mm",
        shape=(16368, 4096),
        dtype="bf16",
        bytes=134_086_656,
        count=32,
    )
    workspace = LiveTensor(
        path="",
        what="cuBLAS workspace",
        category="workspace",
        operator="",
        shape=(),
        dtype="",
        bytes=33_554_432,
        count=2,
    )
    return replace(too_much(), largest_tensors=(head, saved, workspace))


def offloaded() -> Estimate:
    """Mixtral, its weights in CPU memory, and something on NVMe."""
    states = Offloaded(
        name="optimizer states: first moment",
        category="optimizer",
        place="cpu",
        bytes=20 * GiB,
        formula="P·4÷n",
        source="DeepSpeed 0.18: stage_1_and_2.py",
        certainty="derived",
    )
    more = replace(states, name="pinned buffers", bytes=3 * GiB, formula="", certainty="guess")
    away = replace(states, name="parameters", category="weights", place="nvme", bytes=7 * GiB, formula="P·2÷n")
    return replace(too_much(), offloaded=(states, away, more), cpu_bytes=23 * GiB, nvme_bytes=7 * GiB)


def hundred() -> Estimate:
    """A hundred items and a name as long as the Hub allows."""
    e = mixtral()
    many = tuple(replace(e.items[0], name=f"component {i}: weights", bytes=(100 - i) ** 4 * 1000) for i in range(100))
    peak = sum(i.bytes for i in many)
    model = replace(e.model, id="organisation-" + "x" * 80 + "/model-" + "y" * 88)
    sizes = {"peak_allocated_bytes": peak, "peak_reserved_bytes": peak, "device_bytes": peak + GiB}
    return replace(e, model=model, items=many, **sizes)


CASES = {
    "mixtral-80.txt": lambda: text(mixtral(), 80),
    "mixtral-120.txt": lambda: text(mixtral(), 120),
    "too-much-80.txt": lambda: text(too_much(), 80),
    "roomy-120.txt": lambda: text(roomy(), 120),
    "mamba-80.txt": lambda: text(mamba(), 80),
    "explain-80.txt": lambda: explain(too_much(), 80),
    "explain-tensors-80.txt": lambda: explain(with_tensors(), 80),
    "offloaded-80.txt": lambda: text(offloaded(), 80),
    "offloaded-explain.txt": lambda: explain(offloaded(), 80),
    "offloaded.md": lambda: markdown(offloaded()),
    "mixtral.md": lambda: markdown(too_much()),
    "mixtral.json": lambda: dumps(too_much().to_dict()),
    "bar-80.txt": lambda: "\n".join(bar(too_much(), 80, plain) + bar(roomy(), 80, plain) + bar(mamba(), 80, plain)),
    "bar-120.txt": lambda: "\n".join(bar(too_much(), 120, plain) + bar(roomy(), 120, plain)),
    "hundred-80.txt": lambda: text(hundred(), 80, drawn=True),
    "table-80.txt": lambda: table(ROWS, 80),
    "table-120.txt": lambda: table(ROWS, 120),
    "table.md": lambda: markdown_table(ROWS),
    "table.csv": lambda: csv(ROWS),
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    shown = CASES[name]() + "\n"
    if os.environ.get("HFVRAM_GOLDEN"):
        (GOLDEN / name).write_text(shown)
    assert shown == (GOLDEN / name).read_text()


@pytest.mark.parametrize("estimate", [mixtral(), too_much(), roomy(), mamba(), with_tensors(), offloaded(), hundred()])
@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal(estimate: Estimate, width: int) -> None:
    for shown in (text(estimate, width, drawn=True), explain(estimate, width)):
        assert max(map(len, shown.splitlines())) <= width


def test_the_first_command_prints_what_readme_promises() -> None:
    shown = text(mixtral(), 80)
    for figure in ("46,702,792,704 parameters", "(12.88 B active)", "87.0 GiB", "1.0 GiB"):
        assert figure in shown


def test_colours_change_nothing_but_colours_and_add_a_bar() -> None:
    shown = text(too_much(), 80, coloured)
    bare = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    blocks = bare.split("\n\n")
    (drawn,) = [block for block in blocks if block.startswith("█")]
    assert len(drawn.splitlines()[0]) == 80
    assert "\n\n".join(block for block in blocks if block != drawn) == text(too_much(), 80)
    assert "\x1b" in shown


@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
@pytest.mark.parametrize("width", [80, 120])
def test_on_a_terminal_there_is_a_bar_with_and_without_colours(env: dict[str, str], width: int, tmp_path: Path) -> None:
    """A real terminal: what a process prints there."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    code = "import sys; from hfvram.show.cli import main; sys.exit(main())"
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    command = [sys.executable, "-c", code, llama_folder(tmp_path), "-q", "--gpu", "24GB"]
    done = subprocess.Popen(command, stdout=slave, stderr=slave, env={**clean, "TERM": "xterm", **env})
    os.close(slave)
    said = b""
    while True:
        try:
            piece = os.read(master, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        said += piece
    os.close(master)
    assert done.wait() == 0
    shown = said.decode().replace("\r\n", "\n")
    assert ("\x1b" in shown) is (not env)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    assert max(map(len, lines)) <= width
    bars = [line for line in lines if re.fullmatch(r"[█░]+|[A-Za-z.-]+", line) and len(line) == width]
    assert len(bars) == 1
    assert ("█" in bars[0]) is (not env)


def test_names_from_a_configuration_cannot_steer_the_terminal() -> None:
    evil = "x\x1b[2J\x9b\u202e|<b>\n"
    e = replace(mixtral(), model=replace(mixtral().model, id=evil, architecture=evil, model_type=evil))
    for shown in (text(e, 80), explain(e, 80), markdown(e), dumps(e.to_dict()), csv([Row(evil, {}, e)])):
        assert all(c.isprintable() or c == "\n" for c in shown)
    assert "<b>" not in markdown(e)


def test_folded_items_still_add_up() -> None:
    assert "smaller" in text(mamba(), 80)
    assert sum(i.bytes for i in mamba().items) == mamba().peak_allocated_bytes


def test_a_serving_engines_pool_is_told_in_text_and_markdown() -> None:
    asked = Request(engine="vllm", gpu="H100", ctx=8192)
    e = Session().estimate("meta-llama/Llama-3.1-8B-Instruct", asked, offline=True)
    for shown in (text(e, 100), markdown(e)):
        assert "131,072 B" in shown
        assert "tokens as the engine prints it" in shown
        assert "requests of 8,192 tokens at once" in shown
    assert "fits H100 SXM 80GB: the requests take 1.0 GiB of a pool of " in text(e, 100)
