import math
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfvram.errors import HfvramError
from hfvram.read.configuration import parse_object


def test_what_is_published_is_read() -> None:
    assert parse_object(b'\xef\xbb\xbf{"a": [1, {"b": null}]}', "c") == {"a": [1, {"b": None}]}
    odd = parse_object(b'{"limit": Infinity, "low": -Infinity, "nan": NaN}', "c")
    assert odd["limit"] == math.inf
    assert math.isnan(odd["nan"])


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"null", b"[]", b'"text"', b"12", b"\xff\xfe{}", b"{'a': 1}", b"<html>",
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"a":"' + b"x" * 10_000_001 + b'"}', b"[" + b"[]," * 3_000_000 + b"[]]",
    ],
)  # fmt: skip
def test_what_is_no_configuration_is_refused_quickly_and_in_little_memory(raw: bytes) -> None:
    start = time.process_time()
    tracemalloc.start()
    with pytest.raises(HfvramError) as caught:
        parse_object(raw, "a\x1b[1m/config.json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.kind == "bad_config"
    assert caught.value.message.isprintable()
    assert time.process_time() - start < 2
    assert peak < 50 * 10**6


@given(st.binary(max_size=300))
def test_random_bytes_never_crash(raw: bytes) -> None:
    try:
        assert isinstance(parse_object(raw, "c"), dict)
    except HfvramError as e:
        assert e.kind == "bad_config"  # noqa: PT017
