"""`hfvram batch`: in order, an answer a line, bad lines answered as errors and the rest done."""

import io
import json
import sys
from pathlib import Path

import pytest
from estimates import PARAMETERS_LLAMA as PARAMETERS
from estimates import llama_folder

from hfvram.show.batch import answer_line
from hfvram.show.cli import main

BAD = [
    (b"not json", "usage"),
    (b'{"model": ', "usage"),
    (b"[1]", "usage"),
    (b"[" * 100_000, "usage"),
    (b'{"id": NaN, "model": "m"}', "usage"),
    (b'{"id": 5}', "usage"),
    (b'{"model": 5}', "usage"),
    (b'{"model": "MODEL", "ctx": "many"}', "usage"),
    (b'{"model": "MODEL", "ctx": true}', "usage"),
    (b'{"model": "MODEL", "colour": "red"}', "usage"),
    (b'{"model": "MODEL", "offline": "yes"}', "usage"),
    (b'{"model": "MODEL", "max_ctx": true}', "usage"),
    (b'{"model": "MODEL/nowhere"}', "not_found"),
    (b"\xff\xfe{", "usage"),
]


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return llama_folder(tmp_path)


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_in_order_with_ids_and_bad_lines_between(
    llama: str,
    jobs: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    lines: list[bytes] = []
    for i in range(30):
        lines.append(json.dumps({"id": f"r{i}", "model": llama, "ctx": 1024 + i, "batch": 1 + i % 3}).encode())
        lines.append(BAD[i % len(BAD)][0].replace(b"MODEL", llama.encode()))
    file = tmp_path / "requests.jsonl"
    file.write_bytes(b"\n".join(lines) + b"\n\n")
    assert main(["batch", str(file), "--json", "--jobs", jobs]) == 1
    answers = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert len(answers) == 60
    assert [(a["id"], a["request"]["ctx"]) for a in answers[::2]] == [(f"r{i}", 1024 + i) for i in range(30)]
    assert all(a["model"]["parameters"] == PARAMETERS and a["error"] is None for a in answers[::2])
    assert [a["error"]["kind"] for a in answers[1::2]] == [BAD[i % len(BAD)][1] for i in range(30)]


def test_standard_input_and_words(
    llama: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = json.dumps({"id": 7, "model": llama, "gpu": "24GB"}).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(line + b"\n{}\n")))
    assert main(["batch", "-"]) == 1
    good, bad = capsys.readouterr().out.splitlines()
    assert good.split()[0] == "7"
    assert good.endswith("fits 24GB")
    assert "usage:" in bad


def test_nothing_failed_is_exit_0(llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"model": llama}))
    assert main(["batch", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] is None


def test_a_file_that_is_not_there_is_io(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["batch", "/no/such/file"]) == 1
    assert "/no/such/file" in capsys.readouterr().err


def test_an_error_names_the_model_and_keeps_the_id() -> None:
    answer = answer_line(b'{"id": {"a": 1}, "model": "/no/such", "ctx": 5}')
    assert answer["id"] == {"a": 1}
    assert answer["model"] == {"id": "/no/such"}
    assert answer["error"]["kind"] == "not_found"
