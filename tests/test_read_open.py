import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub import TOKEN, FakeHub, Repo, commit_of, safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hfvram.errors import HfvramError
from hfvram.read.checkpoint import Checkpoint
from hfvram.read.open import read_all_headers, read_checkpoint

CONFIG = json.dumps({"model_type": "llama", "hidden_size": 8}).encode()
MIXTRAL = "mistralai/Mixtral-8x7B-v0.1"


def model(shards: int = 1, **more: bytes) -> dict[str, object]:
    names = (
        [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
        if shards > 1
        else ["model.safetensors"]
    )
    weights = {n: safetensors({f"w{i}": ("BF16", (10, 10))}) for i, n in enumerate(names)}
    return {"config.json": CONFIG, **weights, **{k.replace("__", "."): v for k, v in more.items()}}


@pytest.fixture
def hub(hf_home: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    repos = {
        "a/small": Repo(model(generation_config__json=b'{"use_cache": true}')),  # type: ignore[arg-type]
        "a/eight": Repo(model(8)),  # type: ignore[arg-type]
        "a/big-v0.1": Repo(model(19), revisions={"dev": model(18), "tag": {"config.json": CONFIG}}),  # type: ignore[arg-type, dict-item]
        "a/uncounted": Repo(model(9), counted=False),  # type: ignore[arg-type]
        "a/gated": Repo(model(), gated=True),  # type: ignore[arg-type]
        MIXTRAL: Repo(model(), gated=True),  # type: ignore[arg-type]
        "a/private": Repo(model(), private=True),  # type: ignore[arg-type]
        "a/bins": Repo({"config.json": CONFIG, "pytorch_model.bin": b"\0"}),
        "a/two-v1": Repo(model()),  # type: ignore[arg-type]
        "a/two-hf": Repo(model()),  # type: ignore[arg-type]
        "old": Repo({}, moved_to="a/small"),
        "a/lora": Repo(
            {
                "adapter_config.json": json.dumps(
                    {"peft_type": "LORA", "base_model_name_or_path": "a/big-v0.1", "revision": "dev"}
                ).encode(),
                "adapter_model.safetensors": safetensors({"lora_A": ("F32", (16, 8))}),
            }
        ),
        "a/gguf": Repo({"m.Q4_K_M.gguf": b"GGUF"}),
        "a/empty": Repo({"README.md": b""}),
        "a/broken": Repo({"config.json": b"{nope"}),
    }
    with FakeHub(repos) as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        yield fake


def kind_of(name: str, **options: object) -> str:
    with pytest.raises(HfvramError) as caught:
        read_checkpoint(name, **options)  # type: ignore[arg-type]
    assert caught.value.message.isprintable()
    return caught.value.kind


def without(checkpoint: Checkpoint, *fields: str) -> dict[str, object]:
    return {f: getattr(checkpoint, f) for f in checkpoint.__dataclass_fields__ if f not in fields}


def test_a_model_cold_and_cached(hub: FakeHub) -> None:
    cold = read_checkpoint("a/small")
    assert (cold.id, cold.source, cold.commit) == ("a/small", "hub", commit_of(hub.repos["a/small"].files))
    assert cold.config["hidden_size"] == 8
    assert cold.generation_config == {"use_cache": True}
    assert cold.parameters_by_dtype == {"BF16": 100}
    assert cold.tensors is not None
    assert len(hub.log) == 7  # the repository; three files, each with its redirect
    assert cold.warnings == ()

    hub.log.clear()
    cached = read_checkpoint("a/small")
    assert without(cached, "source") == without(cold, "source")
    assert cached.source == "cache"
    assert [(a.status, a.sent < 200) for a in hub.log] == [(200, True)]

    hub.log.clear()
    for options in ({"offline": True}, {"revision": cold.commit}):
        assert without(read_checkpoint("a/small", **options), "source") == without(cold, "source")  # type: ignore[arg-type]
    assert hub.log == []


def test_a_new_commit_is_seen(hub: FakeHub) -> None:
    read_checkpoint("a/small")
    hub.repos["a/small"].files["config.json"] = b'{"hidden_size": 16}'
    assert read_checkpoint("a/small").config == {"hidden_size": 16}


def test_many_shards_are_counted_by_the_hub(hub: FakeHub) -> None:
    big = read_checkpoint("a/big-v0.1")
    assert big.tensors is None
    assert big.parameters_by_dtype == {"BF16": 1900}
    assert len(hub.log) == 3
    full = read_all_headers(big)
    assert full.tensors is not None
    assert len(full.tensors) == 19
    hub.log.clear()
    assert read_all_headers(big).tensors == full.tensors
    assert hub.log == []
    assert len(read_checkpoint("a/eight").tensors or ()) == 8
    assert len(read_checkpoint("a/uncounted").tensors or ()) == 9


def test_the_hubs_count_is_of_the_main_branch(hub: FakeHub) -> None:
    """For another revision the headers are read, unless it is the same commit."""
    dev = read_checkpoint("a/big-v0.1@dev")
    assert (dev.parameters_by_dtype, len(dev.tensors or ())) == (None, 18)
    hub.log.clear()
    pinned = read_checkpoint("a/big-v0.1", revision=commit_of(hub.repos["a/big-v0.1"].files))
    assert pinned.parameters_by_dtype == {"BF16": 1900}
    assert len(hub.log) == 4


def test_a_cold_mixtral_sized_answer_is_small(hub: FakeHub) -> None:
    hub.latency = 0.05
    start = time.monotonic()
    read_checkpoint("a/big")
    assert time.monotonic() - start < 1
    assert len(hub.log) <= 30
    assert sum(a.sent for a in hub.log) < 10**6


def test_a_name_is_completed(hub: FakeHub) -> None:
    found = read_checkpoint("a/big")
    assert found.id == "a/big-v0.1"
    assert found.warnings == ("there is no model a/big: taken as a/big-v0.1",)
    hub.log.clear()
    assert without(read_checkpoint("a/big"), "source") == without(found, "source")
    assert len(hub.log) == 1
    assert read_checkpoint("a/big", offline=True).warnings == found.warnings
    assert read_checkpoint("A/Small").id == "a/small"
    with pytest.raises(HfvramError, match="did you mean a/two-hf, a/two-v1") as caught:
        read_checkpoint("a/two")
    assert caught.value.kind == "not_found"
    assert kind_of("a/sm") == "not_found"


def test_a_repository_that_moved(hub: FakeHub) -> None:
    assert read_checkpoint("old").id == "a/small"
    assert read_checkpoint("old", offline=True).id == "a/small"


def test_each_error_has_its_kind(hub: FakeHub) -> None:
    assert kind_of("a/missing") == "not_found"
    assert kind_of("./missing") == "not_found"
    assert kind_of("a/private") == "not_found"
    assert kind_of("a/small@v9") == "revision_not_found"
    assert kind_of("a/gated") == "gated"
    assert kind_of("a/gated", token="hf_other") == "gated"
    assert kind_of("a/small", token="nonsense") == "unauthorized"
    assert kind_of("a/small", offline=True) == "offline"
    assert kind_of("a/empty") == "no_config"
    assert kind_of("a/broken") == "bad_config"
    assert kind_of("a/gguf") == "bad_header"
    assert kind_of("a/small", file="other.safetensors") == "usage"
    assert read_checkpoint("a/bins").tensors is None


def test_a_token_opens_and_is_not_kept(hub: FakeHub, hf_home: Path) -> None:
    assert read_checkpoint("a/gated", token=TOKEN).config["hidden_size"] == 8
    assert read_checkpoint("a/private", token=TOKEN).config["hidden_size"] == 8
    assert {a.host.split(":")[0] for a in hub.log if a.token} == {"127.0.0.1"}
    import zlib

    kept = [zlib.decompress(p.read_bytes()) for p in hf_home.rglob("*.z")]
    assert len(kept) == 6
    assert not any(TOKEN.encode() in entry for entry in kept)


def test_nothing_is_left_behind_by_a_failure(hub: FakeHub, hf_home: Path) -> None:
    for name in ("a/broken", "a/missing", "a/gated", "a/empty", "a/two"):
        kind_of(name)
    hub.only, hub.always = "model.safetensors", "truncate"
    assert kind_of("a/small") == "network"
    assert not hf_home.exists()


def test_faults_on_the_way_are_survived(hub: FakeHub) -> None:
    for i, fault in enumerate(["500", "reset", "truncate", "429 0"] * 2):
        hub.faults.extend([""] * (i % 4) + [fault])
        assert read_checkpoint("a/eight", revision=None).parameters_by_dtype == {"BF16": 800}
        hub.faults.clear()


def test_a_damaged_cache_and_no_hub_is_told_as_no_hub(hub: FakeHub, hf_home: Path) -> None:
    read_checkpoint("a/small")
    (commit,) = hf_home.rglob(f"{commit_of(hub.repos['a/small'].files)}.json.z")
    commit.write_bytes(b"")
    hub.always = "500"
    assert kind_of("a/small") == "network"


def test_damaged_cache_entries_are_read_again(hub: FakeHub, hf_home: Path) -> None:
    cold = read_checkpoint("a/small")
    entries = list(hf_home.rglob("*.z"))
    assert len(entries) == 3
    for path in entries:
        for bad in (b"", path.read_bytes()[:-3], b"\0" * 50, b'{"files": 3}'):
            path.write_bytes(bad)
            assert without(read_checkpoint("a/small"), "source") == without(cold, "source")


def test_a_cache_that_cannot_be_written(hub: FakeHub, hf_home: Path) -> None:
    hf_home.write_text("in the way")
    assert read_checkpoint("a/small").source == "hub"
    assert len(read_all_headers(read_checkpoint("a/big-v0.1")).tensors or ()) == 19


def test_the_cache_answers_when_the_hub_is_gone(hub: FakeHub) -> None:
    read_checkpoint("a/small")
    hub.always = "500"
    gone = read_checkpoint("a/small")
    assert gone.source == "cache"
    assert "answered from the cache" in gone.warnings[0]


@pytest.mark.parametrize("how", ["offline", "HF_HUB_OFFLINE", "unreachable", "gated", "500"])
def test_the_catalogue_answers_where_the_hub_does_not(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    elif how == "unreachable":
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    elif how == "500":
        hub.always = "500"
    start = time.monotonic()
    found = read_checkpoint(MIXTRAL, offline=how == "offline")
    assert time.monotonic() - start < 2
    assert (found.source, found.commit, found.tensors) == ("catalogue", None, None)
    assert sum((found.parameters_by_dtype or {}).values()) == 46_702_792_704  # truth: the published headers
    assert found.config["num_local_experts"] == 8
    assert "built-in catalogue of 20" in found.warnings[0]
    assert read_all_headers(found) == found
    assert (len(hub.log) == 0) == (how in ("offline", "HF_HUB_OFFLINE", "unreachable"))


def test_the_catalogue_completes_names_too(hf_home: Path) -> None:
    found = read_checkpoint("mistralai/Mixtral-8x7B", offline=True)
    assert found.id == MIXTRAL
    assert found.warnings[0] == f"there is no model mistralai/Mixtral-8x7B: taken as {MIXTRAL}"
    with pytest.raises(HfvramError, match=r"the catalogue knows mistralai/Mistral-7B-v0\.1, ") as caught:
        read_checkpoint("mistralai/Mistral-7B", offline=True)
    assert caught.value.kind == "offline"


def test_the_catalogue_knows_no_revisions(hf_home: Path) -> None:
    with pytest.raises(HfvramError, match="only at main") as caught:
        read_checkpoint(f"{MIXTRAL}@v2", offline=True)
    assert caught.value.kind == "offline"


def test_downloads_of_huggingface_hub_are_used(hub: FakeHub, hf_home: Path) -> None:
    commit = commit_of(hub.repos["a/small"].files)
    root = hf_home / "hub" / "models--a--small"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_bytes(CONFIG)
    part = read_checkpoint("a/small", offline=True)
    assert (part.source, part.commit, part.tensors) == ("cache", commit, None)
    assert kind_of("a/small@v1", offline=True) == "offline"
    weights = hub.repos["a/small"].files["model.safetensors"]
    (snapshot / "model.safetensors").write_bytes(weights.head + bytes(weights.size - len(weights.head)))  # type: ignore[union-attr]
    whole = read_checkpoint("a/small", revision=commit)
    assert (whole.source, len(whole.tensors or ())) == ("cache", 1)
    assert hub.log == []


def test_an_adapter_comes_with_its_base_at_its_revision(hub: FakeHub) -> None:
    read = read_checkpoint("a/lora")
    assert (read.id, read.commit) == ("a/big-v0.1", commit_of(hub.repos["a/big-v0.1"].revisions["dev"]))
    assert read.adapter is not None
    assert read.adapter.id == "a/lora"
    assert [t.shape for t in read.adapter.tensors or ()] == [(16, 8)]
    hub.log.clear()
    assert read_checkpoint("a/lora") == read_checkpoint("a/lora", offline=True)
    assert len(hub.log) == 2


def adapter_on(base: object, revision: object = None) -> Repo:
    return Repo({"adapter_config.json": json.dumps({"base_model_name_or_path": base, "revision": revision}).encode()})


def test_adapters_that_rest_on_nothing(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(CONFIG)
    bases = {"none": None, "number": 3, "loop": "a/on-loop", "path": str(tmp_path), "up": "../../x", "gone": "a/gone"}
    for name, base in bases.items():
        hub.repos[f"a/on-{name}"] = adapter_on(base)
    hub.repos["a/ping"], hub.repos["a/pong"] = adapter_on("a/pong"), adapter_on("a/ping")
    hub.repos["a/bad-revision"] = adapter_on("a/small", "../x")
    kinds = {n: kind_of(f"a/on-{n}") for n in bases}
    # an adapter from the Hub may not name a folder of this machine
    assert kinds == {
        "none": "no_config", "number": "no_config", "loop": "no_config", "path": "not_found", "up": "not_found",
        "gone": "not_found",
    }  # fmt: skip
    assert kind_of("a/ping") == "no_config"
    assert kind_of("a/bad-revision") == "revision_not_found"


def test_an_adapter_on_an_adapter_is_told(hub: FakeHub) -> None:
    hub.repos["a/second"] = adapter_on("a/lora")
    read = read_checkpoint("a/second")
    assert read.adapter is not None
    assert (read.id, read.adapter.id) == ("a/big-v0.1", "a/second")
    assert "itself an adapter, a/lora" in read.warnings[0]


def test_local_models(hf_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    folder = tmp_path / "here" / "m"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(CONFIG)
    for name, count in (("model", 2), ("other", 3)):
        body = safetensors({"w": ("U8", (count,))})
        (folder / f"{name}.safetensors").write_bytes(body.head + bytes(count))
    (folder / "odd-name.json").write_bytes(b'{"hidden_size": 1}')
    (folder / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path / "here")

    def size(name: str) -> int | None:
        tensors = read_checkpoint(name).tensors
        return tensors[0].nbytes if tensors else None

    assert [size(n) for n in ("m", "./m", str(folder), "m/config.json", "m/model.safetensors")] == [2] * 5
    assert size("m/other.safetensors") == 3
    assert read_checkpoint("m/odd-name.json").config == {"hidden_size": 1}
    assert size("m/odd-name.json") is None
    assert read_checkpoint("m").source == "local"
    assert kind_of("m/x.gguf") == "bad_header"
    assert kind_of("m/absent.json") == "not_found"
    assert kind_of("/dev/null") == "io"
    (tmp_path / "here" / "lone.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert kind_of("lone.safetensors") == "no_config"

    lora = tmp_path / "here" / "lora"
    lora.mkdir()
    for base in ("../m", str(folder), "m"):  # beside the adapter, anywhere, in the folder one stands in
        (lora / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        read = read_checkpoint("lora")
        assert read.adapter is not None
        assert (read.adapter.id, read.tensors and read.tensors[0].nbytes) == ("lora", 2)
    (lora / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(lora)}))
    assert kind_of("lora") == "no_config"


def test_a_file_name_with_escapes_does_not_reach_the_terminal(hf_home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a\x1b[31mb"
    folder.mkdir()
    assert kind_of(str(folder)) == "no_config"
    (folder / "config.json").write_bytes(CONFIG)
    assert read_checkpoint(str(folder)).id.isprintable()


def test_a_folder_that_is_not_ours_to_read(hf_home: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (tmp_path / "config.json").write_bytes(CONFIG)
    (tmp_path / "config.json").chmod(0)
    assert kind_of(str(tmp_path)) == "io"


def test_what_is_cached_needs_no_http_library(hub: FakeHub) -> None:
    def loaded(**options: object) -> list[str]:
        code = f"""
import sys
from hfvram.read.open import read_checkpoint
assert read_checkpoint("a/small", **{options!r}).source == "cache"
print(*[m for m in ("httpx", "huggingface_hub", "ssl", "torch", "transformers", "numpy") if m in sys.modules])
"""
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return ran.stdout.split()

    commit = read_checkpoint("a/small").commit
    assert loaded(offline=True) == []
    assert loaded(revision=commit) == []
    assert loaded() == ["httpx", "huggingface_hub", "ssl"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=st.binary(max_size=60), header=st.binary(max_size=60))
def test_random_bytes_never_crash(tmp_path: Path, config: bytes, header: bytes) -> None:
    (tmp_path / "config.json").write_bytes(config)
    (tmp_path / "model.safetensors").write_bytes(header)
    try:
        read_checkpoint(str(tmp_path))
    except HfvramError as e:
        assert e.kind in ("bad_config", "bad_header")  # noqa: PT017


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=40))
def test_random_names_never_crash(hf_home: Path, name: str) -> None:
    try:
        read_checkpoint(name, offline=True)
    except HfvramError as e:
        assert e.message.isprintable()  # noqa: PT017
