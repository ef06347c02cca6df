"""The road's first step: a name → `Checkpoint`, from this machine, the cache, the Hub, or the built-in catalogue."""

import os
import time
from dataclasses import replace
from typing import Final

from hfvram.errors import HfvramError, Kind, printable
from hfvram.read import cache
from hfvram.read.checkpoint import Adapter, Checkpoint
from hfvram.read.completion import complete
from hfvram.read.configuration import parse_object
from hfvram.read.disk import DiskFolder, list_files, read_text
from hfvram.read.folder import Folder
from hfvram.read.gguf_model import read_model
from hfvram.read.hub import Hub, RepoInfo
from hfvram.read.names import MAIN, LocalPath, RepoName, parse_name
from hfvram.read.remote import HubFolder
from hfvram.read.repository import (
    MANY_SHARDS,
    is_adapter,
    read_adapter,
    read_folder,
    read_tensor_table,
    with_warnings,
)
from hfvram.read.weights import find_weights

_MAX_ADAPTERS: Final = 3
_ALIAS_SECONDS: Final = 24 * 3600
"""So long a completed name is remembered; then the exact one may have come into being."""

_CATALOGUE_ANSWERS: Final[tuple[Kind, ...]] = ("offline", "network", "rate_limited", "gated")


def read_checkpoint(
    name: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    file: str | None = None,
    local: bool = True,
) -> Checkpoint:
    """The model that a name means: a path on this machine (but for `local=False`, where the name is a stranger's), or a
    Hub id, with `@REVISION`, or a Hub address.

    An adapter comes with its base model, a pipeline with its components. Where the Hub can't or may not be asked,
    what is in the cache answers, then the catalogue, with a warning. Raises `HfvramError` of every kind of reading.
    """
    return _read(parse_name(name, revision, local=local), hub_of(token, offline), file, ())


def read_all_headers(checkpoint: Checkpoint, *, token: str | None = None, offline: bool = False) -> Checkpoint:
    """The same checkpoint with its tensor table, where `read_checkpoint` took the Hub's count instead of the headers.

    Unchanged where there is no header to read (catalogue, no safetensors). Raises as `read_checkpoint`.
    """
    if checkpoint.tensors is not None or checkpoint.commit is None or checkpoint.components:
        return checkpoint
    folder, _ = _locate(RepoName(checkpoint.id, checkpoint.commit), hub_of(token, offline))
    tensors = read_tensor_table(folder)
    if isinstance(folder, HubFolder):
        folder.keep()
    return replace(checkpoint, tensors=tensors)


def hub_of(token: str | None, offline: bool) -> Hub:
    """The Hub that the environment names; offline where it or the environment says so."""
    wanted = {"1", "on", "yes", "true"}
    offline = offline or any(
        os.environ.get(v, "").lower() in wanted for v in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )
    return Hub(os.environ.get("HF_ENDPOINT") or "https://huggingface.co", token, offline=offline)


def _read(name: RepoName | LocalPath, hub: Hub, file: str | None, adapters: tuple[str, ...]) -> Checkpoint:
    found = _read_local(name.path, file) if isinstance(name, LocalPath) else _read_repo(name, hub, file)
    if isinstance(found, Checkpoint):
        return found
    return _with_base(found, isinstance(name, LocalPath), hub, adapters)


def _with_base(adapter: Adapter, local: bool, hub: Hub, adapters: tuple[str, ...]) -> Checkpoint:
    """The adapter's base model with the adapter on it. An adapter from the Hub can't name a path of this machine."""
    base, revision = adapter.config.get("base_model_name_or_path"), adapter.config.get("revision")
    if not isinstance(base, str) or not base:
        raise HfvramError("no_config", f"the adapter {adapter.id} names no base model")
    if adapter.id in adapters or len(adapters) >= _MAX_ADAPTERS:
        raise HfvramError("no_config", f"the adapter {adapter.id} rests on itself, or on too many others")
    try:
        if local and "\0" not in base and not os.path.exists(base) and os.path.exists(os.path.join(adapter.id, base)):
            base = os.path.join(adapter.id, base)
        name = parse_name(base, revision if isinstance(revision, str) and revision else None, local=local)
        checkpoint = _read(name, hub, None, (*adapters, adapter.id))
    except HfvramError as e:
        raise HfvramError(e.kind, f"base model of the adapter {adapter.id}: {e.message}") from None
    if checkpoint.adapter:
        lower = checkpoint.adapter.id
        notice = f"the base of {adapter.id} is itself an adapter, {lower}: counted as merged into its own base"
        checkpoint = with_warnings(checkpoint, notice)
    return replace(checkpoint, adapter=adapter)


def _read_local(path: str, file: str | None) -> Checkpoint | Adapter:
    """A folder, or a file in one: the file says which weights or which configuration are meant."""
    shown = printable(path)
    if os.path.isdir(path):
        folder = DiskFolder(shown, path, list_files(path))
        return read_adapter(folder) if is_adapter(folder.files) and file is None else read_folder(folder, file)
    if not os.path.isfile(path):
        raise HfvramError("io", f"{shown} is neither a folder nor a regular file")
    parent, name = os.path.split(os.path.abspath(path))
    if name.endswith(".gguf"):
        here = frozenset(f for f in list_files(parent) if "/" not in f) | {name}
        return read_model(DiskFolder(shown, parent, here), name)
    weights = name.endswith((".safetensors", ".safetensors.index.json"))
    if not weights and name not in ("config.json", "adapter_config.json"):
        return Checkpoint(id=shown, source="local", config=parse_object(read_text(path), shown))
    folder = DiskFolder(shown, parent, list_files(parent))
    if name == "adapter_config.json":
        return read_adapter(replace(folder, id=printable(parent)))
    one_of_many = not name.endswith(".safetensors") or name in find_weights(folder.files).shards
    return read_folder(folder, file or (None if one_of_many else name))


