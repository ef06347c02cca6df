"""Every kind of error from the command line, over real HTTP; and configurations that mean harm.

SPEC: one line on stderr, no traceback, the object on stdout with --json, the exit code, nothing kept, within seconds.
"""

import copy
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import FakeHub, Repo, Sparse, safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import LLAMA

from hfvram.answer.question import answer, understand
from hfvram.errors import HfvramError, printable
from hfvram.model.families import MODULES
from hfvram.read.checkpoint import Checkpoint
from hfvram.request import Request
from hfvram.show.cli import main

CONFIGS = Path(__file__).parents[1] / "fixtures" / "configs"
FACTS = [json.loads(line) for line in (CONFIGS / "facts.jsonl").read_text().splitlines()]
HEADERS = Path(__file__).parents[1] / "fixtures" / "headers"


def raw(**changes: Any) -> bytes:
    return json.dumps({**LLAMA, **changes}).encode()


def repo(config: bytes, **more: Any) -> Repo:
    return Repo({"config.json": config}, **more)


REPOS: dict[str, Repo] = {
    "a/good": repo(raw()),
    "a/gated": repo(raw(), gated=True),
    "a/private": repo(raw(), private=True),
    "a/empty": Repo({"README.md": b""}),
    "a/not-json": repo(b"{nope"),
    "a/a-list": repo(b"[1, 2]"),
    "a/deep": repo(b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
    "a/text-as-size": repo(raw(hidden_size="256")),
    "a/negative": repo(raw(hidden_size=-256)),
    "a/layers": repo(raw(num_hidden_layers=10**9)),
    "a/uneven": repo(raw(num_attention_heads=3)),
    "a/unknown": repo(raw(model_type="martian", architectures=["MartianForCausalLM"])),
    "a/escape": repo(raw(model_type="mars\x1b[31m\n\u202e", architectures=["Mars\x1b]0;x\x07"])),
    "a/layer-kind": repo(raw(model_type="qwen3", layer_types=["full_attention", "telepathy"])),
    "a/bad-header": Repo(
        {"config.json": raw(), "model.safetensors": (HEADERS / "bad-overlap.safetensors").read_bytes()}, counted=False
    ),
    "a/truncated": Repo(
        {"config.json": raw(), "model.safetensors": (HEADERS / "bad-truncated.safetensors").read_bytes()}, counted=False
    ),
    "a/quantized": repo(raw(quantization_config={"quant_method": "spqr\x1b[31m"})),
}


@pytest.fixture
def hub(hf_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub({**REPOS, "a/huge": Repo({"config.json": Sparse(b'{"a": "', 100_000_000)})}) as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        yield fake


@pytest.mark.parametrize(
    ("args", "kind", "said"),
    [
        (["a/nothing"], "not_found", "a/nothing"),
        (["a/private"], "not_found", "a/private"),
        (["/no/such/folder"], "not_found", "/no/such/folder"),
        (["./no/such/folder"], "not_found", "no/such/folder"),
        (["a/good", "--revision", "v9"], "revision_not_found", "v9"),
        (["a/good@v9"], "revision_not_found", "v9"),
        (["a/gated"], "gated", "a/gated"),
        (["a/good", "--token", "nonsense"], "unauthorized", "token"),
        (["a/good", "--offline"], "offline", "a/good"),
        (["a/empty"], "no_config", "a/empty"),
        (["a/not-json"], "bad_config", "config.json"),
        (["a/a-list"], "bad_config", "config.json"),
        (["a/deep"], "bad_config", "nested"),
        (["a/huge"], "bad_config", "MB"),
        (["a/text-as-size"], "bad_config", "'256' for hidden_size"),
        (["a/negative"], "bad_config", "-256 for hidden_size"),
        (["a/layers"], "bad_config", "1000000000 for num_hidden_layers"),
        (["a/uneven"], "bad_config", "256"),
        (["a/unknown"], "unknown_architecture", "'martian'"),
        (["a/escape"], "unknown_architecture", r"mars\\x1b"),
        (["a/layer-kind"], "unknown_architecture", "'telepathy'"),
        (["a/bad-header"], "bad_header", "model.safetensors"),
        (["a/truncated"], "bad_header", "model.safetensors"),
        (["a/quantized"], "usage", r"spqr\x1b"),
        (["a/good", "--ctx", "0"], "usage", "--ctx"),
        (["a/good", "--engine", "tensorrt"], "usage", "--engine"),
        (["a/good", "--gpu", "RTX 9090"], "usage", "RTX 9090"),
        (["https://evil.example/a/good"], "not_found", ""),
        (["../../no/passwd"], "not_found", ""),
        (["a/b/c"], "not_found", ""),
    ],
)
def test_each_kind(
    hub: FakeHub, hf_home: Path, capsys: pytest.CaptureFixture[str], args: list[str], kind: str, said: str
) -> None:
    start = time.process_time()
    code = main([*args, "--json"])
    took = time.process_time() - start
    out, err = capsys.readouterr()
    assert code == (2 if kind == "usage" else 1)
    found = json.loads(out)["error"] if out else {"kind": "usage", "message": err}
    assert found["kind"] == kind
    assert said in found["message"]
    assert err.startswith("hfvram: ")
    assert err.count("\n") == 1
    assert err.strip().isprintable()
    assert took < 5
    assert kind in ("offline", "usage", *LEFT) or not [p for p in hf_home.rglob("*") if p.is_file()]


LEFT = ("bad_config", "unknown_architecture")
"""Found after the files were kept: see the next test."""


@pytest.mark.parametrize("name", ["a/text-as-size", "a/negative", "a/layers", "a/uneven", "a/unknown", "a/layer-kind"])
def test_nothing_is_left_in_the_cache(hub: FakeHub, hf_home: Path, name: str) -> None:
    assert main([name]) == 1
    assert not [p for p in hf_home.rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [("500", "network"), ("reset", "network"), ("429", "rate_limited"), ("429 0", "rate_limited"), ("loop", "network")],
)
def test_a_hub_that_fails_for_good(
    hub: FakeHub, hf_home: Path, capsys: pytest.CaptureFixture[str], fault: str, kind: str
) -> None:
    hub.always = fault
    start = time.monotonic()
    assert main(["a/good", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["kind"] == kind
    assert err.count("\n") == 1
    assert time.monotonic() - start < 30
    assert not [p for p in hf_home.rglob("*") if p.is_file()]


@pytest.mark.parametrize("fault", ["500", "reset", "429 0"])
def test_a_hub_that_fails_once_is_asked_again(hub: FakeHub, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    hub.faults.append(fault)
    assert main(["a/good", "--json"]) == 0


def test_where_nobody_listens(
    hf_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main(["a/good", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "network"


def test_a_local_gpu_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes(raw())
    if main([str(tmp_path), "--gpu", "local", "--json"]) == 0:
        pytest.skip("there is a GPU")
    assert json.loads(capsys.readouterr().out)["error"]["kind"] in ("no_gpu", "missing_extra")


def test_files_that_can_not_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "config.json")
    assert main([str(tmp_path / "config.json"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "io"


def test_no_traceback_from_a_shell(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(raw(hidden_size=math.nan))
    code = "import sys; from hfvram.show.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "hfvram: config.json has nan for hidden_size, not a whole number\n"


# --- hostile configurations, all the way to an answer


def asked(config: Any, request: Request | None = None) -> str:
    """`ok`, or the kind of the error; any other exception is a failure of the test."""
    request = request or Request()
    try:
        found = answer(understand(Checkpoint(id="a/b", source="local", config=config), request), request)
    except HfvramError as error:
        return error.kind if printable(error.message) == error.message else "unprintable"
    assert sum(item.bytes for item in found.items) == found.peak_allocated_bytes
    assert all(item.bytes >= 0 for item in found.items)
    return "ok"


ALLOWED = ("ok", "bad_config", "unknown_architecture")
ONE_OF_EACH = list({fact["config"]["model_type"]: fact["config"] for fact in FACTS}.values())
HUGE = 10**12
NOT_SIZES = ["8", -1, 1.5, math.nan, math.inf, HUGE, 10**400, True, [8], {"a": 8}, [[]], "\x1b[31m"]


def sizes_of(config: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths to every whole number of a configuration."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from sizes_of(value, (*path, key))
        elif isinstance(value, int) and not isinstance(value, bool):
            yield (*path, key)


def changed(config: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    out = copy.deepcopy(config)
    inner = out
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return out


SHORT = Request(ctx=64)


def check_sizes(config: dict[str, Any], values: list[Any]) -> None:
    for path in sizes_of(config):
        for value in values:
            start = time.process_time()
            kind = asked(changed(config, path, value), SHORT)
            assert kind in ALLOWED, (path, value, kind)
            assert time.process_time() - start < 10, (path, value)


@pytest.mark.slow
@pytest.mark.parametrize("config", ONE_OF_EACH, ids=lambda c: str(c["model_type"]))
def test_what_is_no_size_where_a_size_belongs(config: dict[str, Any]) -> None:
    check_sizes(config, NOT_SIZES)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_next", "gpt2", "gemma3", "t5", "bert", "mamba2", "deepseek_v2"])
def test_what_is_no_size_in_a_few_families(kind: str) -> None:
    config = next(c for c in ONE_OF_EACH if c["model_type"] == kind)
    check_sizes(config, ["8", -1, math.nan, HUGE, [8]])


WIDTHS = ("hidden_size", "n_embd", "d_model")


@pytest.mark.parametrize("config", ONE_OF_EACH, ids=lambda c: str(c["model_type"]))
def test_widths_that_make_no_sense_are_told(config: dict[str, Any]) -> None:
    for path in sizes_of(config):
        if path[-1] in WIDTHS and len(path) == 1 and not any(key.endswith("_config") for key in config):
            for value in ("8", -1, 1.5, math.nan, HUGE, True, [8], {}):
                assert asked(changed(config, path, value)) == "bad_config", (path, value)


@pytest.mark.parametrize("config", ONE_OF_EACH, ids=lambda c: str(c["model_type"]))
def test_layer_types_of_any_kind(config: dict[str, Any]) -> None:
    inner = "text_config" if "text_config" in config else None
    for value in (
        [],
        ["x"],
        [1, 2],
        "full_attention",
        {"a": 1},
        ["full_attention"] * 10**6,
        [None] * 100,
        [[["a"]]],
        7,
    ):
        kind = asked(
            {**config, inner: {**config[inner], "layer_types": value}} if inner else {**config, "layer_types": value}
        )
        assert kind in ALLOWED, value


def fp8_without(*patterns: str) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "fp8", "modules_to_not_convert": list(patterns)}}


@pytest.mark.parametrize(
    "changes",
    [
        {"num_local_experts": 10**9},
        {"num_local_experts": 0},
        {"num_experts_per_tok": 99},
        {"vocab_size": 10**12},
        {"hidden_size": 4097},
        {"num_key_value_heads": 5},
        {"id2label": {str(i): "x" for i in range(10**5)}},
        {"architectures": ["\x1b[31mX"]},
        {"architectures": "MixtralForCausalLM"},
        {"architectures": [7]},
        {"torch_dtype": "\u202efp\x00"},
        {"torch_dtype": 16},
        {"quantization_config": "gptq"},
        {"quantization_config": {"quant_method": "gptq", "bits": 10**9}},
        {"quantization_config": {"quant_method": "fp8", "modules_to_not_convert": {"a": 1}}},
        {"rope_scaling": [1]},
        {"rope_parameters": {"partial_rotary_factor": -1}},
        {"rope_parameters": {"partial_rotary_factor": 1e300}},
        {"sliding_window": -5},
        {"sliding_window": 0},
        {"max_position_embeddings": -1},
        {"max_position_embeddings": 10**30},
        {"num_hidden_layers": 0},
        {"text_config": {"text_config": {"text_config": {}}}},
        {"text_config": []},
    ],
    ids=lambda c: str(c)[:60],
)
def test_a_mixture_of_experts_that_means_harm(changes: dict[str, Any]) -> None:
    start = time.process_time()
    assert asked({**MIXTRAL, **changes}) in ALLOWED
    assert time.process_time() - start < 2


MIXTRAL = next(f["config"] for f in FACTS if f["id"] == "mistralai/Mixtral-8x7B-v0.1")


def in_a_process(config: dict[str, Any], seconds: int) -> tuple[str, int]:
    """How it is answered within seconds of its own time, and the most memory in KiB that the process had."""
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))\n"
        "import json, sys; sys.path.insert(0, sys.argv[1]); import test_errors\n"
        "print(test_errors.asked(json.load(sys.stdin)))\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    done = subprocess.run(command, input=json.dumps(config), capture_output=True, text=True, timeout=120, check=True)
    kind, kilobytes = done.stdout.split()
    return kind, int(kilobytes)


@pytest.mark.parametrize(
    "patterns", [("*" * 40 + "!",), ("re:(.*)*(.*)*(.*)*!",), tuple(f"m.{i}" for i in range(2000))]
)
def test_patterns_that_mean_harm(patterns: tuple[str, ...]) -> None:
    kind, _ = in_a_process({**MIXTRAL, **fp8_without(*patterns)}, seconds=5)
    assert kind in ALLOWED


@pytest.mark.parametrize(
    "changes",
    [{"id2label": {str(i): "x" for i in range(10**5)}}, {"num_hidden_layers": 4096}, {"num_local_experts": 2**24}],
    ids=["labels", "layers", "experts"],
)
def test_in_little_memory(changes: dict[str, Any]) -> None:
    kind, kilobytes = in_a_process({**MIXTRAL, **changes}, seconds=20)
    assert kind in ALLOWED
    assert kilobytes < 300_000


@pytest.mark.parametrize("model", ["gpt2", "openai/whisper-tiny"])
def test_a_billion_new_tokens_in_little_memory(model: str) -> None:
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (10**9, 10**9))\n"
        "import hfvram; hfvram.estimate(sys.argv[1], offline=True, ctx=10**9, new_tokens=10**9 - 1)"
    )
    subprocess.run([sys.executable, "-c", code, model], capture_output=True, timeout=60, check=True)


def test_the_most_layers_there_can_be(tmp_path: Path) -> None:
    from hfvram.model.config import MAX_LAYERS

    start = time.process_time()
    assert asked({**LLAMA, "num_hidden_layers": MAX_LAYERS}) == "ok"
    assert time.process_time() - start < 3
    assert asked({**LLAMA, "num_hidden_layers": MAX_LAYERS + 1}) == "bad_config"


junk: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 20),
    st.sampled_from([64, 100, 4096, 16777216, 10**9, HUGE, 10**100, 0.5, 1e300, math.nan, math.inf]),
    st.text(max_size=6),
    st.sampled_from(["full_attention", "mamba", "M*E-", "\x1b[0m", "auto", "gelu"]),
    st.lists(st.sampled_from([1, 0, "full_attention", "mamba", None]), max_size=5),
    st.dictionaries(
        st.sampled_from(["hidden_size", "rope_type", "factor", "0", "bits"]), st.integers(-1, 9), max_size=2
    ),
)
requests = st.sampled_from(
    [
        Request(),
        Request(ctx=1),
        Request(ctx=2, batch=3, padding=True),
        Request(ctx=50_000, attention="eager"),
        Request(quant="none", kernels="fallback", ctx=300),
        Request(phase="prefill", batch=5),
        Request(allow_unknown=True),
    ]
)


def keys_of(config: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in config.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from keys_of(value, (*path, key))


def test_no_layers_at_all() -> None:
    assert asked({**LLAMA, "num_hidden_layers": 0}, Request(ctx=1)) in ALLOWED


def test_a_nested_type_of_mllama_that_is_none() -> None:
    config = next(c for c in ONE_OF_EACH if c["model_type"] == "mllama")
    assert asked(changed(config, ("text_config", "model_type"), "martian")) in ALLOWED


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(FACTS), st.data(), requests)
def test_real_configurations_with_anything_put_in(fact: dict[str, Any], data: st.DataObject, request: Request) -> None:
    config = fact["config"]
    for _ in range(data.draw(st.integers(1, 3))):
        path, value = data.draw(st.sampled_from(list(keys_of(config)))), data.draw(junk)
        config = changed(config, path, value)
    assert asked(config, request) in (*ALLOWED, "usage")


def test_every_family_is_among_them() -> None:
    known = {kind for kinds in MODULES.values() for kind in kinds}
    assert len(known & {c["model_type"] for c in ONE_OF_EACH}) > 50


def test_tensor_names_that_mean_harm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes(raw(model_type="martian"))
    evil = {"\x1b[31mred\x07": ("F32", (4, 4)), "..\n/x": ("F32", (3,)), "\u202e" * 1000: ("F32", (2,))}
    file = safetensors(evil)
    (tmp_path / "model.safetensors").write_bytes(file.head + bytes(file.size - len(file.head)))
    for options in ([], ["--allow-unknown"], ["--explain"], ["--json", "--allow-unknown"]):
        main([str(tmp_path), *options])
        out, err = capsys.readouterr()
        assert not set("\x1b\x07\u202e") & set(out + err)
