"""Pull requests against a fake Hub that accepts commits, and one that refuses them."""

import pytest
from hub import TOKEN, FakeHub, Repo, commit_of

from hfvram.errors import HfvramError
from hfvram.read.pull_request import RemoteReadme, propose, read_readme

ID = "org/model"
OLD, NEW = b"---\nlicense: mit\n---\n# Model\n", b"---\nlicense: mit\n---\n# Model\n\nmore\n"


@pytest.fixture
def hub(hf_home: object, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    with FakeHub({ID: Repo({"config.json": b"{}", "README.md": OLD})}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def sent(readme: RemoteReadme, data: bytes = NEW, token: str | None = TOKEN) -> str:
    return propose(readme, data, title="figures", description="why", token=token).url


def test_a_pull_request_holds_the_file_and_nothing_else(hub: FakeHub) -> None:
    readme = read_readme(ID, TOKEN)
    assert readme == RemoteReadme(ID, commit_of(hub.repos[ID].files), OLD)
    assert sent(readme) == f"{hub.url}/{ID}/discussions/1"
    (pull,) = hub.repos[ID].pulls
    assert pull == {
        "summary": "figures",
        "description": "why",
        "parentCommit": readme.commit,
        "path": "README.md",
        "data": NEW,
    }
    assert hub.repos[ID].files["README.md"] == OLD
    assert {a.token for a in hub.log if "commit" in a.path} == {TOKEN}


def test_the_same_change_is_proposed_once(hub: FakeHub) -> None:
    readme = read_readme(ID, TOKEN)
    first = sent(readme)
    again = propose(readme, NEW, title="figures", description="why", token=TOKEN)
    assert (again.url, again.opened_before) == (first, True)
    assert sent(readme, NEW + b"other\n") != first
    assert len(hub.repos[ID].pulls) == 2


def test_a_hub_that_lists_no_pull_requests_takes_one(hub: FakeHub) -> None:
    readme = read_readme(ID, TOKEN)
    hub.only, hub.always = "discussions", "404"
    assert sent(readme)


def test_a_repository_without_a_readme_gets_one(hub: FakeHub) -> None:
    del hub.repos[ID].files["README.md"]
    readme = read_readme(ID, TOKEN)
    assert readme.data is None
    sent(readme)
    assert hub.repos[ID].pulls[0]["data"] == NEW


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        ("403", "unauthorized", "pull requests are disabled here"),
        ("401", "unauthorized", "--token"),
        ("404", "not_found", ID),
        ("429", "rate_limited", "later"),
        ("400", "network", "status 400"),
    ],
)
def test_a_refusal_is_one_line_that_says_why(hub: FakeHub, status: str, kind: str, words: str) -> None:
    readme = read_readme(ID, TOKEN)
    hub.only = "/commit/"
    hub.faults.append(status)
    with pytest.raises(HfvramError) as raised:
        sent(readme)
    assert raised.value.kind == kind
    assert words in raised.value.message
    assert "\\n" not in raised.value.message
    assert hub.repos[ID].pulls == []


def test_what_was_changed_meanwhile_is_not_overwritten(hub: FakeHub) -> None:
    readme = read_readme(ID, TOKEN)
    hub.repos[ID].files["README.md"] = b"# Somebody else's\n"
    with pytest.raises(HfvramError, match="changed meanwhile"):
        sent(readme)
    assert hub.repos[ID].pulls == []


def test_front_matter_that_the_hub_refuses(hub: FakeHub) -> None:
    readme = read_readme(ID, TOKEN)
    with pytest.raises(HfvramError, match=r"refuses README.md of org/model") as raised:
        sent(readme, b"---\nlicense: 7\n---\n")
    assert raised.value.kind == "io"


def test_without_a_token_and_without_the_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = read_readme(ID)
    with pytest.raises(HfvramError) as raised:
        sent(readme, token=None)
    assert raised.value.kind == "unauthorized"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HfvramError) as raised:
        sent(readme)
    assert raised.value.kind == "network"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HfvramError) as raised:
        read_readme(ID)
    assert raised.value.kind == "offline"


def test_a_folder_is_no_model_on_the_hub(hub: FakeHub, tmp_path: object) -> None:
    with pytest.raises(HfvramError, match="on this machine"):
        read_readme(str(tmp_path))
