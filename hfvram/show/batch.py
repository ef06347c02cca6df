"""Many requests: a JSON object a line in, an answer a line out, in order, as they come."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from hfvram.answer.estimate import error_dict
from hfvram.answer.from_files import noted, understood
from hfvram.errors import HfvramError
from hfvram.request import Request
from hfvram.show.json import dumps
from hfvram.show.layout import shortened, size

if TYPE_CHECKING:
    from hfvram.answer.question import Session

SOURCE = {"revision": str, "token": str, "offline": bool, "file": str}
"""Keys of a line that say how the model is read, with their types; all others but `id` and `model` are options."""


def batch(path: str, *, jobs: int, as_json: bool, progress: bool) -> int:
    """Answer the requests of a file (`-`: standard input) on stdout; the number that failed.

    `jobs` processes share the lines. Progress goes to stderr where that is a terminal and stdout is none.
    """
    failed = 0
    show = progress and sys.stderr.isatty() and not sys.stdout.isatty()
    for count, (ok, line) in enumerate(_answered(_lines(path), jobs, as_json), 1):
        failed += not ok
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        if show and (count % 50 == 0 or not ok):
            sys.stderr.write(f"\r{count:,} answered, {failed:,} failed")
    if show:
        sys.stderr.write("\n")
    return failed


def _lines(path: str) -> Iterator[bytes]:
    if path == "-":
        yield from (line for line in sys.stdin.buffer if line.strip())
        return
    try:
        with open(path, "rb") as file:
            yield from (line for line in file if line.strip())
    except OSError as error:
        raise HfvramError("io", f"{path}: {error.strerror}") from None


def _answered(lines: Iterable[bytes], jobs: int, as_json: bool) -> Iterator[tuple[bool, str]]:
    work = ((line, as_json) for line in lines)
    if jobs == 1:
        yield from map(_answer, work)
        return
    from multiprocessing import Pool

    with Pool(jobs, _be_quiet) as pool:
        yield from pool.imap(_answer, work)


def _be_quiet() -> None:
    """A worker leaves Ctrl-C to the parent."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _answer(work: tuple[bytes, bool]) -> tuple[bool, str]:
    line, as_json = work
    answer = answer_line(line)
    return answer["error"] is None, dumps(answer, None) if as_json else in_words(answer)


def answer_line(line: bytes) -> dict[str, Any]:
    """The answer to one line, with its `id`. Whatever is wrong with it is in `error`."""
    asked: Any = None
    try:
        asked = _parsed(line)
        named, request, source, notes = _question(asked)
        estimate = noted(_session().estimate(named, request, **source), notes)
        return {"id": asked.get("id"), **estimate.to_dict()}
    except HfvramError as error:
        failed = error_dict(error.kind, error.message)
    except Exception as error:
        if os.environ.get("HFVRAM_DEBUG") == "1":
            raise
        failed = error_dict("internal", HfvramError("io", f"internal error, {type(error).__name__}: {error}").message)
    about = asked if isinstance(asked, dict) else {}
    model = {"id": about["model"]} if isinstance(about.get("model"), str) else None
    return {"id": about.get("id"), **failed, "model": model}


def in_words(answer: dict[str, Any]) -> str:
    """An answer as a line of a table."""
    id_ = "" if answer["id"] is None else dumps(answer["id"], None)
    if answer["error"]:
        model = (answer["model"] or {}).get("id", "")
        why = f"{answer['error']['kind']}: {answer['error']['message']}"
        return f"{shortened(id_, 12):12}  {shortened(model, 36):36}  {why}"
    asked, fit = answer["request"], answer["fit"]
    sizes = "  ".join(f"{size(answer[k]):>9}" for k in ("weights_bytes", "cache_bytes", "device_bytes"))
    verdict = f"  {'fits' if fit['fits'] else 'does not fit'} {fit['gpu']}" if fit else ""
    model = shortened(answer["model"]["id"], 36)
    return f"{shortened(id_, 12):12}  {model:36}  ctx {asked['ctx']:,}  batch {asked['batch']}  {sizes}{verdict}"


def _question(asked: dict[str, Any]) -> tuple[str, Request, dict[str, Any], tuple[str, ...]]:
    options: dict[str, Any] = {k: v for k, v in asked.items() if k not in SOURCE and k not in ("id", "model")}
    named = asked.get("model")
    model, options, revision, notes = understood(named if isinstance(named, str) else None, options)
    if not model:
        raise HfvramError("usage", 'a request needs a "model": an id, a folder or a file')
    for key, kind in SOURCE.items():
        if asked.get(key) is not None and not isinstance(asked[key], kind):
            raise HfvramError("usage", f'"{key}" is not {"true or false" if kind is bool else "text"}')
    source = {k: asked[k] for k in SOURCE if k in asked}
    source |= {"revision": revision} if revision and "revision" not in asked else {}
    return model, Request.from_dict(options), source, notes


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        asked = json.loads(line, parse_constant=_refused)
    except (ValueError, RecursionError) as error:
        raise HfvramError("usage", f"not a JSON object: {error}") from None
    if not isinstance(asked, dict):
        raise HfvramError("usage", "not a JSON object")
    return asked


def _refused(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


@cache
def _session() -> "Session":
    """This process's session: a model named twice is read once."""
    from hfvram.answer.question import Session

    return Session()
