import os
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from ggufs import LLAMA, Tensors, gguf, llama
from hub import FakeHub, Repo, Sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from hfvram.errors import HfvramError
from hfvram.read.checkpoint import Checkpoint, StoredTensor
from hfvram.read.cursor import Cursor
from hfvram.read.gguf import GgufHeader, block_sizes, parse_gguf
from hfvram.read.open import read_checkpoint

MB = 10**6
TWO: Tensors = {"token_embd.weight": ("Q4_K", (3, 256)), "output_norm.weight": ("F32", (5,))}


def on_disk(path: Path, file: Sparse) -> str:
    path.write_bytes(file.head)
    os.truncate(path, file.size)
    return str(path)


def parsed(raw: bytes, size: int | None = None, leaps: bool = False) -> GgufHeader:
    def fetch(spans: object) -> list[bytes]:
        return [raw[a:b] for a, b in spans]  # type: ignore[attr-defined]

    step = 64 << 10 if leaps else 1 << 20
    return parse_gguf(Cursor(fetch, size or len(raw), step=step, largest=step, leaps=leaps), "x.gguf")


def refused(raw: bytes, size: int | None = None) -> str:
    with pytest.raises(HfvramError) as caught:
        parsed(raw, size)
    assert caught.value.kind == "bad_header"
    return caught.value.message


def test_a_file_as_its_own_package_reads_it(tmp_path: Path) -> None:
    file = gguf("llama", {**LLAMA, "rope.scaling.factors": [1.0, 2.0]}, llama(), tokens=50, merges=60, scores=True)
    path = on_disk(tmp_path / "m.gguf", file)
    found = read_checkpoint(path)
    from gguf import GGUFReader

    reader = GGUFReader(path)
    assert found.tensors is not None
    assert {t.name: (t.dtype, t.shape, t.nbytes) for t in found.tensors} == {
        t.name: (t.tensor_type.name, tuple(int(n) for n in t.shape[::-1]), int(t.n_bytes)) for t in reader.tensors
    }
    assert found.gguf is not None
    assert found.gguf["general.architecture"] == "llama"
    assert found.gguf["llama.attention.head_count_kv"] == 2
    assert found.gguf["llama.rope.scaling.factors"] == (1.0, 2.0)
    assert "tokenizer.ggml.tokens" not in found.gguf
    assert "tokenizer.chat_template" not in found.gguf


def test_sizes_by_hand() -> None:
    # Q4_K: 144 bytes for 256 numbers; 3 rows of one block. F32: 5 numbers of 4 bytes
    assert parsed(gguf("llama", {}, TWO).head, gguf("llama", {}, TWO).size).tensors == (
        StoredTensor("token_embd.weight", "Q4_K", (3, 256), 432),
        StoredTensor("output_norm.weight", "F32", (5,), 20),
    )
    assert block_sizes()["Q8_0"] == (32, 34)


