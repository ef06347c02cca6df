"""`hfvram card` as a user types it: printed, kept in a file, proposed on a fake Hub that accepts or refuses."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from estimates import LLAMA, llama_folder
from hub import TOKEN, FakeHub, Repo, safetensors

from hfvram.show.cli import main
from hfvram.show.publish import difference
from hfvram.show.section import END, START

ID = "org/model"
README = b"---\r\nlicense: mit\r\n---\r\n# Model\r\n"


@pytest.fixture
def hub(hf_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    config = json.dumps({**LLAMA, "architectures": ["LlamaForCausalLM"]}).encode()
    weights = safetensors({"model.embed_tokens.weight": ("BF16", (1000, 256))})
    with FakeHub({ID: Repo({"config.json": config, "README.md": README, "model.safetensors": weights})}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_printed_as_it_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = llama_folder(tmp_path)
    assert main(["card", folder]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(START)
    path = tmp_path / "README.md"
    path.write_text("# Title\n")
    assert main(["card", folder, "--write", str(path)]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "the section is written" in err
    assert path.read_text() == f"# Title\n\n{printed}"
    assert main(["card", folder, "--write", str(path), "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    assert path.read_text() == f"# Title\n\n{printed}"


def test_what_can_t_be_written_is_one_line_and_exit_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = llama_folder(tmp_path)
    path = tmp_path / "README.md"
    path.write_text(f"{START}\nhalf\n")
    for name, words in ((path, "broken"), (tmp_path / "no.md", "there is no file")):
        assert main(["card", folder, "--write", str(name)]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert words in err
        assert err.count("\n") == 1
    assert path.read_text() == f"{START}\nhalf\n"


def test_proposed_after_the_change_was_shown(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", ID, "--push", "--yes"]) == 0
    out, err = capsys.readouterr()
    *shown, url = out.splitlines()
    assert url == f"{hub.url}/{ID}/discussions/1"
    assert "opened a pull request" in err
    (pull,) = hub.repos[ID].pulls
    assert pull["data"].startswith(README + b"\r\n" + START.encode())
    assert b"\n" not in pull["data"].replace(b"\r\n", b"")
    assert [line for line in shown if line.startswith("-") and line != "--- README.md"] == []
    assert f"+{START}" in shown
    assert main(["card", ID, "--push", "--yes"]) == 0
    assert "proposed already" in capsys.readouterr().err
    assert len(hub.repos[ID].pulls) == 1


def test_nothing_to_change_opens_nothing(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    main(["card", ID, "--push", "--yes"])
    hub.repos[ID].files["README.md"] = hub.repos[ID].pulls[0]["data"]
    capsys.readouterr()
    assert main(["card", ID, "--push", "--yes"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "nothing to change" in err
    assert len(hub.repos[ID].pulls) == 1


def test_a_refusal_is_exit_1_and_one_line(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.only = "/commit/"
    hub.faults.append("403")
    assert main(["card", ID, "--push", "--yes"]) == 1
    out, err = capsys.readouterr()
    assert START in out
    assert err.splitlines()[-1].startswith("hfvram: the Hub forbids a pull request for org/model")
    assert hub.repos[ID].pulls == []


@pytest.mark.parametrize(("answer", "count"), [("y\n", 1), ("n\n", 0), ("", 0)])
def test_it_asks_on_a_terminal(answer: str, count: int, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal(answer))
    assert main(["card", ID, "--push"]) == (0 if answer else 130)
    assert len(hub.repos[ID].pulls) == count


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--push"], "pass --yes"),
        (["--yes"], "--yes is for --push"),
        (["--push", "--yes", "--offline"], "leave --offline out"),
    ],
)
def test_usage(args: list[str], words: str, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", ID, *args]) == 2
    assert words in capsys.readouterr().err
    assert hub.repos[ID].pulls == []


def test_a_folder_can_t_be_proposed(hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", llama_folder(tmp_path), "--push", "--yes"]) == 2
    assert "on this machine" in capsys.readouterr().err


def test_a_name_that_was_completed_is_not_pushed_to(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repos["org/other-v1"] = hub.repos[ID]
    assert main(["card", "org/other"]) == 0
    assert main(["card", "org/other", "--push", "--yes"]) in (1, 2)
    assert hub.repos[ID].pulls == []


def test_a_change_is_shown_without_what_steers_a_terminal() -> None:
    shown = "\n".join(difference(b"a\x1b[2J\r\nb\r\n", b"a\x1b[2J\r\nb\r\n\r\nc\r\n"))
    assert "\x1b" not in shown
    assert re.search(r"^\+c$", shown, re.MULTILINE)


def test_the_command_is_light(tmp_path: Path) -> None:
    code = f"""
import sys
from hfvram.show.cli import main
main(["card", {llama_folder(tmp_path)!r}, "-q"])
heavy = {{"torch", "transformers", "numpy", "matplotlib", "huggingface_hub.hf_api"}}
print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.stderr == "[]\n"
    assert END in done.stdout
