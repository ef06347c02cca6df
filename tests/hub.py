"""A small Hub over real HTTP on loopback: repositories in memory, redirects as the real one's, and ways to misbehave.

Large files are redirected to another host name (`localhost` for `127.0.0.1`), as the Hub does with its CDN, so that a
token that travels too far is seen in the log.
"""

import base64
import hashlib
import json
import math
import re
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hfvram.read.headers import BITS

TOKEN = "hf_good"  # may read everything; any other hf_… reads what is public; anything else is no token


@dataclass(frozen=True)
class Sparse:
    """A file whose bytes after `head` are zeros that exist nowhere."""

    head: bytes
    size: int


@dataclass
class Repo:
    files: dict[str, "bytes | Sparse"]
    revisions: dict[str, dict[str, "bytes | Sparse"]] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    counted: bool = True  # whether the Hub gives its own count of parameters
    moved_to: str | None = None
    pulls: list[dict[str, Any]] = field(default_factory=list)  # pull requests, as they were sent

    def at(self, revision: str) -> dict[str, "bytes | Sparse"] | None:
        every = {"main": self.files, **self.revisions}
        return (
            every[revision]
            if revision in every
            else next((f for f in every.values() if commit_of(f) == revision), None)
        )


@dataclass
class Asked:
    """One request as the server saw it; `sent` grows while the answer goes out."""

    path: str
    host: str
    token: str | None
    range: str | None
    agent: str
    status: int = 0
    sent: int = 0


def commit_of(files: Mapping[str, "bytes | Sparse"]) -> str:
    text = repr(sorted((k, v if isinstance(v, bytes) else (_digest(v.head), v.size)) for k, v in files.items()))
    return hashlib.sha1(text.encode()).hexdigest()


@lru_cache(maxsize=64)
def _digest(head: bytes) -> str:
    return hashlib.sha1(head).hexdigest()