@pytest.mark.parametrize(
    ("tokens", "merges", "scores"),
    [
        pytest.param(0, 0, False, id="none"),
        pytest.param(128_256, 280_147, False, id="llama 3"),
        pytest.param(262_144, 0, True, id="gemma", marks=pytest.mark.slow),
        pytest.param(262_144, 500_000, True, id="large", marks=pytest.mark.slow),
    ],
)
def test_a_large_tokenizer_is_passed_without_reading_it(
    tokens: int, merges: int, scores: bool, tmp_path: Path, hf_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = gguf("llama", LLAMA, llama(8), tokens=tokens, merges=merges, scores=scores)
    with FakeHub({"a/m": Repo({"m-Q4_K_M.gguf": file})}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        found = read_checkpoint("a/m")
        assert sum(a.sent for a in hub.log) <= 2 * MB
        asked = len(hub.log)
        assert read_checkpoint("a/m").tensors == found.tensors
        assert len(hub.log) == asked + 1
    whole = read_checkpoint(on_disk(tmp_path / "m.gguf", file))
    assert found.tensors == whole.tensors
    assert len(found.tensors or ()) == 75
    assert set(found.gguf or ()) == set(whole.gguf or ())


def test_where_a_leap_goes_wrong_all_is_read() -> None:
    """The size of the file tells: here there is more behind the tensors, as no leap could have known."""
    file = gguf("llama", LLAMA, llama(), tokens=60_000, merges=60_000)
    raw = file.head + b"\0" * (file.size - len(file.head))
    assert parsed(raw + b"x" * 1000, leaps=True) == parsed(raw)


def test_shards_are_one_model(tmp_path: Path, hf_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = llama()
    names = list(tensors)
    parts = [
        gguf("llama", LLAMA, {n: tensors[n] for n in names[:9]}, tokens=100, split=(0, 2)),
        gguf("llama", {}, {n: tensors[n] for n in names[9:]}, split=(1, 2)),
    ]
    files = {f"q/m-Q4_K_M-{i:05d}-of-00002.gguf": part for i, part in enumerate(parts, 1)}
    (tmp_path / "q").mkdir()
    for name, part in files.items():
        on_disk(tmp_path / name, part)
    with FakeHub({"a/m": Repo({**files, "mmproj-F16.gguf": parts[0]})}) as hub:  # type: ignore[dict-item]
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        found = read_checkpoint("a/m")
    assert [t.name for t in found.tensors or ()] == names
    assert "mmproj-F16.gguf" in found.warnings[0]
    assert read_checkpoint(str(tmp_path / "q" / "m-Q4_K_M-00001-of-00002.gguf")).tensors == found.tensors
    (tmp_path / "q" / "m-Q4_K_M-00002-of-00002.gguf").unlink()
    with pytest.raises(HfvramError, match="1 of the 2 parts"):
        read_checkpoint(str(tmp_path / "q" / "m-Q4_K_M-00001-of-00002.gguf"))


def test_every_truncation_is_told(tmp_path: Path) -> None:
    file = gguf("llama", LLAMA, TWO, tokens=20)
    raw = file.head + b"\0" * (file.size - len(file.head))
    for length in [*range(0, len(file.head), 7), len(raw) - 32]:
        assert "x.gguf" in refused(raw[:length])


def header(tensors: int = 0, pairs: int = 0, body: bytes = b"", magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, pairs) + body


def text(s: str) -> bytes:
    return struct.pack("<Q", len(s)) + s.encode()


def info(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


HOSTILE = {
    "magic": header(magic=b"GGML"),
    "version 1": header(version=1),
    "version 9": header(version=9),
    "tensors": header(tensors=1 << 60),
    "keys": header(pairs=1 << 60),
    "key's length": header(pairs=1, body=struct.pack("<Q", 1 << 62)),
    "value's length": header(pairs=1, body=text("a.b") + struct.pack("<IQ", 8, 1 << 62)),
    "strings": header(pairs=1, body=text("a.b") + struct.pack("<IIQ", 9, 8, 1 << 61)),
    "numbers": header(pairs=1, body=text("a.b") + struct.pack("<IIQ", 9, 4, 1 << 61)),
    "nested": header(pairs=1, body=text("a.b") + struct.pack("<IIQ", 9, 9, 1)),
    "unknown value": header(pairs=1, body=text("a.b") + struct.pack("<IQ", 99, 1)),
    "alignment 0": header(pairs=1, body=text("general.alignment") + struct.pack("<II", 4, 0)),
    "alignment 3": header(pairs=1, body=text("general.alignment") + struct.pack("<II", 4, 3)),
    "rank": header(tensors=1, body=text("a") + struct.pack("<I", 1 << 30)),
    "shape": header(tensors=1, body=info("a", (1 << 62, 1 << 62), 0, 0)),
    "empty": header(tensors=1, body=info("a", (0,), 0, 0)),
    "past the end": header(tensors=1, body=info("a", (1 << 20,), 0, 0)),
    "hole": header(tensors=1, body=info("a", (8,), 0, 32)) + bytes(256),
    "overlap": header(tensors=2, body=info("a", (32,), 0, 0) + info("b", (8,), 0, 32)) + bytes(256),
    "twice": header(tensors=2, body=info("a", (8,), 0, 0) + info("a", (8,), 0, 32)) + bytes(256),
    "half a block": header(tensors=1, body=info("a", (100,), 12, 0)) + bytes(256),
    "name": header(tensors=1, body=struct.pack("<Q", 3) + b"\xff\xfe\xfd" + bytes(64)),
}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers_are_refused_quickly_and_in_little_memory(raw: bytes) -> None:
    parsed(header())  # the package is imported
    tracemalloc.start()
    began = time.perf_counter()
    refused(raw)
    assert time.perf_counter() - began < 0.2
    assert tracemalloc.get_traced_memory()[1] < 2 * MB
    tracemalloc.stop()


def test_big_endian_is_named() -> None:
    assert "big-endian" in refused(gguf("llama", LLAMA, TWO, big_endian=True).head)


def test_an_array_of_empty_strings_in_a_huge_file_ends_soon(tmp_path: Path) -> None:
    raw = header(pairs=1, body=text("a.b") + struct.pack("<IIQ", 9, 8, 1 << 40))
    began = time.perf_counter()
    assert "strings" in refused(raw, size=1 << 44)
    raw = header(tensors=1, pairs=1, body=text("a.b") + struct.pack("<IIQ", 9, 8, 1_999_999))
    path = on_disk(tmp_path / "x.gguf", Sparse(raw, 1 << 33))
    with pytest.raises(HfvramError, match=r"x\.gguf"):
        read_checkpoint(path)
    assert time.perf_counter() - began < 5


def test_a_type_of_a_fork_has_the_bytes_up_to_the_next_tensor() -> None:
    raw = header(tensors=2, body=info("a", (256, 2), 139, 0) + info("b", (8,), 0, 288))
    raw += bytes(-len(raw) % 32) + bytes(288 + 32)
    assert parsed(raw).tensors[0] == StoredTensor("a", "type 139", (2, 256), 288)


def outcome(raw: bytes, leaps: bool) -> str | None:
    """The kind of error, None for a header."""
    try:
        parsed(raw, leaps=leaps)
    except HfvramError as error:
        return error.kind
    return None


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_are_refused_and_nothing_else(raw: bytes, leaps: bool) -> None:
    error = outcome(b"GGUF\x03\0\0\0" + raw, leaps)
    assert error == "bad_header" or (error is None and raw[:16] == bytes(16))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2000), st.binary(min_size=1, max_size=12))
def test_damage_is_refused_or_harmless(at: int, damage: bytes) -> None:
    file = gguf("llama", LLAMA, TWO, tokens=9)
    raw = bytearray(file.head + b"\0" * (file.size - len(file.head)))
    raw[at % len(raw) : at % len(raw) + len(damage)] = damage
    assert outcome(bytes(raw), False) in (None, "bad_header")


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from hfvram.read.gguf import constants, types

    path = on_disk(tmp_path / "m.gguf", gguf("llama", LLAMA, TWO))
    types.cache_clear()
    constants.cache_clear()
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.delitem(sys.modules, "gguf")
    with pytest.raises(HfvramError, match=r"hfvram\[gguf\]") as caught:
        read_checkpoint(path)
    assert caught.value.kind == "missing_extra"
    types.cache_clear()


def kind(found: Checkpoint) -> str | None:
    return found.gguf and found.gguf["general.architecture"]  # type: ignore[return-value]


def test_what_of_a_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    on_disk(tmp_path / "m-Q4_K_M.gguf", gguf("llama", LLAMA, TWO))
    assert kind(read_checkpoint(str(tmp_path))) == "llama"
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert kind(read_checkpoint(str(tmp_path))) is None
    assert kind(read_checkpoint(str(tmp_path), file="q4_k_m")) == "llama"
