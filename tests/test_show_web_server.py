"""`hfvram web` over HTTP: what it serves, what it keeps closed, and twenty at once."""

import builtins
import concurrent.futures
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from estimates import LLAMA
from hub import FakeHub, Repo
from website import website

import hfvram
from hfvram.show.cli import main
from hfvram.units import GiB

MODELS = ("Qwen/Qwen3-8B", "mistralai/Mixtral-8x7B-v0.1", "gpt2", "state-spaces/mamba-130m-hf", "google/gemma-2-9b")


def test_without_gradio_a_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any) -> Any:
        if name == "gradio":
            raise ModuleNotFoundError("No module named 'gradio'", name="gradio")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert main(["web", "--no-browser", "--port", "0"]) == 1
    assert capsys.readouterr().err == "hfvram: the page needs gradio: pip install 'hfvram[web]'\n"


@pytest.mark.slow
def test_a_port_that_is_taken_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["web", "--no-browser", "--port", str(port)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"hfvram: no page at 127.0.0.1:{port}: ")
    assert said.count("\n") == 1


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("gradio")
    with website(tmp_path_factory.mktemp("home")) as found:
        yield found


def ask(address: str, model: str, *form: str, session: str) -> str:
    """The answer's HTML, as a browser gets it: the question joins the queue, the events of its session tell."""
    controls = [*form, *("inference", "", "", "auto", "transformers", "", "")[len(form) :]]
    with httpx.Client(base_url=address, timeout=60) as client:
        config = client.get("/config").json()
        function = next(d["id"] for d in config["dependencies"] if d["api_name"] == "ask")
        body = {"data": [model, *controls], "fn_index": function, "session_hash": session}
        client.post("/gradio_api/queue/join", json=body).raise_for_status()
        shown = ""
        with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as events:
            for line in events.iter_lines():
                told = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
                for value in (told.get("output") or {}).get("data", ()):
                    if "peak-allocated" in json.dumps(value) or 'id=\\"error' in json.dumps(value):
                        shown = json.dumps(value)
                if told.get("msg") == "process_completed":
                    return json.loads(f'"{shown}"') if not shown.startswith(('"', "[", "{")) else shown
    raise AssertionError("no end")


@pytest.mark.slow
def test_twenty_at_once_get_right_answers(address: str) -> None:
    questions = [(MODELS[i % len(MODELS)], 512 * (1 + i)) for i in range(20)]
    with concurrent.futures.ThreadPoolExecutor(20) as people:
        coming = [
            people.submit(ask, address, model, "inference", str(ctx), session=f"s{i}")
            for i, (model, ctx) in enumerate(questions)
        ]
        pages = [c.result() for c in coming]
    for (model, ctx), page in zip(questions, pages, strict=True):
        e = hfvram.estimate(model, ctx=ctx, offline=True)
        for id_, count in (
            ("peak-allocated", e.peak_allocated_bytes),
            ("peak-reserved", e.peak_reserved_bytes),
            ("device", e.device_bytes),
        ):
            assert f'id=\\"{id_}\\" data-bytes=\\"{count}\\"' in page, (model, ctx, count / GiB)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["/etc", "..", "/etc/hostname", "<script>alert(1)</script>", "", "https://example.org/a/b"]
)
def test_a_bad_model_is_a_sentence_that_tells_nothing_of_the_machine(address: str, model: str) -> None:
    page = ask(address, model, session="bad")
    assert 'id=\\"error\\"' in page
    assert "peak-allocated" not in page
    assert "<script" not in page
    assert "Traceback" not in page


@pytest.mark.slow
def test_what_the_page_has_no_use_for_is_closed(address: str) -> None:
    here = Path(__file__).resolve()
    with httpx.Client(base_url=address) as client:
        for path in ("file=/etc/hostname", f"file={here}", "file=constraints.txt", "proxy=http://127.0.0.1/", "file/x"):
            for prefix in ("/gradio_api/", "/"):
                answer = client.get(prefix + path)
                assert answer.status_code in (403, 404), (prefix, path)
        assert client.post("/gradio_api/upload", files={"files": b"x"}).status_code in (404, 405)
        assert client.post("/gradio_api/queue/join", content=b" " * 300_000).status_code == 413
        page = client.get("/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert '"analytics_enabled":false' in page.text.replace(" ", "")


@pytest.mark.slow
@pytest.mark.parametrize(("host", "token"), [("127.0.0.1", "hf_good"), ("0.0.0.0", None)])
def test_strangers_are_not_answered_with_the_machines_token(tmp_path: Path, host: str, token: str | None) -> None:
    pytest.importorskip("gradio")
    with FakeHub({"a/b": Repo({"config.json": json.dumps(LLAMA).encode()})}) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_good", "HF_HUB_OFFLINE": "0"}
        with website(tmp_path, "--host", host, **env) as found:
            ask(found, "a/b", session="s")
        assert {asked.token for asked in hub.log if "a/b" in asked.path} == {token}
