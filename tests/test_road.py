"""The road from end to end: the first command, exit codes, JSON, and what must hold for every model and request."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hfvram
from hfvram.answer.estimate import Estimate
from hfvram.answer.question import Session
from hfvram.answer.supported import SUPPORTED
from hfvram.errors import HfvramError
from hfvram.memory.bitsandbytes import ON_LOADING
from hfvram.request import CHOICES, GGUF_CACHES, GGUF_QUANTS, Request
from hfvram.show.cli import main

ROOT = Path(__file__).parents[1]
CATALOGUE = json.loads((Path(hfvram.__file__).parent / "read" / "catalogue.json").read_text())["models"]
FIRST = ["mistralai/Mixtral-8x7B", "--mode", "inference", "--ctx", "8192"]
GiB = 2**30


def run(*args: str, home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The installed command, with an empty cache and no settings of this machine."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HFVRAM_", "TRANSFORMERS_", "COLUMNS"))}
    command = [str(Path(sys.executable).with_name("hfvram")), *args]
    env = {**clean, "HF_HOME": str(home), **env}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)


@pytest.fixture(scope="module")
def closed_port() -> str:
    """An address that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


@pytest.fixture(scope="module")
def nowhere(closed_port: str, tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The first command on a machine from which no Hub is reached."""
    return run(*FIRST, "--json", home=tmp_path_factory.mktemp("home"), HF_ENDPOINT=closed_port)


# --- the first command


def test_first_command_offline(tmp_path: Path) -> None:
    done = run(*FIRST, home=tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 0
    assert "46,702,792,704 parameters (12.88 B active)" in done.stdout
    rows = {line[:14].strip(): line[14:].split() for line in done.stdout.splitlines()}
    assert rows["weights"][:2] == ["87.0", "GiB"]
    assert rows["cache"][:2] == ["1.0", "GiB"]
    peaks = [float(rows[name][0]) for name in ("peak allocated", "peak reserved", "on the device")]
    assert 88 < peaks[0] <= peaks[1] < peaks[2] < 93
    notices = done.stderr.splitlines()
    assert any("taken as mistralai/Mixtral-8x7B-v0.1" in line for line in notices)
    assert any("built-in catalogue" in line for line in notices)


def test_first_command_where_no_hub_answers(nowhere: subprocess.CompletedProcess[str]) -> None:
    assert nowhere.returncode == 0
    answer = json.loads(nowhere.stdout)
    # arXiv 2401.04088: 47 B and 13 B; the exact counts are those of the checkpoint's headers
    assert answer["model"]["parameters"] == 46_702_792_704
    assert answer["model"]["active_parameters"] == 12_879_925_248
    assert answer["model"]["id"] == "mistralai/Mixtral-8x7B-v0.1"
    assert answer["model"]["source"] == "catalogue"
    assert answer["weights_bytes"] == 2 * 46_702_792_704
    # keys and values · layers · KV heads · head dim · bf16, of all tokens but the last
    assert answer["cache_bytes"] == 2 * 32 * 8 * 128 * 2 * 8191
    assert len(answer["warnings"]) >= 2


def test_json_has_exactly_these_keys(nowhere: subprocess.CompletedProcess[str]) -> None:
    answer = json.loads(nowhere.stdout)
    sizes = {f"{n}_bytes" for n in ("weights", "cache", "gradients", "optimizer", "activations", "peak_allocated")}
    sizes |= {"peak_reserved_bytes", "device_bytes"}
    rest = {
        "model",
        "request",
        "method",
        "versions",
        "items",
        "interval",
        "guide",
        "serving",
        "fit",
        "warnings",
        "error",
    }
    added = {"peak_phase", "recommended", "components", "largest_tensors", "phases"}
    added |= {"offloaded", "cpu_bytes", "nvme_bytes", "disk_bytes", "ranks", "placement"}
    assert set(answer) == sizes | rest | added
    assert set(answer["model"]) == {
        *("id", "commit", "source", "architecture", "model_type", "parameters", "active_parameters"),
        *("trainable_parameters", "parameters_from", "dtype", "layers", "hidden_size", "attention_heads", "kv_heads"),
        *("head_dim", "experts", "experts_per_token", "state_size", "layer_kinds"),
    }
    assert answer["model"]["layer_kinds"] == {"full_attention": 32, "moe": 32}
    assert {tuple(sorted(item)) for item in answer["items"]} == {
        ("bytes", "category", "certainty", "formula", "name", "source")
    }
    assert set(answer["interval"]) == {"low_bytes", "high_bytes", "basis"}
    assert set(answer["guide"]) == {"bytes", "formula"}
    assert set(answer["request"]) == set(Request().to_dict())
    assert (answer["serving"], answer["fit"], answer["error"]) == (None, None, None)


def test_json_of_a_verdict(tmp_path: Path) -> None:
    done = run(*FIRST, "--gpu", "H100", "--json", home=tmp_path, HF_HUB_OFFLINE="1")
    fit = json.loads(done.stdout)["fit"]
    assert done.returncode == 3
    assert set(fit) == {"gpu", "capacity_bytes", "fits", "headroom_bytes", "max_ctx", "max_batch", "ways"}
    assert (fit["fits"], fit["max_ctx"], fit["max_batch"]) == (False, 0, 0)
    assert fit["headroom_bytes"] == fit["capacity_bytes"] - json.loads(done.stdout)["device_bytes"] < 0


def test_every_way_to_make_it_fit_does(tmp_path: Path) -> None:
    """What `ways` proposes is asked for as a person would."""
    asked = ["meta-llama/Llama-2-13b-hf", "--ctx", "4096", "--batch", "2", "--offline", "--gpu", "24GB", "--json"]
    fit = json.loads(run(*asked, home=tmp_path).stdout)["fit"]
    assert fit["ways"]
    for way in fit["ways"]:
        assert set(way) == {"change", "device_bytes"}
        assert way["device_bytes"] <= fit["capacity_bytes"]
        done = run(*asked, *way["change"].split(), home=tmp_path)
        assert (done.returncode, json.loads(done.stdout)["device_bytes"]) == (0, way["device_bytes"])


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ([*FIRST, "--offline"], 0, ""),
        ([*FIRST, "--offline", "--gpu", "H200"], 0, ""),
        (["nobody/nothing-of-this-name", "--offline"], 1, "nobody/nothing-of-this-name"),
        (["./no/such/folder", "--offline"], 1, "no such"),
        ([*FIRST, "--offline", "--colour", "red"], 2, "--colour"),
        ([*FIRST, "--offline", "--mode", "dreaming"], 2, "inference, train, lora, qlora"),
        ([*FIRST, "--offline", "--gpu", "24GB"], 3, ""),
        ([*FIRST[:1], "--offline", "--gpu", "24GB", "--max-ctx"], 3, ""),
    ],
)
def test_exit_codes(args: list[str], code: int, said: str, tmp_path: Path) -> None:
    done = run(*args, "-q", home=tmp_path)
    assert done.returncode == code
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == (code in (1, 2))
    assert bool(done.stdout) == (code in (0, 3))


# --- what is not answered yet is refused


def unsupported() -> list[tuple[str, object]]:
    """Words and values of options that are not answered by formula for GPT-2, which is fp32."""
    refused: list[tuple[str, object]] = [
        (name, word) for name, words in CHOICES.items() if name in SUPPORTED for word in words
    ]
    refused += [("pp", 2), ("ep", 2), ("cp", 2), ("sp", True), ("zero", 3)]
    refused += [("offload", ["experts"])]
    refused = [(name, value) for name, value in refused if value not in SUPPORTED[name]]
    refused += [
        ("quant", word)
        for word in CHOICES["quant"]
        if word not in ("auto", "none", *ON_LOADING, "fp8", "gptq-4", "awq-4", *GGUF_QUANTS)
    ]
    refused += [("kv_dtype", word) for word in CHOICES["kv_dtype"] if word not in ("auto", *GGUF_CACHES)]
    refused += [("gradient_checkpointing", True), ("mixed_precision", "bf16"), ("grad_accum", 2)]
    return [*refused, ("optimizer", "lion"), ("lora_r", 8), ("lora_targets", ["q_proj"]), ("lora_dropout", 0.1)]


@pytest.mark.parametrize(("name", "value"), unsupported())
def test_what_is_not_supported_is_a_usage_error(name: str, value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(HfvramError) as raised:
        hfvram.estimate("gpt2", offline=True, method="formula", **{name: value})
    assert raised.value.kind == "usage"
    flag = "--" + name.replace("_", "-")
    words = [flag] if value is True else [flag, ",".join(value) if isinstance(value, list) else str(value)]
    assert main(["gpt2", "--offline", "--method", "formula", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert flag in err


def test_the_list_of_what_is_not_supported_is_not_empty() -> None:
    assert {"mxfp4", "fp8", "lion"} <= {str(v) for _, v in unsupported()}


# --- every model of the catalogue


def test_every_model_of_the_catalogue_answers_and_the_whole_of_it_in_seconds() -> None:
    session, start = Session(), time.process_time()
    answers = {model: session.estimate(model, Request(), offline=True) for model in CATALOGUE}
    took = time.process_time() - start
    for model, e in answers.items():
        check(e)
        facts = CATALOGUE[CATALOGUE[model].get("like", model)]
        assert e.model.parameters == sum(facts["parameters"].values()), model
        assert e.model.active_parameters <= e.model.parameters
        assert (e.model.active_parameters < e.model.parameters) == bool(e.model.experts), model
    assert took / len(answers) < 0.05  # in all some seconds, models read included


FACTS = [json.loads(line) for line in (ROOT / "fixtures" / "configs" / "facts.jsonl").read_text().splitlines()]


def test_every_configuration_known_to_be_real_answers(tmp_path: Path) -> None:
    """Real configurations as folders, with the parameters that transformers builds of them."""
    session, wrong = Session(), []
    for number, line in enumerate(FACTS):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(line["config"]))
        try:
            e = session.estimate(str(folder), Request())
        except HfvramError as error:
            # a quantization whose sizes are not known is said to be so
            wrong += [f"{line['id']}: {error}"] if error.kind != "usage" or "quantization" not in str(error) else []
            continue
        check(e)
        wrong += [f"{line['id']}: {e.model.parameters}"] if e.model.parameters != line["parameters"] else []
    assert wrong == []


def check(e: Estimate) -> None:
    """What holds for every answer."""
    assert sum(item.bytes for item in e.items) == e.peak_allocated_bytes
    assert all(item.bytes > 0 for item in e.items if item.category != "rounding")
    assert len({item.name for item in e.items}) == len(e.items)
    assert e.peak_allocated_bytes <= e.peak_reserved_bytes < e.device_bytes
    assert e.interval.low_bytes <= e.device_bytes <= e.interval.high_bytes
    assert 0 < e.weights_bytes <= e.peak_allocated_bytes
    assert all(item.name and item.source for item in e.items)
    assert (e.gradients_bytes, e.optimizer_bytes, e.model.trainable_parameters) == (0, 0, 0)
    assert json.loads(json.dumps(e.to_dict()))["error"] is None


# --- properties

SESSION = Session()


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Requests that this version answers, for a model that generates or, with `phase` left open, for any."""
    ctx = draw(st.sampled_from([None, 1, 2, 16, 128, 1000, 4096, 8192, 32768, 131_072]) | st.integers(1, 200_000))
    choices = {name: st.sampled_from(CHOICES[name]) for name in ("attention", "kernels", "dtype")}
    choices |= {"quant": st.sampled_from(("auto", "none", *ON_LOADING))}
    drawn = {name: draw(strategy) for name, strategy in choices.items()}
    batch = draw(st.sampled_from([1, 1, 2, 8, 64]) | st.integers(1, 300))
    return Request(ctx=ctx, batch=batch, padding=draw(st.booleans()), double_quant=draw(st.booleans()), **drawn)


def grown(model: str, request: Request, **changes: int) -> tuple[Estimate, Estimate]:
    return ask(model, request), ask(model, request.with_(**changes))


def ask(model: str, request: Request) -> Estimate:
    if quantized(model):
        request = request.with_(quant="auto")
    e = SESSION.estimate(model, request, offline=True)
    check(e)
    return e


def quantized(model: str) -> bool:
    """Whether the checkpoint is: then there is nothing left to quantize."""
    config = CATALOGUE[CATALOGUE[model].get("like", model)]["config"]
    return bool(config.get("quantization_config") or config.get("text_config", {}).get("quantization_config"))


models = st.sampled_from(sorted(CATALOGUE))

# the same examples at every run, unless a number asks for as many new ones
EXAMPLES = os.environ.get("HFVRAM_EXAMPLES")
tried = settings(
    max_examples=int(EXAMPLES or 60), derandomize=not EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck)
)


