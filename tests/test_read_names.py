import pytest

from hfvram.errors import HfvramError
from hfvram.read.names import LocalPath, RepoName, is_repo_id, parse_name


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("gpt2", "gpt2", "main"),
        ("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-v0.1", "main"),
        ("org/name@v1.0", "org/name", "v1.0"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
        ("https://huggingface.co/org/name", "org/name", "main"),
        ("https://huggingface.co/org/name/", "org/name", "main"),
        ("https://huggingface.co/org/name/tree/dev", "org/name", "dev"),
        ("https://huggingface.co/org/name/blob/main/config.json", "org/name", "main"),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F3/sub", "org/name", "refs/pr/3"),
        ("https://huggingface.co/org/name/tree/refs/pr/3", "org/name", "refs/pr/3"),
        ("http://hf.co/gpt2", "gpt2", "main"),
    ],
)
def test_names_of_repositories(text: str, repo: str, revision: str) -> None:
    assert parse_name(text) == RepoName(repo, revision)


def test_address_of_the_endpoint_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example:8443")
    assert parse_name("https://hub.example:8443/a/b") == RepoName("a/b")
    with pytest.raises(HfvramError, match="no address of a model"):
        parse_name("https://elsewhere.example/a/b")


HOSTILE = [
    "../x", "../../etc/passwd", "/etc/shadow-not-there", "a/../b", "a/b/../c", "..", ".", "", "/", "a//b", "a/", "/a",
    "org/na%2e%2e", "%2e%2e/x", "org/name?x=1", "org/name#f", "org\\name", "~nobody-here/x", "a/b/c", "-x/y", "x/-y",
    "a\x00b", "a\nb", "\x1b[31mred", "org/\u202ename", "org/n\u00e4me", "$(id)", "a;b", "a b", "org/name.git", "a--b/c",
    "file:///etc/passwd", "ftp://huggingface.co/a/b", "javascript://huggingface.co/a", "https://", "http://[", "://",
    "https://huggingface.co/datasets/a/b", "https://huggingface.co/../../x", "https://user@evil.example/a/b",
    "https://huggingface.co/%2e%2e/%2e%2e", "https://huggingface.co@evil.example/a/b", "x" * 5000, "o/" + "x" * 97,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_are_refused_in_one_clean_line(
    text: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(str(tmp_path))
    if text in ("..", ".", "/"):  # these exist: folders
        assert parse_name(text) == LocalPath(text)
        with pytest.raises(HfvramError):
            parse_name(text, local=False)
        return
    with pytest.raises(HfvramError) as caught:
        parse_name(text)
    assert caught.value.kind == "not_found"
    assert caught.value.message.isprintable()
    assert len(caught.value.message) <= 500


@pytest.mark.parametrize("revision", ["..", "a/../b", "a b", "\x1b[0m", "", "x" * 300, "-x", "a%2e", "a?b", "/abs"])
def test_hostile_revisions(revision: str) -> None:
    with pytest.raises(HfvramError) as caught:
        parse_name(f"org/name@{revision}")
    assert caught.value.kind == "revision_not_found"


def test_two_revisions_must_agree() -> None:
    assert parse_name("a/b@v1", "v1") == RepoName("a/b", "v1")
    with pytest.raises(HfvramError) as caught:
        parse_name("a/b@v1", "v2")
    assert caught.value.kind == "usage"


def test_what_exists_here_is_a_path(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(str(tmp_path))
    assert parse_name("gpt2") == RepoName("gpt2")
    (tmp_path / "gpt2").mkdir()  # type: ignore[operator]
    assert parse_name("gpt2") == LocalPath("gpt2")
    assert parse_name("gpt2", local=False) == RepoName("gpt2")


def test_the_rule_for_ids_is_the_hubs() -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    for text in [*HOSTILE, "gpt2", "a/b", "a.b/c_d-e", "_a/b_", "a/b.", "a.gitx/b", "x" * 96, "o/" + "x" * 96]:
        try:
            validate_repo_id(text)
            good = True
        except HFValidationError:
            good = False
        assert is_repo_id(text) == good, text
