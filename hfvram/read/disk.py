"""Files on this machine: small ones whole, of a safetensors file only its header."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from hfvram.errors import HfvramError
from hfvram.read.checkpoint import Source, StoredTensor
from hfvram.read.configuration import MAX_CONFIG_BYTES
from hfvram.read.cursor import Cursor
from hfvram.read.folder import Contents
from hfvram.read.gguf import GgufHeader, parse_gguf
from hfvram.read.headers import header_length, parse_header

MAX_FILES: Final = 20_000


@dataclass(frozen=True, slots=True)
class DiskFolder:
    """A folder on this machine: the user's own, or one that huggingface_hub keeps (`source="cache"`)."""

    id: str
    path: str
    files: frozenset[str]
    source: Source = "local"
    commit: str | None = None
    parameters: None = None

    def read(self, texts: Sequence[str], headers: Sequence[str]) -> Contents:
        """Raises `io` where a file can't be read, `bad_header`, and `bad_config` for one that is too large."""
        return Contents(
            {p: read_text(os.path.join(self.path, p)) for p in texts if p in self.files},
            {p: read_header(os.path.join(self.path, p)) for p in headers if p in self.files},
        )

    def read_gguf(self, paths: Sequence[str]) -> list[GgufHeader]:
        """Raises `io`, `bad_header`, `missing_extra`."""
        return [read_gguf(os.path.join(self.path, p)) for p in paths]


def list_files(path: str) -> frozenset[str]:
    """Regular files of a folder and of the folders in it, by relative path, if it can be printed. Raises `io`."""
    found: set[str] = set()

    def look(folder: str, prefix: str) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                if len(found) >= MAX_FILES:
                    return
                if not entry.name.isprintable():
                    continue
                if entry.is_file():
                    found.add(prefix + entry.name)
                elif not prefix and entry.is_dir() and not entry.name.startswith("."):
                    try:
                        look(entry.path, entry.name + "/")
                    except OSError:
                        continue  # a folder in it that isn't ours to read holds nothing for us

    try:
        look(path, "")
    except OSError as e:
        raise _io(path, e) from None
    return frozenset(found)


def read_text(path: str) -> bytes:
    """A small file, whole. Raises `io`, and `bad_config` past `MAX_CONFIG_BYTES`."""
    try:
        with open(path, "rb") as f:
            raw = f.read(MAX_CONFIG_BYTES + 1)
    except OSError as e:
        raise _io(path, e) from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise HfvramError("bad_config", f"{path} is larger than {MAX_CONFIG_BYTES // 10**6} MB: no configuration is")
    return raw


def read_header(path: str) -> tuple[StoredTensor, ...]:
    """The tensors of a safetensors file, of which only the header is read. Raises `io` and `bad_header`."""
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            length = header_length(f.read(8), size, path)
            raw = f.read(length)
    except OSError as e:
        raise _io(path, e) from None
    return parse_header(raw, size - 8 - length, path)


def read_gguf(path: str) -> GgufHeader:
    """The header of a GGUF file. Raises `io`, `bad_header`, `missing_extra`."""
    try:
        with open(path, "rb") as f:

            def fetch(spans: Sequence[tuple[int, int]]) -> list[bytes]:
                parts = []
                for start, stop in spans:
                    f.seek(start)
                    parts.append(f.read(stop - start))
                return parts

            size = os.fstat(f.fileno()).st_size
            return parse_gguf(Cursor(fetch, size, step=1 << 20, largest=1 << 20), path)
    except OSError as e:
        raise _io(path, e) from None


def _io(path: str, e: OSError) -> HfvramError:
    return HfvramError("io", f"{path} can't be read: {e.strerror or type(e).__name__}")
