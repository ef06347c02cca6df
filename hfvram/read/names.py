"""What a user's text names: a folder or file on this machine, or a repository on the Hub at a revision."""

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from hfvram.errors import HfvramError, printable

MAIN = "main"
VALID = "ORG/NAME, ORG/NAME@REVISION"

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.\-]{0,94}[A-Za-z0-9_])?"
_ID = re.compile(rf"(?:{_PART}/)?{_PART}")
_REVISION = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.+/\-]{0,199}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOOKS_LIKE_A_PATH = re.compile(r"[/~\\]|\.{1,2}/|.*\.(?:json|safetensors)$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class RepoName:
    """A repository on the Hub; both parts are safe in a path and, quoted, in an address."""

    id: str
    revision: str = MAIN

    @property
    def pinned(self) -> bool:
        return bool(_COMMIT.fullmatch(self.revision))


@dataclass(frozen=True, slots=True)
class LocalPath:
    """Something that exists on this machine."""

    path: str


def is_commit(text: object) -> bool:
    """Whether this is a full commit hash."""
    return isinstance(text, str) and _COMMIT.fullmatch(text) is not None


def is_repo_id(text: object) -> bool:
    """The Hub's own rule for ids (huggingface_hub's `validate_repo_id`): `NAME` or `ORG/NAME`, 96 characters each.

    >>> [is_repo_id(x) for x in ("gpt2", "a/b", "a/b/c", "../x", "a--b", "a/.b", "a/b.git", "a%2eb")]
    [True, True, False, False, False, False, False, False]
    """
    return (
        isinstance(text, str)
        and _ID.fullmatch(text) is not None
        and "--" not in text
        and ".." not in text
        and not text.endswith(".git")
    )


def parse_name(text: str, revision: str | None = None, *, local: bool = True) -> RepoName | LocalPath:
    """Tell a path from a Hub id; what exists here is a path. `local=False` where the text comes from the Hub.

    Raises `not_found` for what can be neither, `revision_not_found` for what no revision can be called, and `usage`
    for two revisions at once.
    """
    if local and (path := _existing(text)):
        return LocalPath(path)
    shown = printable(text, 120)
    repo, inner = _from_address(text, shown) if "://" in text else _split_revision(text)
    if local and "://" not in text and _LOOKS_LIKE_A_PATH.match(text):
        raise HfvramError("not_found", f"{shown}: no such file or folder")
    if not is_repo_id(repo):
        raise HfvramError("not_found", f"{shown!r} is no Hub id: expected {VALID}{', or a path' if local else ''}")
    if inner and revision is not None and inner != revision:
        raise HfvramError("usage", f"two revisions of {repo}: {inner} in the name, {revision} beside it; give one")
    wanted = next((r for r in (inner, revision) if r is not None), MAIN)
    if not _REVISION.fullmatch(wanted) or ".." in wanted:
        raise HfvramError("revision_not_found", f"{printable(wanted, 80)!r} can't be a revision of {repo}")
    return RepoName(repo, wanted)


def _existing(text: str) -> str | None:
    path = os.path.expanduser(text) if text.startswith("~") else text
    try:
        return path if text and os.path.exists(path) else None
    except ValueError:  # a NUL in it
        return None


def _split_revision(text: str) -> tuple[str, str | None]:
    repo, at, revision = text.partition("@")
    return repo, revision if at else None


def _from_address(text: str, shown: str) -> tuple[str, str | None]:
    """`https://huggingface.co/ORG/NAME[/tree/REVISION/…]`, of the Hub or of the endpoint in use."""
    try:
        parts = urlsplit(text)
        host = (parts.hostname or "").removeprefix("www.")
        own = urlsplit(os.environ.get("HF_ENDPOINT", "")).hostname
    except ValueError:
        raise HfvramError("not_found", f"{shown} is no address") from None
    if parts.scheme not in ("http", "https") or host not in ("huggingface.co", "hf.co", own):
        raise HfvramError("not_found", f"{shown} is no address of a model on the Hub")
    words = [unquote(w) for w in parts.path.strip("/").split("/")]
    if words[0] in ("datasets", "spaces", "api", "collections", "papers"):
        raise HfvramError("not_found", f"{shown} is not the address of a model")
    for i in (1, 2):
        if len(words) > i + 1 and words[i] in ("tree", "blob", "resolve", "raw", "commit"):
            # a revision with a slash is quoted in the address, except pull requests, whose references have three parts
            count = 3 if words[i + 1] == "refs" else 1
            return "/".join(words[:i]), "/".join(words[i + 1 : i + 1 + count])
    return "/".join(words), None
