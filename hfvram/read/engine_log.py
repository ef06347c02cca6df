"""A start-up log, or PyTorch's out-of-memory message: which figures stand in it, of which engine, for which model."""

import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from hfvram.errors import HfvramError, printable
from hfvram.units import GiB, KiB, MiB

Unit = Literal["bytes", "tokens", "blocks", "requests", "cells"]
SIZES: Final = {"B": 1, "KB": KiB, "KiB": KiB, "MB": MiB, "MiB": MiB, "GB": GiB, "GiB": GiB}
"""All of these programs divide by powers of 1024, whatever they print behind it."""
SIZE: Final = r"(\d[\d.]{0,15}) ?(GiB|MiB|KiB|GB|MB|KB|B)\b"
MOST_LINES: Final = 2_000_000
LONGEST: Final = 20_000
"""Characters of a line that are looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Printed:
    """A figure as a log prints it: its line, the text, the value, and how much its last digit is worth."""

    name: str
    line: int
    text: str
    value: int | float
    unit: Unit = "bytes"
    digit: int | float = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """What a log says: the engine, and the model and options where it tells them."""

    engine: str
    model: str | None
    options: Mapping[str, Any]
    printed: tuple[Printed, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Pattern:
    """Where a figure stands in a line. `ranks`: of several alike, the largest, the smallest or the sum counts."""

    name: str
    expression: re.Pattern[str]
    unit: Unit = "bytes"
    ranks: Literal["max", "min", "sum", "last"] = "max"


@dataclass(frozen=True, slots=True)
class Setting:
    """Where an option stands, and what its words mean."""

    name: str
    expression: re.Pattern[str]
    meaning: Callable[[str], Any] = str


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one program writes its log."""

    engine: str
    patterns: Sequence[Pattern]
    settings: Sequence[Setting]


def pattern(
    name: str, expression: str, unit: Unit = "bytes", ranks: Literal["max", "min", "sum", "last"] = "max"
) -> Pattern:
    """A pattern, in which ~ stands for a size with its unit."""
    return Pattern(name, re.compile(expression.replace("~", SIZE)), unit, ranks)


def read(path: str) -> Log:
    """The log in a file (`-`: standard input). Raises `io`, or `usage` where no figure in it is known."""
    from hfvram.read import llama_cpp_log, out_of_memory, sglang_log, vllm_log

    dialects = [m.DIALECT for m in (vllm_log, sglang_log, llama_cpp_log, out_of_memory)]
    lines = list(_lines(path))
    found = [(dialect, list(_printed(dialect, lines))) for dialect in dialects]
    dialect, printed = max(found, key=lambda each: len(each[1]))
    if not printed:
        names = "vLLM, SGLang or llama.cpp"
        raise HfvramError("usage", f"no figure of {names}, and no out-of-memory message of PyTorch, in {path}")
    options = _options(dialect, lines)
    model = options.pop("model", None)
    others = [other.engine for other, figures in found if figures and other is not dialect]
    notes = [f"the log has lines of {' and '.join(others)}, too: {dialect.engine}'s are read"] if others else []
    return Log(
        engine=dialect.engine,
        model=model,
        options=options,
        printed=tuple(sorted(_of_ranks(dialect, printed), key=lambda p: p.line)),
        notes=tuple(notes),
    )


def _lines(path: str) -> Iterator[tuple[int, str]]:
    try:
        if path == "-":
            yield from _numbered(sys.stdin.buffer)
            return
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise HfvramError("io", f"{path} is not a file")
        with Path(path).open("rb") as file:
            yield from _numbered(file)
    except (OSError, ValueError) as error:
        raise HfvramError("io", f"{path}: {getattr(error, 'strerror', None) or 'no such path'}") from None


def _numbered(file: Iterable[bytes]) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(file, 1):
        if number > MOST_LINES:
            return
        yield number, line[:LONGEST].decode("utf-8", "replace")


def _printed(dialect: Dialect, lines: Iterable[tuple[int, str]]) -> Iterator[Printed]:
    for number, line in lines:
        for p in dialect.patterns:
            for m in p.expression.finditer(line):
                named = m.groupdict().get("where")
                numbers = [g for g in m.groups() if g is not None and g != named]
                name = p.name.replace("{}", printable(named, 24)) if named else p.name
                value = _value(p.unit, numbers)
                if value is not None:
                    amount, digit, text = value
                    yield Printed(name=name, line=number, text=text, value=amount, unit=p.unit, digit=digit)


def _value(unit: Unit, numbers: Sequence[str]) -> tuple[int | float, int | float, str] | None:
    try:
        if unit != "bytes":
            number = numbers[0].replace(",", "")
            return (
                (float(number), 0.01, numbers[0])
                if unit == "requests" and "." in number
                else (int(number), 1, numbers[0])
            )
        number, size = numbers[0], SIZES[numbers[1]]
        decimals = len(number.partition(".")[2])
        return round(float(number) * size), max(1, round(size / 10**decimals)), f"{number} {numbers[1]}"
    except (ValueError, KeyError, IndexError, OverflowError):
        return None


def _of_ranks(dialect: Dialect, printed: Sequence[Printed]) -> Iterator[Printed]:
    """One figure of each name: several ranks print the same, and not always equal."""
    how = {p.name.partition("{}")[0]: p.ranks for p in dialect.patterns}
    for name in dict.fromkeys(p.name for p in printed):
        alike = [p for p in printed if p.name == name]
        kind = next((k for start, k in how.items() if name.startswith(start)), "max")
        if kind == "last":
            yield alike[-1]
        elif kind == "sum":
            total = sum(p.value for p in alike)
            first = alike[0]
            text = first.text if len(alike) == 1 else f"{' + '.join(p.text for p in alike[:4])}"
            yield Printed(name=name, line=first.line, text=text, value=total, unit=first.unit, digit=first.digit)
        else:
            yield (min if kind == "min" else max)(alike, key=lambda p: p.value)


def _options(dialect: Dialect, lines: Iterable[tuple[int, str]]) -> dict[str, Any]:
    """The settings that are told; the first time counts."""
    found: dict[str, Any] = {}
    for _, line in lines:
        for s in dialect.settings:
            if s.name not in found and (m := s.expression.search(line)):
                value = s.meaning(m[1])
                if value is not None:
                    found[s.name] = value
    return found
