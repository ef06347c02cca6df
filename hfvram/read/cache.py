"""What was read once is kept by commit hash under the Hugging Face cache folder; what transformers keeps is used too.

An entry is one file of compressed JSON, put there by a rename: two processes never see half of one, and zlib's
checksum tells a damaged one, which then counts as absent. A folder that can't be written is carried on without.
"""

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

_FORMAT = "v1"  # another layout of the entries is another folder


def hugging_face_home() -> str:
    """`HF_HOME`, or where the ecosystem puts it; read at each call."""
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "huggingface")
    return _expanded(os.environ.get("HF_HOME") or default)


def load(repo_id: str, name: str) -> dict[str, Any] | None:
    """The entry of this name as it was stored, None where there is none that can be read.

    Entries of another layout lie elsewhere and damaged ones count as absent, so a caller may rely on the keys.
    """
    try:
        with open(_path(repo_id, name), "rb") as f:
            entry = json.loads(zlib.decompress(f.read()))
    except (OSError, ValueError, RecursionError, zlib.error):
        return None
    # on a file system that ignores case, another repository may lie in the same folder
    value = entry.get("value") if isinstance(entry, dict) and entry.get("id") == repo_id else None
    return value if isinstance(value, dict) else None


def store(repo_id: str, name: str, value: Mapping[str, Any]) -> None:
    """Keep an entry, or do nothing where the folder can't be written."""
    path = _path(repo_id, name)
    scratch = f"{path}.{os.getpid()}.{os.urandom(4).hex()}.tmp"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with open(scratch, "wb") as f:
                f.write(zlib.compress(json.dumps({"id": repo_id, "value": value}).encode(), 1))
            os.replace(scratch, path)
        except BaseException:
            if os.path.exists(scratch):
                os.unlink(scratch)
            raise
    except OSError:
        pass


def forget(repo_id: str) -> None:
    """Drop what is kept of a repository: nothing of it was of use."""
    shutil.rmtree(os.path.dirname(_path(repo_id, "any")), ignore_errors=True)


def snapshot(repo_id: str, revision: str) -> tuple[str, str] | None:
    """Commit and folder of a revision that huggingface_hub has downloaded, wholly or in part, or None."""
    home = _expanded(os.environ.get("HF_HUB_CACHE") or os.path.join(hugging_face_home(), "hub"))
    root = os.path.join(home, "models--" + repo_id.replace("/", "--"))
    commit = revision
    try:
        with open(os.path.join(root, "refs", *revision.split("/"))) as f:
            commit = f.read(200).strip()
    except (OSError, ValueError):
        pass
    folder = os.path.join(root, "snapshots", commit)
    return (commit, folder) if len(commit) == 40 and commit.isalnum() and os.path.isdir(folder) else None


def _path(repo_id: str, name: str) -> str:
    folder = "models--" + repo_id.replace("/", "--")
    return os.path.join(hugging_face_home(), "hfvram", _FORMAT, folder, quote(name, safe="") + ".json.z")


def _expanded(path: str) -> str:
    return os.path.expandvars(os.path.expanduser(path))