def header_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]], pad_to: int | None = None) -> tuple[bytes, int]:
    """Length, JSON and the size of the data of a safetensors file; spaces fill the JSON up to `pad_to`."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + math.prod(shape) * BITS[dtype] // 8
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * ((pad_to or len(raw)) - len(raw))
    return struct.pack("<Q", len(raw)) + raw, at


def safetensors(tensors: Mapping[str, tuple[str, tuple[int, ...]]], pad_to: int | None = None) -> Sparse:
    head, data = header_bytes(tensors, pad_to)
    return Sparse(head, len(head) + data)


class FakeHub:
    """Serves `repos` until the `with` block ends. `faults` are used up one a request; `always` stays."""

    def __init__(self, repos: dict[str, Repo], *, latency: float = 0, ranges: bool = True) -> None:
        self.repos = repos
        self.latency = latency
        self.ranges = ranges
        self.faults: deque[str] = deque()
        self.always: str | None = None
        self.only: str = ""  # faults hit only requests whose path holds this
        self.log: list[Asked] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *a: None  # type: ignore[method-assign]
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def paths(self) -> list[str]:
        return [a.path for a in self.log]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    disable_nagle_algorithm = True

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.hub
        time.sleep(hub.latency)
        fault = None
        if hub.only in self.path:
            fault = hub.faults.popleft() if hub.faults else hub.always
        self.truncate, self.drip = fault == "truncate", fault == "drip"
        auth, host = self.headers.get("Authorization"), self.headers.get("Host", "")
        self.token = auth.removeprefix("Bearer ") if auth else None
        self.asked = Asked(self.path, host, self.token, self.headers.get("Range"), self.headers.get("User-Agent", ""))
        hub.log.append(self.asked)
        try:
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
            elif fault and fault.startswith("429"):
                self.answer(429, b"{}", {"Retry-After": fault[4:]} if fault[4:] else {})
            elif fault and fault.isdigit():
                self.answer(int(fault), b"oops")
            elif fault == "garbage":
                self.answer(200, b"\xff\xfe[[[")
            elif fault == "loop":
                self.answer(302, b"", {"Location": self.path})
            else:
                self.route()
        except OSError:
            self.close_connection = True

    def do_POST(self) -> None:
        """What a commit through huggingface_hub asks for. A fault that is a status is a refusal, with its message."""
        hub, url = self.hub, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.truncate = self.drip = False
        auth = self.headers.get("Authorization")
        self.token = auth.removeprefix("Bearer ") if auth else None
        self.asked = Asked(self.path, self.headers.get("Host", ""), self.token, None, "")
        hub.log.append(self.asked)
        fault = hub.faults.popleft() if hub.only in self.path and hub.faults else None
        if fault:
            return self.answer(int(fault), json.dumps({"error": "pull requests are disabled here"}).encode())
        if url.path == "/api/validate-yaml":
            front = json.loads(body)["content"]
            errors = [{"message": '"license" must be a string'}] if "license: 7" in front else []
            return self.answer(400 if errors else 200, json.dumps({"errors": errors, "warnings": []}).encode())
        words = [unquote(w) for w in url.path.strip("/").split("/")]
        k = next(i for i, word in enumerate(words) if word in ("preupload", "commit"))
        if (found := self.find("/".join(words[2:k]), words[k + 1])) is None:
            return None
        repo, files = found
        if self.token is None:
            return self.error(401, "", "Invalid username or password.")
        if words[k] == "preupload":
            named = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.json({"files": named})
        lines = {line["key"]: line["value"] for line in map(json.loads, body.splitlines())}
        if lines["header"].get("parentCommit") != commit_of(files):
            return self.error(412, "", "A commit has happened since. Please refresh and try again.")
        assert parse_qs(url.query) == {"create_pr": ["1"]}
        assert lines["file"]["encoding"] == "base64"
        data = base64.b64decode(lines["file"]["content"])
        repo.pulls.append({**lines["header"], "path": lines["file"]["path"], "data": data})
        number = len(repo.pulls)
        repo.revisions[f"refs/pr/{number}"] = {**files, lines["file"]["path"]: data}
        name, commit = "/".join(words[2:k]), commit_of(repo.revisions[f"refs/pr/{number}"])
        pull = f"{hub.url}/{name}/discussions/{number}"
        return self.json(
            {"commitUrl": f"{hub.url}/{name}/commit/{commit}", "commitOid": commit, "pullRequestUrl": pull}
        )

    def discussions(self, name: str) -> None:
        listed = [
            {
                "title": pull["summary"],
                "num": n,
                "status": "open",
                "createdAt": "2026-01-01T00:00:00.000Z",
                "repo": {"name": name, "type": "model"},
                "isPullRequest": True,
            }
            for n, pull in enumerate(self.hub.repos[name].pulls, 1)
        ]
        self.json({"discussions": listed, "count": len(listed), "start": 0})

    def route(self) -> None:
        url = urlsplit(self.path)
        words = [unquote(w) for w in url.path.strip("/").split("/")]
        if url.path == "/api/models":
            query = parse_qs(url.query)
            text, author = query["search"][0].lower(), query.get("author", [""])[0]
            ids = [i for i in self.hub.repos if text in i.lower() and (not author or i.split("/")[0] == author)]
            return self.json([{"id": i} for i in ids])
        if words[:2] == ["api", "models"] and words[-1] == "discussions":
            return self.discussions("/".join(words[2:-1]))
        if words[:2] == ["api", "models"] and "revision" in words:
            k = words.index("revision")
            return self.info("/".join(words[2:k]), words[k + 1], parse_qs(url.query)["expand"], url.query)
        if words[:2] == ["api", "resolve-cache"]:
            k = words.index("@")
            return self.file(self.hub.repos["/".join(words[2:k])].at(words[k + 1]), "/".join(words[k + 2 :]))
        if words[0] == "cdn":
            k = words.index("@")
            return self.file(self.hub.repos["/".join(words[1:k])].at(words[k + 1]), "/".join(words[k + 2 :]))
        if "resolve" in words:
            k = words.index("resolve")
            return self.resolve("/".join(words[:k]), words[k + 1], "/".join(words[k + 2 :]))
        return self.error(404, "", "no such page")

    def info(self, repo_id: str, revision: str, expand: list[str], query: str) -> None:
        if not (found := self.find(repo_id, revision)):
            return None
        repo, files = found
        if repo.moved_to:
            location = f"/api/models/{repo.moved_to}/revision/{quote(revision, safe='')}?{query}"
            return self.answer(307, b"moved", {"Location": location})
        answer: dict[str, Any] = {"_id": "0", "id": repo_id, "sha": commit_of(files)}
        if "siblings" in expand:
            answer["siblings"] = [{"rfilename": f} for f in sorted(files)]
        if "safetensors" in expand and repo.counted and (counts := count(repo.files)):
            answer["safetensors"] = {"parameters": counts, "total": sum(counts.values())}
        return self.json(answer)

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        if not (found := self.find(repo_id, revision)):
            return None
        repo, files = found
        if repo.gated and self.token != TOKEN:
            return self.error(401 if self.token is None else 403, "GatedRepo", f"Access to {repo_id} is restricted.")
        if path not in files:
            return self.error(404, "EntryNotFound", "Entry not found")
        where = f"{repo_id}/@/{commit_of(files)}/{quote(path)}"
        if isinstance(files[path], Sparse):
            return self.answer(302, b"Found", {"Location": f"http://localhost:{self.hub.port}/cdn/{where}?Signature=x"})
        return self.answer(307, b"Temporary Redirect", {"Location": f"/api/resolve-cache/{where}"})

    def find(self, repo_id: str, revision: str) -> tuple[Repo, dict[str, "bytes | Sparse"]] | None:
        if self.token is not None and not self.token.startswith("hf_"):
            return self.error(401, "", "Invalid credentials in Authorization header")
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self.token != TOKEN):
            return self.error(401 if self.token is None else 404, "RepoNotFound", "Repository not found")
        files = repo.at(revision)
        return (repo, files) if files is not None else self.error(404, "RevisionNotFound", "Invalid rev id")

    def file(self, files: Mapping[str, "bytes | Sparse"] | None, path: str) -> None:
        assert files is not None
        body = files[path]
        head, size = (body, len(body)) if isinstance(body, bytes) else (body.head, body.size)
        m = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if not m or not self.hub.ranges:
            return self.send(200, {"Content-Length": str(size)}, zeros_after(head, 0, size), size)
        start, stop = int(m[1]), min(int(m[2]) + 1, size)
        if start >= size:
            return self.answer(416, b"", {"Content-Range": f"bytes */{size}"})
        headers = {"Content-Length": str(stop - start), "Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        return self.send(206, headers, zeros_after(head, start, stop), stop - start)

    def json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode())

    def error(self, status: int, code: str, message: str) -> None:
        self.answer(status, b"{}", {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})})

    def answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send(status, {"Content-Length": str(len(body)), **(headers or {})}, iter([body]), len(body))

    def send(self, status: int, headers: Mapping[str, str], chunks: Iterator[bytes], size: int) -> None:
        self.asked.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        most = size // 2 if self.truncate and size else size
        for chunk in chunks:
            piece = chunk[: most - self.asked.sent]
            if self.drip:
                for i in range(len(piece)):
                    self.wfile.write(piece[i : i + 1])
                    self.wfile.flush()
                    time.sleep(0.05)
            else:
                self.wfile.write(piece)
            self.asked.sent += len(piece)
            if self.asked.sent >= most:
                break
        self.wfile.flush()
        if most < size:
            self.close_connection = True


def zeros_after(head: bytes, start: int, stop: int) -> Iterator[bytes]:
    if start < len(head):
        yield head[start:stop]
    at = max(start, len(head))
    while at < stop:
        n = min(1 << 16, stop - at)
        yield bytes(n)
        at += n


def count(files: Mapping[str, "bytes | Sparse"]) -> dict[str, int]:
    """Stored elements by dtype of the weights in the top folder."""
    counts: dict[str, int] = {}
    for path, body in files.items():
        if isinstance(body, Sparse) and path.endswith(".safetensors") and "/" not in path and "adapter" not in path:
            for name, entry in json.loads(body.head[8:]).items():
                if name != "__metadata__":
                    counts[entry["dtype"]] = counts.get(entry["dtype"], 0) + math.prod(entry["shape"])
    return counts
