"""A file of a repository on the Hub as it is, and a pull request that changes it: all that hfvram ever writes there."""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from hfvram.errors import HfvramError
from hfvram.read.hub import Hub
from hfvram.read.names import LocalPath, RepoName, parse_name
from hfvram.read.open import hub_of

README: Final = "README.md"


@dataclass(frozen=True, slots=True)
class RemoteReadme:
    """A repository's README.md at a commit of its main branch; `data` is None where there is none."""

    id: str
    commit: str
    data: bytes | None


@dataclass(frozen=True, slots=True)
class PullRequest:
    """A pull request's address, and whether it was there before with the same content."""

    url: str
    opened_before: bool
    warnings: tuple[str, ...] = ()


def read_readme(repo_id: str, token: str | None = None) -> RemoteReadme:
    """What README.md of a model says now. Raises `usage` where no model on the Hub is named, and as `Hub.info`."""
    name = parse_name(repo_id)
    if isinstance(name, LocalPath):
        raise HfvramError("usage", f"a pull request needs a model on the Hub, ORG/NAME: {repo_id} is on this machine")
    hub = _asked(token)
    info = hub.info(RepoName(name.id), only_commit=True)
    return RemoteReadme(info.id, info.commit, hub.text(RepoName(info.id, info.commit), README))


def propose(readme: RemoteReadme, data: bytes, *, title: str, description: str, token: str | None) -> PullRequest:
    """Open a pull request that makes README.md of `readme`'s commit `data`; an open one that does so already is found.

    Raises `unauthorized`, `not_found`, `network`, `rate_limited`, `offline`, and `io` where the Hub refuses the file.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    hub = _asked(token)
    api = HfApi(endpoint=hub.endpoint, token=token, library_name="hfvram")
    if url := _open_already(api, hub, readme, data, title):
        return PullRequest(url, opened_before=True)
    with warnings.catch_warnings(record=True) as said, _told(readme.id):
        warnings.simplefilter("always")
        made = api.create_commit(
            readme.id,
            [CommitOperationAdd(path_in_repo=README, path_or_fileobj=data)],
            commit_message=title,
            commit_description=description,
            create_pr=True,
            parent_commit=readme.commit,
        )
    notes = tuple(_first_line(str(w.message)) for w in said if issubclass(w.category, UserWarning))
    return PullRequest(made.pr_url or made.commit_url, opened_before=False, warnings=notes)


def _asked(token: str | None) -> Hub:
    hub = hub_of(token, False)
    if hub.offline:
        raise HfvramError("offline", "a pull request needs the Hub: ask again without HF_HUB_OFFLINE")
    return hub


def _open_already(api: object, hub: Hub, readme: RemoteReadme, data: bytes, title: str) -> str | None:
    """The address of an open pull request of this title and content. A Hub that lists none, or not to us, has none."""
    from huggingface_hub import HfApi

    assert isinstance(api, HfApi)
    with contextlib.suppress(Exception):  # whatever it is, it is no reason not to ask for the pull request itself
        found = api.get_repo_discussions(readme.id, discussion_type="pull_request", discussion_status="open")
        for discussion in found:
            if discussion.title == title and discussion.is_pull_request:
                there = hub.text(RepoName(readme.id, f"refs/pr/{discussion.num}"), README)
                if there == data:
                    return discussion.url
    return None


@contextlib.contextmanager
def _told(repo_id: str) -> Iterator[None]:
    """huggingface_hub's errors as ours, of one line."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled:
        raise HfvramError("offline", "a pull request needs the Hub: ask again without HF_HUB_OFFLINE") from None
    except HfHubHTTPError as error:
        raise _refused(repo_id, error.response.status_code, error.server_message) from None
    except (httpx.HTTPError, OSError) as error:
        why = _first_line(str(error)) or type(error).__name__
        raise HfvramError("network", f"the pull request for {repo_id} didn't reach the Hub: {why}") from None
    except ValueError as error:  # its front matter is not as the Hub wants it, or an answer that makes no sense
        raise HfvramError("io", f"the Hub refuses README.md of {repo_id}: {_first_line(str(error))}") from None


def _refused(repo_id: str, status: int, said: str | None) -> HfvramError:
    why = f" ({_first_line(said)})" if said else ""
    if status == 401:
        return HfvramError("unauthorized", f"a pull request needs a token{why}: `hf auth login`, or --token")
    if status == 403:
        needed = "the token may lack the right, or pull requests are disabled"
        return HfvramError("unauthorized", f"the Hub forbids a pull request for {repo_id}{why}: {needed}")
    if status == 404:
        return HfvramError("not_found", f"no model {repo_id} on the Hub for this token{why}")
    if status == 412:
        return HfvramError("network", f"{repo_id} was changed meanwhile{why}: run it again")
    if status == 429:
        return HfvramError("rate_limited", f"the Hub limits the rate of pull requests{why}: try again later")
    return HfvramError("network", f"the Hub answers a pull request for {repo_id} with status {status}{why}")


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
