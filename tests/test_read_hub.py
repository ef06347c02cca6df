import time
from pathlib import Path

import pytest
from hub import TOKEN, FakeHub, Repo, Sparse, commit_of, safetensors

from hfvram.errors import HfvramError
from hfvram.read.hub import Hub
from hfvram.read.names import RepoName

CONFIG = b'{"model_type": "llama"}'


def small() -> dict[str, Repo]:
    return {"a/b": Repo({"config.json": CONFIG, "model.safetensors": safetensors({"w": ("F32", (4,))})})}


def kind_of(call: object) -> str:
    with pytest.raises(HfvramError) as caught:
        call()  # type: ignore[operator]
    assert caught.value.message.isprintable()
    return caught.value.kind


def test_info_says_commit_files_and_count(hf_home: Path) -> None:
    with FakeHub(small()) as fake:
        info = Hub(fake.url, None).info(RepoName("a/b"))
    assert (info.id, info.commit) == ("a/b", commit_of(fake.repos["a/b"].files))
    assert info.files == {"config.json", "model.safetensors"}
    assert info.parameters == {"F32": 4}
    assert fake.log[0].agent.startswith("hfvram/")


def test_each_refusal_has_its_kind(hf_home: Path) -> None:
    repos = {**small(), "a/gated": Repo({"config.json": CONFIG}, gated=True), "a/private": Repo({}, private=True)}
    with FakeHub(repos) as fake:
        anonymous, stranger, bad = (Hub(fake.url, t) for t in (None, "hf_other", "nonsense"))
        assert kind_of(lambda: anonymous.info(RepoName("a/missing"))) == "not_found"  # a 401 on the real Hub
        assert kind_of(lambda: stranger.info(RepoName("a/missing"))) == "not_found"  # a 404
        assert kind_of(lambda: anonymous.info(RepoName("a/private"))) == "not_found"
        assert kind_of(lambda: stranger.info(RepoName("a/private"))) == "not_found"
        assert kind_of(lambda: anonymous.info(RepoName("a/b", "v9"))) == "revision_not_found"
        assert kind_of(lambda: anonymous.text(RepoName("a/gated"), "config.json")) == "gated"
        assert kind_of(lambda: stranger.text(RepoName("a/gated"), "config.json")) == "gated"
        assert kind_of(lambda: bad.info(RepoName("a/b"))) == "unauthorized"
        assert kind_of(lambda: Hub(fake.url, "hf_\nx").info(RepoName("a/b"))) == "unauthorized"
        assert kind_of(lambda: Hub(fake.url, "hf_é").info(RepoName("a/b"))) == "unauthorized"
        assert Hub(fake.url, TOKEN).text(RepoName("a/gated"), "config.json") == CONFIG
        assert anonymous.text(RepoName("a/b"), "no-such-file") is None


def test_the_token_stays_with_its_host(hf_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with FakeHub(small()) as fake:
        hub = Hub(fake.url, None)
        hub.text(RepoName("a/b"), "config.json")
        hub.part(RepoName("a/b"), "model.safetensors", 0, 10)
    by_host = {(a.host.split(":")[0], a.token) for a in fake.log}
    assert by_host == {("127.0.0.1", TOKEN), ("localhost", None)}


@pytest.mark.parametrize("fault", ["500", "503", "reset", "truncate", "429 0", "408"])
def test_a_passing_fault_is_retried(hf_home: Path, fault: str) -> None:
    with FakeHub(small()) as fake:
        fake.faults.extend([fault, fault])
        assert Hub(fake.url, None).info(RepoName("a/b")).parameters == {"F32": 4}
        assert len(fake.log) == 3


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("500", "network"),
        ("reset", "network"),
        ("truncate", "network"),
        ("429 0", "rate_limited"),
        ("429", "rate_limited"),
    ],
)
def test_a_lasting_fault_is_told_soon(hf_home: Path, fault: str, kind: str) -> None:
    with FakeHub(small()) as fake:
        fake.always = fault
        start = time.monotonic()
        assert kind_of(lambda: Hub(fake.url, None).info(RepoName("a/b"))) == kind
        assert time.monotonic() - start < 5
        assert len(fake.log) == 5


@pytest.mark.parametrize("fault", ["garbage", "loop", "418"])
def test_what_makes_no_sense_is_not_asked_again(hf_home: Path, fault: str) -> None:
    with FakeHub(small()) as fake:
        fake.always = fault
        assert kind_of(lambda: Hub(fake.url, None).info(RepoName("a/b"))) == "network"
        assert len(fake.log) <= 6  # one, and the redirects of the circle


