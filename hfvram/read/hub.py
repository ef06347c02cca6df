"""The only module that talks HTTP: one connection pool, bounded answers, retries, and a token that stays at home."""

import functools
import json
import platform
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn
from urllib.parse import quote, urljoin, urlsplit

from hfvram.errors import HfvramError, Kind, printable
from hfvram.read.configuration import MAX_CONFIG_BYTES
from hfvram.read.names import RepoName, is_commit, is_repo_id

if TYPE_CHECKING:
    import httpx

CONNECTIONS: Final = 16
ANSWER_SECONDS: Final = 30.0
"""Within this the question is answered or has failed, retries and all."""

FIRST_WAIT_SECONDS: Final = 0.3
_RETRIES = 4
_MAX_API_BYTES = 32 * 10**6
_REDIRECTS = 5


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of a file from a position on, the size of the whole file where told, and the address they came from."""

    body: bytes
    file_bytes: int | None
    url: str


@dataclass(frozen=True, slots=True)
class RepoInfo:
    """What the Hub says of a repository at a revision. `files` is None where only the commit was asked for."""

    id: str
    commit: str
    files: frozenset[str] | None
    parameters: Mapping[str, int] | None


class _TryAgain(Exception):
    """This attempt failed in a way that another may not."""

    def __init__(self, kind: Kind, why: str, wait_seconds: float = 0, retries: int = _RETRIES) -> None:
        self.kind: Kind = kind
        self.why = why
        self.wait_seconds = wait_seconds
        self.retries = retries


class Hub:
    """One question's conversation with the Hub at `endpoint`: who asks, and until when. Safe to share by threads."""

    def __init__(self, endpoint: str, token: str | None, *, offline: bool = False) -> None:
        self.endpoint = endpoint.rstrip("/")
        self.offline = offline
        self.deadline = time.monotonic() + ANSWER_SECONDS
        self._token = token
        self._headers: dict[str, str] = {}

    def info(self, repo: RepoName, *, only_commit: bool = False) -> RepoInfo:
        """Commit, files and the Hub's own parameter count at a revision.

        Raises `not_found`, `revision_not_found`, `gated`, `unauthorized`, `network`, `rate_limited`.
        """
        fields = ("sha",) if only_commit else ("sha", "siblings", "safetensors")
        query = "&".join(f"expand={f}" for f in fields)
        url = f"{self.endpoint}/api/models/{repo.id}/revision/{quote(repo.revision, safe='')}?{query}"
        answer = self._json(url, repo)
        try:
            name = answer.get("id")
            listed = answer.get("siblings")
            return RepoInfo(
                id=name if is_repo_id(name) else repo.id,
                commit=answer["sha"] if is_commit(answer["sha"]) else _unexpected(url),
                files=frozenset(s["rfilename"] for s in listed if s["rfilename"].isprintable()) if listed else None,
                parameters=_counts((answer.get("safetensors") or {}).get("parameters")),
            )
        except (AttributeError, KeyError, TypeError):
            return _unexpected(url)

    def search(self, text: str, author: str | None) -> list[str]:
        """Ids of models whose name holds `text`. Raises `network`, `rate_limited`, `unauthorized`."""
        url = f"{self.endpoint}/api/models?search={quote(text, safe='')}&limit=100"
        if author:
            url += f"&author={quote(author, safe='')}"
        found = self._json(url, None)
        names = [str(m.get("id")) for m in found if isinstance(m, dict)] if isinstance(found, list) else []
        return [name for name in names if is_repo_id(name)]

    def text(self, repo: RepoName, path: str) -> bytes | None:
        """A small file at a commit, None where there is none. Raises `bad_config` where it isn't small."""
        part = self._ask(self._file(repo, path), repo, None, MAX_CONFIG_BYTES)
        if part and part.file_bytes is not None and part.file_bytes > MAX_CONFIG_BYTES:
            size = f"larger than {MAX_CONFIG_BYTES // 10**6} MB"
            raise HfvramError("bad_config", f"{printable(path, 200)} of {repo.id} is {size}: no configuration is")
        return part.body if part else None

    def part(self, repo: RepoName, path: str, start: int, stop: int, url: str | None = None) -> Part | None:
        """Bytes `start … stop` (not included) of a file, fewer where it ends; None where there is no such file.

        `url` is where an earlier part came from.
        """
        return self._ask(url or self._file(repo, path), repo, (start, stop), stop)

    def _file(self, repo: RepoName, path: str) -> str:
        return f"{self.endpoint}/{repo.id}/resolve/{quote(repo.revision, safe='')}/{quote(path)}"

    def _json(self, url: str, repo: RepoName | None) -> Any:
        part = self._ask(url, repo, None, _MAX_API_BYTES)
        try:
            return json.loads(part.body) if part else _unexpected(url)
        except (ValueError, RecursionError):
            return _unexpected(url)

    def _ask(self, url: str, repo: RepoName | None, span: tuple[int, int] | None, limit: int) -> Part | None:
        attempt = 0
        while True:
            try:
                return self._once(url, repo, span, limit)
            except _TryAgain as e:
                wait = max(e.wait_seconds, FIRST_WAIT_SECONDS * 2**attempt * random.uniform(0.5, 1.5))
                if attempt >= e.retries or time.monotonic() + wait >= self.deadline:
                    raise HfvramError(e.kind, f"{_host(url)} {e.why}") from None
                attempt += 1
                time.sleep(wait)

    def _once(self, url: str, repo: RepoName | None, span: tuple[int, int] | None, limit: int) -> Part | None:
        import httpx

        started = time.monotonic()
        for _ in range(_REDIRECTS + 1):
            left = max(self.deadline - time.monotonic(), 0.1)
            # a machine that drops packets is found out soon; one that is slow to answer gets longer
            timeout = httpx.Timeout(min(10.0, left), connect=min(3.0, left), pool=left)
            try:
                client = _client(url.startswith("http:"))
                with client.stream("GET", url, headers=self._headers_for(url, span), timeout=timeout) as r:
                    if r.has_redirect_location:
                        self._body(r, 1 << 16)  # read, so that the connection can be used again
                        url = urljoin(url, r.headers["location"])
                        continue
                    if r.status_code >= 400:
                        return self._refused(r, repo, url)
                    return self._part(r, span, limit, url)
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as e:
                retries = 2 if time.monotonic() - started < 1 else 0
                why = f"can't be reached ({_reason(e)}): check the connection"
                raise _TryAgain("network", why, retries=retries) from None
            except httpx.TransportError as e:
                if isinstance(e, httpx.UnsupportedProtocol):
                    raise _bad_address(url, e) from None
                raise _TryAgain("network", f"broke off the answer ({_reason(e)})") from None
            except httpx.DecodingError:
                raise _TryAgain("network", "sent a damaged answer") from None
            except (httpx.InvalidURL, ImportError, OSError, ValueError) as e:
                raise _bad_address(url, e) from None
        raise HfvramError("network", f"{_host(url)} redirects in circles")

    def _part(self, r: "httpx.Response", span: tuple[int, int] | None, limit: int, url: str) -> Part:
        text = r.headers.get("content-length", "")
        declared = int(text) if text.isdigit() else None
        if span is None:
            if declared and declared > limit:
                return Part(b"", declared, url)
            body = self._body(r, limit + 1)
            return Part(body, max(declared or 0, len(body)), url)
        start, stop = span
        if r.status_code == 206:
            m = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", r.headers.get("content-range", ""))
            if not m or int(m[1]) != start:
                return _unexpected(url)
            return Part(self._body(r, stop - start + 1)[: stop - start], None if m[2] == "*" else int(m[2]), url)
        # the server ignores ranges and sends the whole file: it is read no further than needed
        return Part(self._body(r, stop)[start:stop], declared, url)

    def _body(self, r: "httpx.Response", most: int) -> bytes:
        """What the server sends, given up on after `most` bytes and at the deadline."""
        chunks = []
        count = 0
        for chunk in r.iter_bytes():
            chunks.append(chunk)
            count += len(chunk)
            if count >= most:
                break
            if time.monotonic() > self.deadline:
                raise _TryAgain("network", f"was too slow: no answer within {ANSWER_SECONDS:.0f} s")
        return b"".join(chunks)

    def _headers_for(self, url: str, span: tuple[int, int] | None) -> dict[str, str]:
        """The token goes to the endpoint's own host and to no other, whatever redirects say."""
        if not self._headers:
            self._headers = _hub_headers(self._token)
        headers = {**self._headers, "accept-encoding": "identity" if span else "gzip"}
        if _origin(url) != _origin(self.endpoint):
            headers.pop("authorization", None)
        if span:
            headers["range"] = f"bytes={span[0]}-{span[1] - 1}"
        return headers

    def _refused(self, r: "httpx.Response", repo: RepoName | None, url: str) -> Part | None:
        """The error that a status of 400 or more stands for; None where only the file is missing."""
        status, code = r.status_code, r.headers.get("x-error-code", "")
        self._body(r, 1 << 16)
        if status == 429:
            wait = _retry_after(r.headers)
            when = f"in {wait:.0f} s" if wait else "later"
            raise _TryAgain("rate_limited", f"limits the rate: try again {when}, or pass a token", wait)
        if status >= 500 or status == 408:
            raise _TryAgain("network", f"answers with status {status}: try again later")
        if status == 416:
            raise HfvramError("bad_header", f"{_path(url)} ends before its header does")
        if code == "EntryNotFound":
            return None
        name = repo.id if repo else self.endpoint
        if code == "RevisionNotFound" and repo:
            raise HfvramError("revision_not_found", f"{name} has no revision {repo.revision}: name a branch or commit")
        if code == "GatedRepo":
            raise HfvramError("gated", f"{name} is gated: ask for access at {self.endpoint}/{name}, then pass --token")
        if status == 401 and code != "RepoNotFound" and "authorization" in self._headers:
            raise HfvramError("unauthorized", "the Hub refuses the token: check --token, HF_TOKEN, or `hf auth login`")
        if status == 403:
            raise HfvramError("unauthorized", f"{_host(url)} forbids {name}: the token may lack the right to read it")
        if status in (401, 404):
            raise HfvramError("not_found", f"no model {name} on the Hub: check the name; a private one needs --token")
        raise HfvramError("network", f"{_host(url)} answers with status {status}")


