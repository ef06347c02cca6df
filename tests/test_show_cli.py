"""The command line from outside: exit codes, which stream, grids, options that are not there yet."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from estimates import PARAMETERS_LLAMA as PARAMETERS
from estimates import llama_folder

import hfvram
from hfvram.request import CHOICES, Request
from hfvram.show.cli import main
from hfvram.show.options import LATER, options


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return llama_folder(tmp_path)


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, as a shell starts it."""
    clean = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "HFVRAM_DEBUG")}
    command = [sys.executable, "-c", "import sys; from hfvram.show.cli import main; sys.exit(main())", *args]
    return subprocess.run(command, capture_output=True, text=True, env={**clean, **env}, timeout=60, check=False)


def test_answer_to_stdout_nothing_else_and_exit_0(llama: str) -> None:
    done = run(llama, "--ctx", "8k")
    assert done.returncode == 0
    assert f"{PARAMETERS:,} parameters" in done.stdout
    assert "8,192 tokens" in done.stdout
    assert "\x1b" not in done.stdout


def test_json_is_one_object_whose_items_add_up(llama: str) -> None:
    done = run("--json", llama, "--ctx", "8192")
    answer = json.loads(done.stdout)
    assert answer["model"]["parameters"] == PARAMETERS
    assert answer["request"]["ctx"] == 8192
    assert set(answer["request"]) == set(Request().to_dict())
    assert sum(item["bytes"] for item in answer["items"]) == answer["peak_allocated_bytes"]
    # keys and values of 8,191 tokens: 2 · 4 layers · 4 heads · 32 · 2 B
    assert answer["cache_bytes"] == 2 * 4 * 4 * 32 * 2 * 8191
    assert answer["error"] is None


