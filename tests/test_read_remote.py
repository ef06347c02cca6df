import struct
from pathlib import Path

import pytest
from hub import FakeHub, Repo, Sparse, commit_of, header_bytes, safetensors

from hfvram.errors import HfvramError
from hfvram.read.hub import Hub
from hfvram.read.names import RepoName
from hfvram.read.remote import HubFolder

FIRST = 256 << 10  # bytes that the first request for a single file asks for


def folder_of(fake: FakeHub, repo_id: str = "a/b") -> HubFolder:
    info = Hub(fake.url, None).info(RepoName(repo_id))
    assert info.files is not None
    return HubFolder(Hub(fake.url, None), RepoName(repo_id, info.commit), info.files, None)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("total", [FIRST - 1, FIRST, FIRST + 1, FIRST + 8, 3 * FIRST])
@pytest.mark.parametrize("data", [0, 4])
def test_a_header_of_every_awkward_size(hf_home: Path, total: int, ranges: bool, data: int) -> None:
    """The length and the JSON end one byte before, at, and after what the first request asks for."""
    body = safetensors({"w": ("F32", (data // 4,))}, pad_to=total - 8)
    assert len(body.head) == total
    with FakeHub({"a/b": Repo({"w.safetensors": body})}, ranges=ranges) as fake:
        (tensor,) = folder_of(fake).read([], ["w.safetensors"]).tensors["w.safetensors"]
        assert tensor.nbytes == data
        asked = [a for a in fake.log if a.path.startswith("/cdn/")]
        assert len(asked) == (1 if total <= FIRST else 2)


@pytest.mark.parametrize(
    "body",
    [
        Sparse(b"", 0),
        Sparse(b"abc", 3),
        Sparse(struct.pack("<Q", 1 << 62), 100),
        Sparse(struct.pack("<Q", 99_999_999), 100),
        Sparse(struct.pack("<Q", 300_000) + b'{"a":', 200_000),
        Sparse(struct.pack("<Q", 20) + b"x" * 20, 28),
        Sparse(*((h := header_bytes({"w": ("F32", (4,))}))[0], len(h[0]) + 12)),  # four bytes short
    ],
)
@pytest.mark.parametrize("ranges", [True, False])
def test_broken_headers_are_told_from_the_network(hf_home: Path, body: Sparse, ranges: bool) -> None:
    with FakeHub({"a/b": Repo({"w.safetensors": body}, counted=False)}, ranges=ranges) as fake:
        with pytest.raises(HfvramError) as caught:
            folder_of(fake).read([], ["w.safetensors"])
        assert caught.value.kind == "bad_header"
        assert "w.safetensors" in caught.value.message
    assert not hf_home.exists()


def test_many_files_are_read_side_by_side(hf_home: Path) -> None:
    files = {f"{i}.safetensors": safetensors({f"w{i}": ("U8", (i,))}) for i in range(32)}
    with FakeHub({"a/b": Repo({**files, "c.json": b"{}"})}, latency=0.05) as fake:
        import time

        folder = folder_of(fake)
        start = time.monotonic()
        read = folder.read(["c.json", "absent.json"], sorted(files))
        assert time.monotonic() - start < 2  # one by one: 33 files × 2 requests × 0.05 s
        assert {p: t[0].nbytes for p, t in read.tensors.items()} == {f"{i}.safetensors": i for i in range(32)}
        assert read.texts == {"c.json": b"{}"}


def test_what_was_kept_is_read_without_the_hub(hf_home: Path) -> None:
    files = {"w.safetensors": safetensors({"w": ("BF16", (2, 3))}), "c.json": b'{"\xff": 1}'}
    with FakeHub({"a/b": Repo(files)}) as fake:
        folder = folder_of(fake)
        read = folder.read(["c.json"], ["w.safetensors"])
        assert folder.source == "hub"
        assert HubFolder.from_cache(Hub(fake.url, None), RepoName("a/b", commit_of(files))) is None
        folder.keep()
    again = HubFolder.from_cache(Hub("http://127.0.0.1:1", None, offline=True), RepoName("a/b", commit_of(files)))
    assert again is not None
    assert again.read(["c.json"], ["w.safetensors"]) == read
    assert again.source == "cache"
    assert again.files == frozenset(files)


def test_offline_what_was_not_kept_is_an_error(hf_home: Path) -> None:
    folder = HubFolder(Hub("http://127.0.0.1:1", None, offline=True), RepoName("a/b", "c" * 40), frozenset(["x"]), None)
    with pytest.raises(HfvramError) as caught:
        folder.read(["x"], [])
    assert caught.value.kind == "offline"
