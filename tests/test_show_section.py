"""A section kept in a file: every byte around it stays, and what can't be done leaves the file as it was."""

import os
import re
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfvram.errors import HfvramError
from hfvram.show.section import END, START, updated, write

SECTION = f"{START}\n\n## GPU memory\n\n| a |\n| --- |\n| é |\n\n{END}"
NEWER = SECTION.replace("é", "ü")
MIDDLE = f"---\nlicense: mit\n---\n# Title\n\n{START}\nold\n{END}\n\nmore, \ttabs and trailing  \n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", f"{SECTION}\n"),
        ("# Title\n", f"# Title\n\n{SECTION}\n"),
        ("# Title\n\n", f"# Title\n\n{SECTION}\n"),
        ("# Title, no end of line", f"# Title, no end of line\n\n{SECTION}\n"),
        ("---\nlicense: mit\n---\n", f"---\nlicense: mit\n---\n\n{SECTION}\n"),
        (MIDDLE, MIDDLE.replace(f"{START}\nold\n{END}", SECTION)),
        (f"a {START} b {END} c", f"a {SECTION} c"),
        ("x\n<!--HFVRAM:start-->\n<!--  hfvram:END -->", f"x\n{SECTION}"),
        ("```\nan unclosed fence\n", f"```\nan unclosed fence\n\n{SECTION}\n"),
        ("\ufeff# Title\n", f"\ufeff# Title\n\n{SECTION}\n"),
    ],
)
def test_the_section_stands_where_it_should_and_stays(before: str, after: str) -> None:
    once = updated(before.encode(), SECTION, "README.md")
    assert once.decode() == after
    assert updated(once, SECTION, "README.md") == once
    assert updated(once, NEWER, "README.md").decode() == after.replace("é", "ü")


@pytest.mark.parametrize("before", ["# Title\n", MIDDLE, "no end of line", "a\n\nb\n"])
def test_lines_end_as_the_files_do(before: str) -> None:
    windows = before.replace("\n", "\r\n").encode()
    once = updated(windows, SECTION, "README.md")
    if "\n" in before:
        assert once == updated(before.encode(), SECTION, "README.md").replace(b"\n", b"\r\n")
    assert updated(once, SECTION, "README.md") == once


@pytest.mark.parametrize(
    "text",
    [
        f"Write `{START}` and ``{END}``.\n",
        f"~~~md\n{START}\n~~~\n",
        f"````\n```\n{START}\n```\n````\nand\n```html\n{END}\n```\n",
        f"---\nnote: '{START}'\n---\n# Title\n",
    ],
)
def test_markers_in_code_and_front_matter_are_text(text: str) -> None:
    once = updated(text.encode(), SECTION, "README.md")
    assert once.decode() == f"{text}\n{SECTION}\n"
    assert updated(once, NEWER, "README.md").decode() == f"{text}\n{NEWER}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"a\n{START}\nb\n", "broken hfvram markers (start in line 2)"),
        (f"{END}\n", "broken hfvram markers (end in line 1)"),
        (f"{END}\n{START}\n", "broken hfvram markers (end in line 1, start in line 2)"),
        (f"{SECTION}\n{SECTION}\n", "doubled hfvram markers (start in line 1, end in line 9, start in line 10"),
        (f"{START}\n{START}\n{END}\n", "doubled"),
        (f"{START}\n{END}\n{END}\n", "doubled"),
        (f"{START}\n`{END}`\n", "broken"),
    ],
)
def test_broken_and_doubled_markers_are_an_error_and_the_file_untouched(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(HfvramError, match=re.escape(words)) as raised:
        write(str(path), SECTION)
    assert raised.value.kind == "io"
    assert path.read_text() == text
    assert os.listdir(tmp_path) == ["README.md"]


@pytest.mark.parametrize("data", ["é".encode("latin-1"), "# Title".encode("utf-16"), b"a\0b"])
def test_what_is_no_utf_8_text_is_left_alone(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(data)
    with pytest.raises(HfvramError, match="left as it is"):
        write(str(path), SECTION)
    assert path.read_bytes() == data


def test_nothing_is_written_where_nothing_changes(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(b"# Title\r\n")
    assert write(str(path), SECTION)
    first = path.read_bytes(), path.stat()
    assert not write(str(path), SECTION)
    assert (path.read_bytes(), path.stat().st_ino, path.stat().st_mtime_ns) == (
        first[0],
        first[1].st_ino,
        first[1].st_mtime_ns,
    )
    assert write(str(path), NEWER)


def test_mode_and_link_stay(tmp_path: Path) -> None:
    real = tmp_path / "docs" / "card.md"
    real.parent.mkdir()
    real.write_text("# Title\n")
    real.chmod(0o640)
    link = tmp_path / "README.md"
    link.symlink_to(real)
    assert write(str(link), SECTION)
    assert link.is_symlink()
    assert SECTION in real.read_text()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert os.listdir(real.parent) == ["card.md"]


def test_a_read_only_file_a_missing_one_and_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("# Title\n")
    path.chmod(0o444)
    for name, words in (("README.md", "read-only"), ("no.md", "there is no file"), (".", "no regular file")):
        with pytest.raises(HfvramError, match=words) as raised:
            write(str(tmp_path / name), SECTION)
        assert raised.value.kind == "io"
    assert path.read_text() == "# Title\n"
    assert os.listdir(tmp_path) == ["README.md"]


def test_a_disk_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "README.md"
    path.write_text("# Title\n")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(HfvramError, match="No space left on device"):
        write(str(path), SECTION)
    assert path.read_text() == "# Title\n"
    assert os.listdir(tmp_path) == ["README.md"]


TEXT = st.lists(st.sampled_from(["a", "\n", "\r\n", "`", "```", "~~~", "---", START, END, "é", " ", "```\n", "---\n"]))


@given(TEXT.map("".join))
def test_whatever_the_file_the_rest_stays_and_twice_is_once(text: str) -> None:
    data = text.encode()
    try:
        once = updated(data, SECTION, "README.md")
    except HfvramError:
        assert START in text or END in text
        return
    assert updated(once, SECTION, "README.md") == once
    if START not in text:
        assert once.startswith(data)
        assert once.replace(b"\r", b"").strip(b"\n").endswith(SECTION.encode())


def test_a_long_file_full_of_code_is_read_quickly() -> None:
    text = "```\n~~~\n````\n" * 100_000 + "`" * 10_000 + " " + "` ``" * 10_000 + START + "\n" + END
    updated(text.encode(), SECTION, "README.md")
