"""Which modules somebody's patterns mean: names, wildcards and regular expressions out of published configurations.

They come by the hundred (FP8 checkpoints list every projection that they leave alone) and from anybody. A regular
expression that could backtrack for ever is matched by the set of positions that each of its parts can reach instead.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

from hfvram.errors import HfvramError

MAX_PATTERN = 1000
MAX_REPEAT = 1000
MOST_SECONDS = 2.0
Ends = Callable[[str, int], frozenset[int]]
"""Where a part of an expression can end in a text, from a start."""

_CLASSES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_NOT_DIGIT": lambda c: not c.isdecimal(),
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_NOT_SPACE": lambda c: not c.isspace(),
    "CATEGORY_WORD": lambda c: c.isalnum() or c == "_",
    "CATEGORY_NOT_WORD": lambda c: not (c.isalnum() or c == "_"),
}


@lru_cache(maxsize=64)
def chosen(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    """Whether any of a quantization's patterns means a parameter or one of the modules on its path.

    A pattern is a module's name or whole parts of one, with `*` as a wildcard, or after `re:` a regular expression that
    the name begins with. What is no regular expression means nothing. What it returns raises `bad_config` where the
    expressions take too long.

    >>> chosen(("gate", "model.layers.1"))("model.layers.0.mlp.gate.weight")
    True
    >>> chosen(("gate", "model.layers.1"))("model.layers.10.mlp.gate_proj.weight")
    False
    """
    plain = frozenset(p for p in patterns if "*" not in p and not p.startswith("re:"))
    globs = [p.split("*") for p in patterns if "*" in p and not p.startswith("re:")]
    expressions = [e for p in patterns if p.startswith("re:") and (e := expression(p[3:]))]

    clock = Clock()

    def means(name: str) -> bool:
        if plain and not plain.isdisjoint(paths(name)):
            return True
        return any(_globbed(name, pieces) for pieces in globs) or any(clock.run(e.begins, name) for e in expressions)

    return means


def paths(name: str) -> Iterable[str]:
    """Every run of whole parts of a name."""
    cuts = [-1, *(i for i, c in enumerate(name) if c == "."), len(name)]
    return (name[a + 1 : b] for i, a in enumerate(cuts) for b in cuts[i + 1 :])


def _globbed(name: str, pieces: list[str]) -> bool:
    """Whether whole parts of the name are these pieces with anything between: each as far left as it goes."""
    framed, first, last = f".{name}.", f".{pieces[0]}", f"{pieces[-1]}."
    at = framed.find(first)
    if at < 0:
        return False
    at += len(first)
    for piece in pieces[1:-1]:
        if (found := framed.find(piece, at)) < 0:
            return False
        at = found + len(piece)
    return framed.find(last, at) >= 0


@dataclass(slots=True)
class Clock:
    """What all expressions of a checkpoint may take together."""

    seconds_left: float = MOST_SECONDS

    def run(self, work: Callable[[str], bool], name: str) -> bool:
        """Raises `bad_config` where the time is up."""
        if self.seconds_left < 0:
            raise HfvramError("bad_config", "the patterns of modules take too long to match: they name no modules")
        start = time.perf_counter()
        found = work(name)
        self.seconds_left -= time.perf_counter() - start
        return found


@dataclass(frozen=True, slots=True)
class Expression:
    """A regular expression that is over in time."""

    ends: Ends
    quick: re.Pattern[str] | None
    """Python's own, where it can't take long."""

    def begins(self, name: str) -> bool:
        """As `re.match`."""
        return self.quick.match(name) is not None if self.quick else bool(self.ends(name, 0))

    def is_whole(self, name: str) -> bool:
        """As `re.fullmatch`."""
        return self.quick.fullmatch(name) is not None if self.quick else len(name) in self.ends(name, 0)


def expression(text: str) -> Expression | None:
    r"""A regular expression; None for what is none, or is not understood: back references, looking behind, flags.

    >>> e = expression(r".*layers\.\d+\.mlp")
    >>> e.begins("model.layers.10.mlp.gate"), e.is_whole("model.layers.10.mlp.gate")
    (True, False)
    """
    if len(text) > MAX_PATTERN:
        return None
    try:
        tree = import_module("re._parser").parse(text)
        if tree.state.flags != re.UNICODE.value or tree.state.groupdict:
            return None
        ends = _sequence(tree)
        return Expression(ends, re.compile(text) if _is_quick(tree) else None)
    except (re.error, RecursionError, OverflowError, NotImplementedError):
        return None


def _is_quick(tree: Any) -> bool:
    """Whether backtracking stays short: three repeats, each of one character, and two choices at most."""
    kinds = list(_kinds(tree))
    repeats, choices = kinds.count("REPEAT"), kinds.count("BRANCH")
    return "NESTED" not in kinds and repeats <= 3 and choices <= 2


def _kinds(tree: Iterable[tuple[Any, Any]]) -> Iterator[str]:
    for kind, value in tree:
        name = str(kind)
        if name == "BRANCH":
            yield name
            for branch in value[1]:
                yield from _kinds(branch)
        elif name == "SUBPATTERN":
            yield from _kinds(value[3])
        elif name.startswith("ASSERT"):
            yield from _kinds(value[1])
        elif name.endswith("REPEAT"):
            yield "REPEAT"
            if any(str(k) not in ("LITERAL", "NOT_LITERAL", "ANY", "IN") for k, _ in value[2]) or len(value[2]) > 1:
                yield "NESTED"


def _remembered(ends: Ends) -> Ends:
    """What is known of a start is not worked out again, as long as the text stays the same."""
    seen: dict[int, frozenset[int]] = {}
    of: list[str] = [""]

    def known(text: str, start: int) -> frozenset[int]:
        if of[0] != text:
            seen.clear()
            of[0] = text
        if start not in seen:
            seen[start] = ends(text, start)
        return seen[start]

    return known


def _sequence(tree: Iterable[tuple[Any, Any]]) -> Ends:
    parts = [_part(str(kind), value) for kind, value in tree]

    def ends(text: str, start: int) -> frozenset[int]:
        at = frozenset((start,))
        for part in parts:
            at = frozenset(end for a in at for end in part(text, a))
            if not at:
                break
        return at

    return _remembered(ends)


def _part(kind: str, value: Any) -> Ends:
    if kind in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
        return _character(_accepts(kind, value))
    if kind == "SUBPATTERN" and not value[1] and not value[2]:
        return _sequence(value[3])
    if kind == "BRANCH":
        branches = [_sequence(branch) for branch in value[1]]
        return lambda text, start: frozenset().union(*(b(text, start) for b in branches))
    if kind in ("MAX_REPEAT", "MIN_REPEAT"):
        return _repeat(*value)
    if kind in ("ASSERT", "ASSERT_NOT") and value[0] == 1:
        ahead, wanted = _sequence(value[1]), kind == "ASSERT"
        return lambda text, start: frozenset((start,)) if bool(ahead(text, start)) is wanted else frozenset()
    if kind == "AT":
        return _place(str(value))
    raise NotImplementedError(kind)


def _character(accepts: Callable[[str], bool]) -> Ends:
    def ends(text: str, start: int) -> frozenset[int]:
        return frozenset((start + 1,)) if start < len(text) and accepts(text[start]) else frozenset()

    return ends


def _accepts(kind: str, value: Any) -> Callable[[str], bool]:
    if kind == "ANY":
        return lambda c: c != "\n"
    if kind == "LITERAL":
        return lambda c: ord(c) == value
    if kind == "NOT_LITERAL":
        return lambda c: ord(c) != value
    if kind == "RANGE":
        return lambda c: value[0] <= ord(c) <= value[1]
    if kind == "CATEGORY":
        return _CLASSES[str(value)]
    negated = str(value[0][0]) == "NEGATE"
    among = [_accepts(str(k), v) for k, v in value[negated:]]
    return lambda c: any(a(c) for a in among) is not negated


def _repeat(least: int, most: int, body: Iterable[tuple[Any, Any]]) -> Ends:
    once, endless = _sequence(body), str(most) == "MAXREPEAT"
    if least > MAX_REPEAT or (not endless and most > MAX_REPEAT):
        raise NotImplementedError("more repeats than a name has letters")

    def ends(text: str, start: int) -> frozenset[int]:
        at = frozenset((start,))
        for _ in range(least):
            at = frozenset(end for a in at for end in once(text, a))
        reached, count = at, least
        while at and (endless or count < most):
            at = frozenset(end for a in at for end in once(text, a)) - reached
            reached |= at
            count += 1
        return reached

    return _remembered(ends)


def _place(kind: str) -> Ends:
    tests: dict[str, Callable[[str, int], bool]] = {
        "AT_BEGINNING": lambda text, i: i == 0,
        "AT_BEGINNING_STRING": lambda text, i: i == 0,
        "AT_END": lambda text, i: i == len(text) or (i == len(text) - 1 and text[i] == "\n"),
        "AT_END_STRING": lambda text, i: i == len(text),
        "AT_BOUNDARY": lambda text, i: _word(text, i - 1) is not _word(text, i),
        "AT_NON_BOUNDARY": lambda text, i: bool(text) and _word(text, i - 1) is _word(text, i),
    }
    if kind not in tests:
        raise NotImplementedError(kind)
    test = tests[kind]
    return lambda text, start: frozenset((start,)) if test(text, start) else frozenset()


def _word(text: str, i: int) -> bool:
    return 0 <= i < len(text) and (text[i].isalnum() or text[i] == "_")
