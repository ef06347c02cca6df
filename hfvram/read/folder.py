"""A folder of published files, wherever it lies: what `repository` needs to know of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from hfvram.read.checkpoint import Source, StoredTensor
from hfvram.read.gguf import GgufHeader


@dataclass(frozen=True, slots=True)
class Contents:
    """What was read of a folder: the bytes of small files, and the tensors that headers declare, by path."""

    texts: Mapping[str, bytes]
    tensors: Mapping[str, tuple[StoredTensor, ...]]


class Folder(Protocol):
    """Files by path, `/` between the parts; on disk, or a repository on the Hub at a commit."""

    @property
    def id(self) -> str: ...
    @property
    def source(self) -> Source: ...
    @property
    def commit(self) -> str | None: ...
    @property
    def path(self) -> str | None: ...
    @property
    def files(self) -> frozenset[str]: ...
    @property
    def parameters(self) -> Mapping[str, int] | None:
        """The Hub's own count of stored elements by dtype."""

    def read(self, texts: Sequence[str], headers: Sequence[str]) -> Contents:
        """Small files and safetensors headers, all at once. What isn't in `files` is left out."""

    def read_gguf(self, paths: Sequence[str]) -> list[GgufHeader]:
        """The headers of GGUF files, all at once."""