def _read_repo(repo: RepoName, hub: Hub, file: str | None, *, completed: bool = False) -> Checkpoint | Adapter:
    """Out of the cache or from the Hub; a completed name, or the catalogue, where that fails."""
    asked = repo.id
    if (alias := cache.load(asked, "alias")) and (hub.offline or abs(time.time() - alias["time"]) < _ALIAS_SECONDS):
        repo, completed = RepoName(alias["id"], repo.revision), True
    notices = [_completed(asked, repo.id)] if completed and asked != repo.id else []
    try:
        folder, more = _locate(repo, hub)
        found = read_adapter(folder) if is_adapter(folder.files) and file is None else read_folder(folder, file)
        if isinstance(folder, HubFolder):
            folder.keep()
            if folder.commit != repo.revision:
                cache.store(repo.id, f"at {repo.revision}", {"id": folder.id, "commit": folder.commit})
        notices += more
    except HfvramError as e:
        if e.kind == "not_found" and not completed and (full := complete(repo.id, hub)):
            found = _read_repo(RepoName(full, repo.revision), hub, file, completed=True)
            cache.store(asked, "alias", {"id": full, "time": time.time()})
            notices.append(_completed(asked, full))
        elif e.kind in _CATALOGUE_ANSWERS and (known := _from_catalogue(repo, e)):
            found = known
        else:
            raise
    return with_warnings(found, *notices) if isinstance(found, Checkpoint) else found


def _locate(repo: RepoName, hub: Hub) -> tuple[Folder, list[str]]:
    """The files of a repository at its commit, from the nearest place that has them, and notices about that."""
    warnings: list[str] = []
    known = cache.load(repo.id, f"at {repo.revision}") or {}
    commit = repo.revision if repo.pinned else known.get("commit")
    info: RepoInfo | None = None
    gone: HfvramError | None = None
    if not hub.offline and not repo.pinned:
        try:
            info = hub.info(repo, only_commit=commit is not None)
            commit = info.commit
        except HfvramError as e:
            if commit is None or e.kind not in ("network", "rate_limited"):
                raise
            warnings.append(f"answered from the cache, as of the last time the Hub was asked: {e.message}")
            gone, hub.offline = e, True
    kept_id = info.id if info else known.get("id", repo.id)
    if commit and (folder := HubFolder.from_cache(hub, RepoName(kept_id, commit))):
        return folder, warnings
    if (downloaded := cache.snapshot(kept_id, commit or repo.revision)) is not None:
        local = DiskFolder(kept_id, downloaded[1], list_files(downloaded[1]), "cache", downloaded[0])
        if hub.offline or _whole(local):
            return local, warnings
    if hub.offline:
        message = f"{repo.id} at {repo.revision} is not in the cache: ask again without --offline or HF_HUB_OFFLINE"
        raise gone or HfvramError("offline", message)
    if info is None or info.files is None:
        info = hub.info(RepoName(kept_id, commit or repo.revision))
    if info.files is None:
        raise HfvramError("no_config", f"{repo.id} at {repo.revision} is empty: there is nothing to read a model from")
    parameters = info.parameters
    if parameters and repo.revision != MAIN and len(find_weights(info.files).shards) > MANY_SHARDS:
        # the Hub counts the main branch: for another revision its count holds where that is the same commit
        main = hub.info(RepoName(info.id), only_commit=True)
        parameters = parameters if main.commit == info.commit else None
    return HubFolder(hub, RepoName(info.id, info.commit), info.files, parameters), warnings


def _whole(folder: DiskFolder) -> bool:
    """Whether a download holds the weights too, so that nothing need be asked."""
    weights = find_weights(folder.files)
    return "config.json" in folder.files and bool(weights.shards)


def _from_catalogue(repo: RepoName, why: HfvramError) -> Checkpoint | None:
    """What the package knows of a model, with a notice that says so; None where it knows nothing.

    Of a revision that was asked for by name the catalogue knows nothing: refused rather than guessed.
    """
    from hfvram.read.catalogue import completions, lookup

    names = [repo.id] if lookup(repo.id) else completions(repo.id)
    if len(names) > 1:
        raise HfvramError(why.kind, f"{why.message}; the catalogue knows {', '.join(names)}")
    if not names or (entry := lookup(names[0])) is None:
        return None
    if repo.revision != MAIN:
        raise HfvramError(why.kind, f"{why.message}; the catalogue knows {entry.id} only at {MAIN}")
    notice = f"from the built-in catalogue of {entry.date}: {why.message}"
    notices = (notice,) if entry.id == repo.id else (_completed(repo.id, entry.id), notice)
    return Checkpoint(
        id=entry.id,
        source="catalogue",
        config=entry.config,
        parameters_by_dtype=entry.parameters_by_dtype,
        warnings=notices,
    )


def _completed(asked: str, full: str) -> str:
    return f"there is no model {asked}: taken as {full}"