@tried
@given(models, requests())
def test_every_answer_is_whole(model: str, request: Request) -> None:
    e = ask(model, request)
    assert Request.from_dict(e.to_dict()["request"]) == e.request


@tried
@given(models, requests())
def test_what_was_resolved_is_the_same_question(model: str, request: Request) -> None:
    """The request that an answer shows can be asked again, and is answered alike."""
    e = ask(model, request)
    again = ask(model, Request.from_dict(json.loads(json.dumps(e.to_dict()["request"]))))
    assert (again.items, again.device_bytes, again.request) == (e.items, e.device_bytes, e.request)


@tried
@given(models, requests(), st.sampled_from(["ctx", "batch"]))
def test_twice_the_tokens_never_need_less(model: str, request: Request, name: str) -> None:
    """In half precision: in fp32 grouped heads without a mask take the math kernel, and beyond a window less."""
    request = request.with_(ctx=request.ctx or 1024, dtype="bf16" if request.dtype in ("auto", "fp32") else "fp16")
    small, large = grown(model, request, **{name: 2 * getattr(request, name)})
    assert large.weights_bytes == small.weights_bytes
    assert large.cache_bytes >= small.cache_bytes
    assert large.peak_allocated_bytes >= small.peak_allocated_bytes


@tried
@given(models, requests(), st.integers(1, 5000))
def test_a_few_tokens_more_never_shrink_the_cache(model: str, request: Request, more: int) -> None:
    request = request.with_(ctx=request.ctx or 1024)
    small, large = grown(model, request, ctx=(request.ctx or 0) + more)
    assert large.cache_bytes >= small.cache_bytes
    assert large.weights_bytes == small.weights_bytes


@given(st.builds(dict, **{name: st.sampled_from(words) for name, words in CHOICES.items()}), st.integers(1, 10**9))
def test_json_to_request_to_json_is_the_identity(values: dict[str, Any], number: int) -> None:
    values |= {"ctx": number, "batch": 1 + number % 1000, "offload": ["experts"], "lora_targets": ["q_proj"], "zero": 1}
    request = Request.from_dict(values)
    text = json.dumps(request.to_dict())
    assert Request.from_dict(json.loads(text)) == request
    assert json.dumps(Request.from_dict(json.loads(text)).to_dict()) == text
