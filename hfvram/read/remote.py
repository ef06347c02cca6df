"""A repository on the Hub at a commit, out of the cache where it lies there; whatever it had to ask for can be kept."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, TypeVar

from hfvram.errors import HfvramError
from hfvram.read import cache
from hfvram.read.checkpoint import Source, StoredTensor
from hfvram.read.cursor import Cursor, Span
from hfvram.read.folder import Contents
from hfvram.read.gguf import GgufHeader, parse_gguf
from hfvram.read.headers import header_length, parse_header
from hfvram.read.hub import CONNECTIONS, Hub
from hfvram.read.names import RepoName

FIRST_BYTES: Final = 768 << 10
"""Read of all shards together in the first round; a header that is longer takes a second request."""

GGUF_BYTES: Final = 64 << 10
"""Read of a GGUF file in the first round: what comes before the tokenizer, and often all of a later shard's header."""

_T = TypeVar("_T")


class HubFolder:
    """Files of a repository at a commit (`repo.revision`). `source` says whether the Hub had to be asked for any."""

    path = None

    def __init__(self, hub: Hub, repo: RepoName, files: frozenset[str], parameters: Mapping[str, int] | None) -> None:
        self.source: Source = "cache"
        self.id = repo.id
        self.commit = repo.revision
        self.files = files
        self.parameters = parameters
        self._hub = hub
        self._repo = repo
        self._texts: dict[str, bytes] = {}
        self._tensors: dict[str, tuple[StoredTensor, ...]] | None = None
        self._gguf: dict[str, GgufHeader] | None = None

    @classmethod
    def from_cache(cls, hub: Hub, repo: RepoName) -> "HubFolder | None":
        """What is kept of this commit, None where nothing is."""
        kept = cache.load(repo.id, repo.revision)
        if kept is None:
            return None
        folder = cls(hub, repo, frozenset(kept["files"]), kept["parameters"])
        folder._texts = {path: text.encode("latin-1") for path, text in kept["texts"].items()}
        return folder

    def read(self, texts: Sequence[str], headers: Sequence[str]) -> Contents:
        """Raises what `Hub` raises, `bad_header`, and `offline` where something isn't kept and may not be asked for."""
        tensors = self._kept_tensors() if headers else {}
        new_texts = [p for p in texts if p in self.files and p not in self._texts]
        new_headers = [p for p in headers if p in self.files and p not in tensors]
        if new_texts or new_headers:
            if self._hub.offline:
                missing = (new_texts + new_headers)[0]
                raise HfvramError("offline", f"{missing} of {self.id} is not in the cache: ask again without --offline")
            self.source = "hub"
            first = min(max(FIRST_BYTES // max(len(new_headers), 1), 32 << 10), 256 << 10)
            read_texts = [lambda p=p: self._hub.text(self._repo, p) for p in new_texts]
            read_headers = [lambda p=p: self._read_header(p, first) for p in new_headers]
            answers = _in_parallel([*read_texts, *read_headers])
            for path, answer in zip(new_texts + new_headers, answers, strict=True):
                if isinstance(answer, bytes):
                    self._texts[path] = answer
                elif answer is not None:
                    tensors[path] = answer
        return Contents(
            {p: self._texts[p] for p in texts if p in self._texts}, {p: tensors[p] for p in headers if p in tensors}
        )

    def read_gguf(self, paths: Sequence[str]) -> list[GgufHeader]:
        """Raises what `Hub` raises, `bad_header`, `missing_extra`, `no_config` where a file is gone, and `offline`."""
        kept = self._kept_gguf()
        if new := [p for p in paths if p not in kept]:
            if self._hub.offline:
                raise HfvramError("offline", f"{new[0]} of {self.id} is not in the cache: ask again without --offline")
            self.source = "hub"
            # several at a time read parts of their own several at a time: no more threads than connections
            read = [partial(self._read_gguf, p) for p in new]
            kept.update(zip(new, _in_parallel(read, most=4), strict=True))
        return [kept[p] for p in paths]

    def keep(self) -> None:
        """Put what was read into the cache. Called when it has proved good."""
        if self.source == "cache":
            return
        texts = {path: raw.decode("latin-1") for path, raw in self._texts.items()}
        kept = {"files": sorted(self.files), "parameters": self.parameters, "texts": texts}
        cache.store(self.id, self.commit, kept)
        if self._tensors:
            rows = {p: [[t.name, t.dtype, t.shape, t.nbytes] for t in table] for p, table in self._tensors.items()}
            cache.store(self.id, f"{self.commit}.tensors", rows)
        if self._gguf:
            headers = {
                p: {"metadata": dict(h.metadata), "tensors": [[t.name, t.dtype, t.shape, t.nbytes] for t in h.tensors]}
                for p, h in self._gguf.items()
            }
            cache.store(self.id, f"{self.commit}.gguf", headers)

    def _kept_gguf(self) -> dict[str, GgufHeader]:
        if self._gguf is None:
            self._gguf = {
                path: GgufHeader(
                    {k: tuple(v) if isinstance(v, list) else v for k, v in entry["metadata"].items()},
                    tuple(
                        StoredTensor(name, dtype, tuple(shape), size) for name, dtype, shape, size in entry["tensors"]
                    ),
                )
                for path, entry in (cache.load(self.id, f"{self.commit}.gguf") or {}).items()
            }
        return self._gguf

    def _read_gguf(self, path: str) -> GgufHeader:
        """The header by ranges, parts that only tell where something ends several at a time."""
        first = self._hub.part(self._repo, path, 0, GGUF_BYTES)
        if first is None:
            raise HfvramError("no_config", f"{path} of {self.id} is gone")

        def part(start: int, stop: int) -> bytes:
            if stop <= max(start, len(first.body)):
                return first.body[start:stop]
            found = self._hub.part(self._repo, path, start, stop, first.url)
            return found.body if found else b""

        def fetch(spans: Sequence[Span]) -> list[bytes]:
            return _in_parallel([partial(part, *span) for span in spans])

        cursor = Cursor(fetch, first.file_bytes, step=GGUF_BYTES, largest=GGUF_BYTES, leaps=True)
        return parse_gguf(cursor, f"{path} of {self.id}")

    def _kept_tensors(self) -> dict[str, tuple[StoredTensor, ...]]:
        if self._tensors is None:
            self._tensors = {
                path: tuple(StoredTensor(name, dtype, tuple(shape), size) for name, dtype, shape, size in rows)
                for path, rows in (cache.load(self.id, f"{self.commit}.tensors") or {}).items()
            }
        return self._tensors

    def _read_header(self, path: str, first: int) -> tuple[StoredTensor, ...] | None:
        where = f"{path} of {self.id}"
        part = self._hub.part(self._repo, path, 0, first)
        if part is None:
            return None
        length = header_length(part.body, part.file_bytes, where)
        raw = part.body[8 : 8 + length]
        if len(raw) < length:
            rest = self._hub.part(self._repo, path, 8 + len(raw), 8 + length, part.url)
            raw += rest.body if rest else b""
        if len(raw) < length:
            raise HfvramError("bad_header", f"{where} ends before its header does")
        return parse_header(raw, None if part.file_bytes is None else part.file_bytes - 8 - length, where)


def _in_parallel(tasks: Sequence[Callable[[], _T]], most: int = CONNECTIONS) -> list[_T]:
    """Results in order; the first failure, in order too, is raised, and what hasn't begun is dropped."""
    if len(tasks) == 1:
        return [tasks[0]()]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(most, len(tasks))) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
