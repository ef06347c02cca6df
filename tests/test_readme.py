"""README says what is true: its outputs are what the commands print, its figures what the code and scores say.

`HFVRAM_GOLDEN=1 python -m pytest tests/test_readme.py` writes all of it anew.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hfvram
from hfvram.errors import Kind
from hfvram.memory.training.kinds import KINDS, WITH_TOWERS
from hfvram.model.families import MODULES

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CATALOGUE = json.loads((ROOT / "hfvram" / "read" / "catalogue.json").read_text())["models"]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(README.read_text()) if kind == language]


def run(command: str, home: Path) -> str:
    """What a shell prints to stdout, with nothing cached and no network."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HFVRAM_", "COLUMNS"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = clean | {"PATH": path, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=env, timeout=120, check=False)
    return done.stdout


def hold(said: str, true: str) -> None:
    """`said` stands in README and is `true`; or, where golden files are written anew, it is made so."""
    if os.environ.get("HFVRAM_GOLDEN") and said != true:
        text = README.read_text()
        assert text.count(said) == 1
        README.write_text(text.replace(said, true))
        return
    assert said == true


def test_the_first_command_prints_what_readme_shows(tmp_path: Path) -> None:
    command = blocks("sh")[0].splitlines()[-1]
    assert command == "hfvram mistralai/Mixtral-8x7B --mode inference --ctx 8192"
    hold(f"```text\n{blocks('text')[0]}```", f"```text\n{run(command, tmp_path)}```")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(blocks("console"))))
def test_other_commands_print_what_readme_shows(number: int, tmp_path: Path) -> None:
    block = blocks("console")[number]
    prompt = block.splitlines()[0]
    hold(block, f"{prompt}\n{run(prompt.removeprefix('$ '), tmp_path)}")


def test_the_set_up_names_what_is_there() -> None:
    first, second = (block.splitlines() for block in blocks("sh"))
    assert first[0] == "pip install ."
    assert second == ["pip install -c constraints.txt -e '.[dev]'", "python -m pytest -n 2"]
    assert (ROOT / "constraints.txt").is_file()
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_python_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for block in blocks("python"):
        exec(block, {})
    assert "False" in capsys.readouterr().out


def test_kinds_of_error_are_all_named() -> None:
    named = re.search(r"whose `kind` is one of\n(.*?)\.", README.read_text(), re.DOTALL)
    assert named
    assert tuple(named[1].replace("\n", " ").split(", ")) == Kind.__args__  # type: ignore[attr-defined]


def test_counts_of_types_and_models() -> None:
    text = README.read_text()
    for pattern, count in (
        (r"Closed forms stand for (\d+) model types", sum(map(len, MODULES.values()))),
        (r"of transformers, of which (\d+) train", len(KINDS) + len(WITH_TOWERS)),
        (r"built-in catalogue of (\d+) models", len(CATALOGUE)),
    ):
        found = re.search(pattern, text)
        assert found
        hold(found[0], found[0].replace(found[1], str(count)))


def test_what_is_refused_is_refused_and_what_is_supported_is_not() -> None:
    """Every word of the table's columns, for the options that it has rows of; simulations are other tests' matter."""

    def ask(name: str, word: str) -> hfvram.Estimate:
        options: dict[str, Any] = {"method": "formula", name: word}
        return hfvram.estimate("gpt2", offline=True, **options)

    refused = 0
    rows = [line.strip("| ").split("|") for line in README.read_text().splitlines() if line.startswith("| `--")]
    for option, *cells in rows:
        name = option.strip(" `-").replace("-", "_")
        answered, simulated, later = (re.findall(r"`([\w.-]+)`", cell) for cell in [*cells, "", ""][:3])
        for word in answered:
            assert ask(name, word).device_bytes > 0
        for word in [word for word in simulated + later if word not in answered]:
            with pytest.raises(hfvram.HfvramError, match=r"not supported yet|for training yet") as raised:
                ask(name, word)
            assert word not in simulated or "--method simulate" in str(raised.value)
            refused += 1
    assert (len(rows), refused) == (8, 0)


def test_every_key_of_the_answer_is_described() -> None:
    answer = hfvram.estimate("meta-llama/Llama-2-13b-hf", offline=True, gpu="24GB", recommend=True).to_dict()
    keys = {*answer, *answer["model"], *answer["items"][0], *answer["interval"], *answer["guide"], *answer["fit"]}
    keys |= {*answer["fit"]["ways"][0], *answer["recommended"][0]}
    assert keys - set(re.findall(r"`(\w+)`", (ROOT / "docs" / "json.md").read_text())) == set()


@pytest.mark.slow
def test_how_right_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    score = importlib.import_module("score")
    cases = [json.loads(line) for line in score.TRUTH.read_text().splitlines()]
    said = score.answers(cases, "formula", [str(Path(sys.executable).with_name("hfvram"))])
    text = README.read_text()
    shown = re.search(r"^\| \| cases.*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)
    count = re.search(r"in (\d+)\ncases", text)
    assert shown
    assert count
    hold(shown[0], score.markdown(cases, said))
    hold(count[0], f"in {len(cases)}\ncases")
    assert not [what for case in cases for what in score.inexact(case, said[case["id"]])]