@functools.cache
def _client(plain: bool) -> "httpx.Client":
    """The connection pool; without TLS nothing of TLS is loaded, which takes 50 ms."""
    import httpx

    limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS, keepalive_expiry=30)
    return httpx.Client(verify=not plain, limits=limits, follow_redirects=False)


def _hub_headers(token: str | None) -> dict[str, str]:
    """User agent and, where there is one, the token given or the one that huggingface_hub finds.

    Not by huggingface_hub's `build_hf_headers`: that may ask the Hub something of its own first.
    """
    from huggingface_hub import __version__ as hub_version
    from huggingface_hub import constants, get_token

    from hfvram import __version__

    try:
        token = token or (None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token())
    except OSError:  # a token file that isn't ours to read
        token = None
    except Exception as e:  # a login that has to be renewed, and can't be: many kinds, of huggingface_hub and below
        raise HfvramError("unauthorized", f"no token could be had: {e}") from None
    headers = {"user-agent": f"hfvram/{__version__}; hf_hub/{hub_version}; python/{platform.python_version()}"}
    if token and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise HfvramError("unauthorized", "the token holds characters that no token has: check --token and HF_TOKEN")
    return {**headers, "authorization": f"Bearer {token}"} if token else headers


def _counts(value: Any) -> Mapping[str, int] | None:
    if not isinstance(value, dict) or not value:
        return None
    good = all(isinstance(k, str) and type(v) is int and 0 <= v < 1 << 63 for k, v in value.items())
    return value if good else None


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds of `Retry-After` (a number or a date), or of the Hub's `RateLimit: "api";r=0;t=55`."""
    text = headers.get("retry-after", "").strip()
    if text.isdigit():
        return float(text[:9])
    if text:
        from email.utils import parsedate_to_datetime

        try:
            return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
        except (ValueError, OverflowError):
            pass
    m = re.search(r"\bt=(\d{1,9})", headers.get("ratelimit", ""))
    return float(m[1]) if m else 0.0


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or url
    except ValueError:
        return url


def _path(url: str) -> str:
    return printable(urlsplit(url).path, 200)


def _reason(e: Exception) -> str:
    return printable(str(e) or type(e).__name__, 120)


def _bad_address(url: str, e: Exception) -> HfvramError:
    return HfvramError("network", f"{_host(url)} can't be asked: {_reason(e)}; see HF_ENDPOINT and the proxy settings")


def _unexpected(url: str) -> NoReturn:
    raise HfvramError("network", f"{_host(url)} sent an answer that makes no sense for {_path(url)}")
