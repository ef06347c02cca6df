import os
import threading
from pathlib import Path

import pytest

from hfvram.read import cache


def entry(home: Path, name: str = "x") -> Path:
    return home / "hfvram" / "v1" / "models--a--b" / f"{name}.json.z"


def test_what_is_stored_is_loaded(hf_home: Path) -> None:
    assert cache.load("a/b", "x") is None
    cache.store("a/b", "x", {"k": [1, "é", None]})
    assert cache.load("a/b", "x") == {"k": [1, "é", None]}
    assert cache.load("a/c", "x") is None
    assert os.listdir(entry(hf_home).parent) == ["x.json.z"]


def test_names_stay_in_the_folder(hf_home: Path) -> None:
    cache.store("a/b", "at ../../../escape", {})
    assert cache.load("a/b", "at ../../../escape") == {}
    assert [p.name for p in entry(hf_home).parent.iterdir()] == ["at%20..%2F..%2F..%2Fescape.json.z"]
    assert list(hf_home.parent.rglob("escape*")) == []


def test_damaged_entries_count_as_absent(hf_home: Path) -> None:
    cache.store("a/b", "x", {"k": "value " * 50})
    good = entry(hf_home).read_bytes()
    for n in range(len(good)):
        entry(hf_home).write_bytes(good[:n])
        assert cache.load("a/b", "x") is None
        flipped = bytes([*good[:n], good[n] ^ 0x10, *good[n + 1 :]])
        entry(hf_home).write_bytes(flipped)
        assert cache.load("a/b", "x") in (None, {"k": "value " * 50})  # never anything else
    entry(hf_home).write_bytes(b"")
    assert cache.load("a/b", "x") is None
    cache.store("a/b", "x", {"k": 2})
    assert cache.load("a/b", "x") == {"k": 2}


def test_another_repository_in_the_same_folder_is_not_taken(hf_home: Path) -> None:
    """As on a file system that ignores case."""
    cache.store("a/b", "x", {})
    entry(hf_home).parent.rename(entry(hf_home).parent.with_name("models--A--B"))
    assert cache.load("A/B", "x") is None


def test_a_process_killed_while_writing_leaves_nothing_that_is_read(hf_home: Path) -> None:
    cache.store("a/b", "x", {"k": 1})
    entry(hf_home).with_name("x.json.z.99.aaaa.tmp").write_bytes(b"half of an ent")
    assert cache.load("a/b", "x") == {"k": 1}


@pytest.mark.parametrize("what", ["a file in its place", "a folder where the entry goes"])
def test_a_cache_that_cannot_be_written_is_done_without(hf_home: Path, what: str) -> None:
    if what.startswith("a file"):
        hf_home.write_text("not a folder")
    else:
        entry(hf_home).mkdir(parents=True)
    cache.store("a/b", "x", {"k": 1})
    assert cache.load("a/b", "x") is None
    if hf_home.is_dir():
        assert [p.name for p in entry(hf_home).parent.iterdir()] == ["x.json.z"]


def test_a_full_disk_is_done_without(hf_home: Path) -> None:
    import resource
    import signal

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        cache.store("a/b", "x", {"k": os.urandom(5000).hex()})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert cache.load("a/b", "x") is None
    assert list(entry(hf_home).parent.iterdir()) == []


def test_two_writers_at_once_never_show_half_an_entry(hf_home: Path) -> None:
    values = [{"k": str(i) * 20_000} for i in range(2)]
    cache.store("a/b", "x", values[0])
    stop = threading.Event()

    def write(value: dict[str, str]) -> None:
        while not stop.is_set():
            cache.store("a/b", "x", value)

    writers = [threading.Thread(target=write, args=(v,)) for v in values]
    for w in writers:
        w.start()
    try:
        assert all(cache.load("a/b", "x") in values for _ in range(300))
    finally:
        stop.set()
        for w in writers:
            w.join()


def test_downloads_of_huggingface_hub_are_found(hf_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "c" * 40
    root = hf_home / "hub" / "models--a--b"
    (root / "snapshots" / commit).mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    assert cache.snapshot("a/b", "main") == (commit, str(root / "snapshots" / commit))
    assert cache.snapshot("a/b", commit) == (commit, str(root / "snapshots" / commit))
    assert cache.snapshot("a/b", "v1") is None
    assert cache.snapshot("a/c", "main") is None
    (root / "refs" / "evil").write_text("../../../../x" + "." * 27)
    assert cache.snapshot("a/b", "evil") is None
    monkeypatch.setenv("HF_HUB_CACHE", str(hf_home / "elsewhere"))
    assert cache.snapshot("a/b", "main") is None


def test_the_home_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.hugging_face_home() == "/x/huggingface"
    monkeypatch.setenv("HF_HOME", "/y")
    assert cache.hugging_face_home() == "/y"