def test_exit_3_when_it_does_not_fit(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([llama, "--gpu", "24GB"]) == 0
    assert "fits 24GB" in capsys.readouterr().out
    assert main([llama, "--gpu", "0.01GiB"]) == 3
    assert "does not fit" in capsys.readouterr().out


def test_of_several_answers_all_must_fit(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([llama, "--gpu", "24GB,0.01GiB"]) == 3
    out = capsys.readouterr().out
    assert "cheapest" in out
    assert " no" in out


def test_largest_context_and_batch_are_exact(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    def device(**changes: int) -> int:
        return hfvram.estimate(llama, **changes).device_bytes

    capacity = device(ctx=4096, batch=40)
    args = [llama, "--gpu", f"{capacity}B", "--ctx", "4096", "--max-ctx", "--max-batch", "--json"]
    assert main(args) == 0
    fit = json.loads(capsys.readouterr().out)["fit"]
    assert fit["max_ctx"] == 16384
    assert device(ctx=4096, batch=fit["max_batch"]) <= capacity < device(ctx=4096, batch=fit["max_batch"] + 1)


def test_max_ctx_is_the_question_where_no_ctx_is_given(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = hfvram.estimate(llama, ctx=100).device_bytes
    assert main([llama, "--gpu", f"{small}B", "--ctx", "16384", "--batch", "64", "--max-ctx"]) == 3
    assert main([llama, "--gpu", f"{small}B", "--max-ctx"]) == 0
    assert main([llama, "--gpu", "1MiB", "--max-ctx"]) == 3


def test_a_grid_is_a_table_and_a_json_list(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([llama, "--ctx", "1k,2k", "--batch", "1,8", "--json"]) == 0
    asked = [(a["request"]["ctx"], a["request"]["batch"]) for a in json.loads(capsys.readouterr().out)]
    assert asked == [(1024, 1), (1024, 8), (2048, 1), (2048, 8)]
    assert main([llama, "--ctx", "1k,2k"]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split()[:2] == ["model", "ctx"]
    assert len(rows) == 2


def test_one_model_that_fails_does_not_spoil_the_others(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([llama, llama + "/nowhere", "--json"]) == 1
    out, err = capsys.readouterr()
    good, bad = json.loads(out)
    assert good["error"] is None
    assert bad["error"]["kind"] == "not_found"
    assert err.startswith("hfvram: ")


@pytest.mark.parametrize("form", ["--markdown", "--csv", "--explain"])
def test_other_forms(llama: str, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([llama, form]) == 0
    assert f"{PARAMETERS:,}" in capsys.readouterr().out.replace(str(PARAMETERS), f"{PARAMETERS:,}")


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--nonsense"],
        ["--ctx"],
        ["m", "--ctx", "eight"],
        ["m", "--ctx", "0"],
        ["m", "--mode", "dreaming"],
        ["m", "--max-ctx"],
        ["m", "--max-batch"],
        ["m", "--gpu", "RTX 9090"],
        ["m", "--gpu", "H100,RTX 9090"],
        ["m", "--markdown", "--csv"],
        ["m", "batch", "f"],
        ["sweep", "m"],
        ["gpus", "no such thing"],
        ["batch"],
        ["batch", "f", "--jobs", "0"],
    ],
)
def test_usage_errors_are_one_line_and_exit_2(args: list[str], capsys: pytest.CaptureFixture[str], llama: str) -> None:
    assert main([llama if a == "m" else a for a in args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("hfvram: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", LATER)
def test_what_is_not_there_yet_is_refused_by_name(name: str, capsys: pytest.CaptureFixture[str], llama: str) -> None:
    flag = "--" + name.replace("_", "-")
    assert main([llama, flag] + ([] if name == "enforce_eager" else ["1"])) == 2
    assert f"{flag} is not supported yet" in capsys.readouterr().err


def test_every_option_of_a_request_is_an_option_of_the_command() -> None:
    known = {p.name for p in options()}
    assert set(Request().to_dict()) <= known
    assert set(CHOICES) <= known


def test_an_error_is_an_object_on_stdout_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["/nowhere/at/all", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["kind"] == "not_found"
    assert err.count("\n") == 1


def test_debug_shows_the_traceback() -> None:
    assert "Traceback" not in run("/nowhere/at/all").stderr
    assert "Traceback" in run("/nowhere/at/all", HFVRAM_DEBUG="1").stderr


def test_quiet_keeps_notices_to_itself(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([llama, "--gpu", "H100"]) == 0
    assert "H100 SXM 80GB" in capsys.readouterr().err
    assert main([llama, "--gpu", "H100", "-q"]) == 0
    assert capsys.readouterr().err == ""


def test_help_and_version_are_quick_and_import_nothing_heavy() -> None:
    code = (
        "import sys; from hfvram.show.cli import main; main(['--help']); main(['--version']);"
        "print(sorted({'torch', 'transformers', 'numpy', 'rich', 'huggingface_hub', 'httpx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "--gradient-checkpointing" in done.stdout
    assert done.stdout.endswith(f"hfvram {hfvram.__version__}\n[]\n")


def test_importing_the_package_is_light() -> None:
    code = "import sys, hfvram; print(sorted({'click', 'json', 'rich', 'huggingface_hub', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_the_version_is_the_projects() -> None:
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert f'version = "{hfvram.__version__}"' in project


def test_gpus_lists_and_narrows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpus", "H200", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "H200"
    assert main(["gpus", "amd consumer"]) == 0
    assert "RX 7900 XTX" in capsys.readouterr().out


def test_a_reader_that_leaves_early_is_no_error(llama: str) -> None:
    command = f"{sys.executable} -c 'from hfvram.show.cli import main; main()' {llama} --json | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("{\n", "")


@pytest.mark.parametrize(
    ("env", "coloured"),
    [({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False), ({"TERM": "xterm", "NO_COLOR": "1"}, False)],
)
def test_colours_and_a_bar_on_a_terminal_that_wants_them(llama: str, env: dict[str, str], coloured: bool) -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
    code = "import sys; from hfvram.show.cli import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", code, llama], stdout=theirs, env={**clean, **env})
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # Linux says so when the other side is closed
        pass
    assert process.wait(60) == 0
    assert ("█".encode() in shown, b"\x1b[" in shown) == (coloured, coloured)


def test_ctrl_c_is_quiet_and_130() -> None:
    code = "import sys; from hfvram.show.cli import main; print('ready', flush=True); sys.exit(main(['batch', '-']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a job in the background has none
    )
    assert process.stdout
    process.stdout.readline()
    time.sleep(0.5)  # until it waits for its first line
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=60)[1]
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("first-command-80.txt", ["--gpu", "H100"]),
        ("first-command-120.txt", []),
        ("first-command-explain.txt", ["--explain"]),
        ("first-command.md", ["--markdown", "--gpu", "24GB"]),
        ("first-command.json", ["--json"]),
    ],
)
def test_the_first_command_with_no_network(name: str, options: list[str], tmp_path: Path) -> None:
    args = ["mistralai/Mixtral-8x7B", "--mode", "inference", "--ctx", "8192", "--offline", *options]
    done = run(*args, HF_HOME=str(tmp_path), COLUMNS="120" if "120" in name else "80")
    golden = Path(__file__).parent.parent / "fixtures" / "golden" / name
    if os.environ.get("HFVRAM_GOLDEN"):
        golden.write_text(done.stdout)
    assert done.stdout == golden.read_text()
    assert "taken as mistralai/Mixtral-8x7B-v0.1" in done.stderr
    assert done.returncode == (3 if "--gpu" in options else 0)