def test_retry_after_is_kept_and_bounded(hf_home: Path) -> None:
    with FakeHub(small()) as fake:
        fake.faults.append("429 1")
        start = time.monotonic()
        assert Hub(fake.url, None).info(RepoName("a/b")).parameters
        assert 1 <= time.monotonic() - start < 3
        fake.always = "429 60"
        start = time.monotonic()
        assert kind_of(lambda: Hub(fake.url, None).info(RepoName("a/b"))) == "rate_limited"
        assert time.monotonic() - start < 1  # waiting would break the bound


def test_retry_after_may_be_a_date(hf_home: Path) -> None:
    with FakeHub(small()) as fake:
        fake.faults.append("429 Wed, 21 Oct 2015 07:28:00 GMT")
        assert Hub(fake.url, None).info(RepoName("a/b")).parameters
        fake.always = "429 Wed, 21 Oct 2099 07:28:00 GMT"
        assert kind_of(lambda: Hub(fake.url, None).info(RepoName("a/b"))) == "rate_limited"


def test_a_dripping_answer_meets_the_deadline(hf_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfvram.read.hub.ANSWER_SECONDS", 0.5)
    with FakeHub(small()) as fake:
        fake.always = "drip"
        start = time.monotonic()
        assert kind_of(lambda: Hub(fake.url, None).info(RepoName("a/b"))) == "network"
        assert time.monotonic() - start < 2


def test_nobody_there_is_found_out_quickly(hf_home: Path) -> None:
    with FakeHub({}) as fake:
        url = fake.url
    start = time.monotonic()
    assert kind_of(lambda: Hub(url, None).info(RepoName("a/b"))) == "network"
    assert kind_of(lambda: Hub("http://no-such-host.invalid", None).info(RepoName("a/b"))) == "network"
    assert time.monotonic() - start < 4


@pytest.mark.parametrize(
    "endpoint", ["", "nonsense", "ftp://x", "http://[", "http://a:b:c", "http://\x00", "file:///etc"]
)
def test_an_endpoint_that_is_none(hf_home: Path, endpoint: str) -> None:
    assert kind_of(lambda: Hub(endpoint, None).info(RepoName("a/b"))) == "network"


def test_a_large_file_is_refused_without_reading_it(hf_home: Path) -> None:
    with FakeHub({"a/b": Repo({"config.json": Sparse(b"{", 10**9), "ten.json": b" " * 10_000_001})}) as fake:
        start = time.monotonic()
        assert kind_of(lambda: Hub(fake.url, None).text(RepoName("a/b"), "config.json")) == "bad_config"
        assert kind_of(lambda: Hub(fake.url, None).text(RepoName("a/b"), "ten.json")) == "bad_config"
        assert time.monotonic() - start < 2
        time.sleep(0.1)
        assert sum(a.sent for a in fake.log) < 30 * 10**6


def test_a_server_that_ignores_ranges_is_read_only_as_far_as_needed(hf_home: Path) -> None:
    with FakeHub({"a/b": Repo({"w.safetensors": Sparse(b"0123456789", 10**9)})}, ranges=False) as fake:
        part = Hub(fake.url, None).part(RepoName("a/b"), "w.safetensors", 2, 6)
        assert part is not None
        assert (part.body, part.file_bytes) == (b"2345", 10**9)
        time.sleep(0.1)
        assert sum(a.sent for a in fake.log) < 20 * 10**6  # what fits in the sockets' buffers


def test_parts_of_a_file(hf_home: Path) -> None:
    with FakeHub(
        {"a/b": Repo({"w.safetensors": Sparse(b"0123456789", 12), "none.safetensors": Sparse(b"", 0)})}
    ) as fake:
        hub = Hub(fake.url, None)
        whole = hub.part(RepoName("a/b"), "w.safetensors", 0, 100)
        assert whole is not None
        assert (whole.body, whole.file_bytes) == (b"0123456789\0\0", 12)
        rest = hub.part(RepoName("a/b"), "w.safetensors", 10, 12, whole.url)
        assert rest is not None
        assert rest.body == b"\0\0"
        assert len(fake.log) == 3  # the second part came from where the first did, without the redirect
        assert kind_of(lambda: hub.part(RepoName("a/b"), "none.safetensors", 0, 10)) == "bad_header"


def test_names_are_quoted_in_addresses(hf_home: Path) -> None:
    with FakeHub({"a/b": Repo({"x y?#%2e.json": b"{}"})}) as fake:
        hub = Hub(fake.url, None)
        assert hub.text(RepoName("a/b"), "x y?#%2e.json") == b"{}"
        assert kind_of(lambda: hub.info(RepoName("a/b", "refs/pr/1"))) == "revision_not_found"
        assert fake.log[-1].path.startswith("/api/models/a/b/revision/refs%2Fpr%2F1?")
