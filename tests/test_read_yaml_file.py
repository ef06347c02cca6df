"""Files of settings, and files that are none: bombs, binaries, wrong kinds."""

import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hfvram.errors import HfvramError
from hfvram.read.yaml_file import load

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{now}: &{now} [{', '.join(['*' + before] * 9)}]\n" for before, now in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{now}: &{now}\n  <<: [{', '.join(['*' + before] * 9)}]\n"
    for before, now in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_yaml_json_and_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "f"
    for text in ("a: 1\nb: [x]\n", '{"a": 1, "b": ["x"]}', "{a: 1, b: [x]}", "\ufeffa: 1\nb:\n  - x\n"):
        file.write_text(text)
        assert load(str(file)) == {"a": 1, "b": ["x"]}


def test_an_anchor_may_be_used_again(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("base: &base {lr: 1}\nmine: {<<: *base, x: 2}\n")
    assert load(str(file))["mine"] == {"lr": 1, "x": 2}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, "more than 20 aliases"),
        (MERGES, "more than 20 aliases"),
        ("[" * 100_000, "nested deeper than 32 levels"),
        ('{"a": ' * 100_000, "nested"),
        ("a: b: c", "line 1: mapping values are not allowed"),
        ("a: [1\nb: 2", "neither YAML nor JSON: line 2"),
        ('{"a": 1,,}', "neither YAML nor JSON"),
        ("- a\n- b\n", "holds no settings"),
        ("", "holds no settings"),
        ("just words", "holds no settings"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("a: \x00", "neither YAML nor JSON"),
        ("? [1, 2]\n: x", "unhashable key"),
        ("a: " + "9" * 5000, "neither YAML nor JSON"),
        ("x" * (1 << 20) + "x", "larger than 1 MiB"),
        (b"PK\x03\x04\xff\xfe", "is not text"),
    ],
)
def test_what_is_no_file_of_settings_is_one_line_at_once(text: str | bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    start = time.monotonic()
    with pytest.raises(HfvramError, match=said) as raised:
        load(str(file))
    assert (raised.value.kind, "\n" in raised.value.message) == ("usage", False)
    assert time.monotonic() - start < 2


def test_a_file_that_is_not_there_a_folder_and_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "none.yml", tmp_path, tmp_path / "pipe", "a\0b"):
        with pytest.raises(HfvramError) as raised:
            load(str(path))
        assert raised.value.kind == "io"


@given(st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_any_bytes_are_settings_or_an_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "f"
    file.write_bytes(content)
    try:
        found = load(str(file))
    except HfvramError:
        return
    assert isinstance(found, dict)
