"""The command line: data to stdout, notices and errors to stderr, one line each, and an exit code to gate on.

0: answered, and where a GPU is named it fits. 1: a model can't be had or understood. 2: usage. 3: it does not fit; of
several answers, one does not; where `--max-ctx` is the question (no `--ctx`), not even 1 does; `--max-batch` too.
"""

import os
import sys
from collections.abc import Callable, Collection, Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

import click

from hfvram import __version__
from hfvram.answer.estimate import Estimate, Fit, error_dict
from hfvram.errors import EXIT_DOES_NOT_FIT, EXIT_FAILED, EXIT_OK, HfvramError, printable
from hfvram.request import Request
from hfvram.show.json import dumps
from hfvram.show.layout import coloured, plain
from hfvram.show.options import GRID, LATER, GroupedCommand, options
from hfvram.show.progress import waiting
from hfvram.show.table import Row
from hfvram.units import GiB

if TYPE_CHECKING:
    from hfvram.answer.question import Session

SOURCE = ("revision", "token", "offline", "file")
"""Options that say how a model is read; all that are neither these nor OUTPUT make the request."""

OUTPUT = ("json", "markdown", "csv", "explain", "quiet")
LATER_COMMANDS = ("sweep", "mcp")


def main(argv: list[str] | None = None) -> int:
    """Run `hfvram ARGS` and return its exit code."""
    args = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        name = args[0] if args and args[0] in COMMANDS else None
        command = COMMANDS[name] if name else ask
        code = command.main(args[1:] if name else args, f"hfvram {name}" if name else "hfvram", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else EXIT_OK
    except HfvramError as error:
        return _failed(error, args)
    except click.ClickException as error:
        return _failed(HfvramError("usage", error.format_message()), args)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:  # the reader has seen enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("HFVRAM_DEBUG") == "1":
            raise
        message = f"internal error, {type(error).__name__}: {error} (HFVRAM_DEBUG=1 shows where; please report it)"
        return _told("internal", message, EXIT_FAILED, args)


def _failed(error: HfvramError, args: list[str]) -> int:
    if os.environ.get("HFVRAM_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    return _told(error.kind, error.message, error.exit_code, args)


def _told(kind: str, message: str, code: int, args: list[str]) -> int:
    _note(message)
    if "--json" in args:
        click.echo(dumps(error_dict(kind, message)))
    return code


def _note(message: str) -> None:
    click.echo(f"hfvram: {printable(message)}", err=True)


@click.pass_context
def _ask(ctx: click.Context, /, models: tuple[str, ...], **values: Any) -> int:
    given = {k: v for k, v in values.items() if ctx.get_parameter_source(k) is click.core.ParameterSource.COMMANDLINE}
    for name in LATER:
        if name in given:
            raise HfvramError("usage", f"--{name.replace('_', '-')} is not supported yet by hfvram {__version__}")
    plot = given.pop("plot", None)
    if plot is not None:
        from hfvram.show.plot import check

        check(plot)
    notes: tuple[str, ...] = ()
    if given.get("from"):
        from hfvram.answer.from_files import understood

        named, given, revision, notes = understood(models[0] if models else None, given)
        models = models or tuple(filter(None, (named,)))
        given = {k: str(v) if k in GRID else v for k, v in given.items()}
        given |= {"revision": revision} if revision and "revision" not in given else {}
    if not models and isinstance(line := given.get("engine_args"), str):
        from hfvram.read.engine_line import parse

        started = parse(line)
        models = tuple(filter(None, (started.model,)))
        if "file" in started.options:
            given.setdefault("file", started.options["file"])
    if not models:
        raise HfvramError("usage", "which model? As in: hfvram mistralai/Mixtral-8x7B --mode inference --ctx 8192")
    for word in (models[0], *(m for m in models if m in COMMANDS)):
        if word in LATER_COMMANDS:
            raise HfvramError("usage", f"the command {word} is not supported yet by hfvram {__version__}")
        if word in COMMANDS:
            raise HfvramError("usage", f"the command comes first: hfvram {word} …")
    output = {k for k in OUTPUT if given.get(k)}
    if len(output - {"quiet"}) > 1:
        raise HfvramError("usage", f"one of {', '.join(f'--{k}' for k in sorted(output - {'quiet'}))} at a time")
    source = {k: v for k, v in given.items() if k in SOURCE}
    asked = {k: v for k, v in given.items() if k not in SOURCE + OUTPUT}
    simulates = asked.get("method") == "simulate" or asked.get("mode", "inference") != "inference"
    doing = "running the model's own code on the meta device" if simulates else f"reading {printable(models[0], 60)}"
    from hfvram.answer.question import Session

    with waiting(doing, quiet="quiet" in output):
        session = Session()
        rows = list(answers(session, models, asked, source, notes))
    if len(rows) == 1 and isinstance(rows[0].answer, HfvramError):
        raise rows[0].answer
    notices(rows, quiet="quiet" in output)
    click.echo(shown(rows, output))
    if plot is not None:
        with waiting("drawing", quiet="quiet" in output):
            draw(session, rows, asked, source, plot)
    return exit_code(rows, asked)


def draw(session: "Session", rows: list[Row], asked: dict[str, Any], source: dict[str, Any], file: str) -> None:
    """A picture of the answers: of one with its curve and its course."""
    from hfvram.show.plot import Picture, plot

    found = [(row, row.answer) for row in rows if isinstance(row.answer, Estimate)]
    if not found:
        return None
    if len(rows) > 1:
        labels = (", ".join((r.model, *(f"{k} {v}" for k, v in r.differs.items()))) for r, _ in found)
        return plot(Picture(tuple(labels), tuple(e for _, e in found)), file)
    from hfvram.answer.course import course_of
    from hfvram.answer.curve import curve_of

    row, e = found[0]
    model = session.model(row.model, Request.from_dict(asked), **source)
    return plot(Picture((row.model,), (e,), curve_of(model, e.request), course_of(model, e.request)), file)


def answers(
    session: "Session",
    models: tuple[str, ...],
    asked: dict[str, Any],
    source: dict[str, Any],
    notes: tuple[str, ...] = (),
) -> Iterator[Row]:
    """An answer, with `notes`, for every model and cell of the grid. A usage error in the request is raised at once."""
    lists = {k: [v.strip() for v in asked[k].split(",")] for k in GRID if k in asked}
    several = {k for k, values in lists.items() if len(values) > 1}
    cells = [dict(zip(lists, values, strict=True)) for values in product(*lists.values())]
    requests = [Request.from_dict(asked | cell) for cell in cells]
    from hfvram.answer.from_files import noted
    from hfvram.answer.gpus import find_gpu

    for name in lists.get("gpu", ()):
        find_gpu(name)
    for model in models:
        for cell, request in zip(cells, requests, strict=True):
            differs = {k: cell[k] for k in GRID if k in several}
            try:
                yield Row(model, differs, noted(session.estimate(model, request, **source), notes))
            except HfvramError as error:
                yield Row(model, differs, error)


def shown(rows: list[Row], output: set[str]) -> str:
    """The rows as asked: one answer in full, several as a table or a list."""
    single = rows[0].answer if len(rows) == 1 else None
    width, paint = terminal()
    if "json" in output:
        from hfvram.answer.ranking import ranking

        found = [as_dict(row) for row in rows]
        if single:
            return dumps(found[0])
        if (best := ranking([row.answer for row in rows])).cheapest is not None:
            found = [one | {"cheapest": i == best.cheapest} for i, one in enumerate(found)]
        return dumps(found)
    if "csv" in output:
        from hfvram.show.csv import csv

        return csv(rows)
    if "markdown" in output:
        from hfvram.show import markdown, table

        return markdown.markdown(single) if isinstance(single, Estimate) else table.markdown(rows)
    if "explain" in output:
        from hfvram.show.explain import explain

        return "\n\n".join(explain(r.answer, width, paint) for r in rows if isinstance(r.answer, Estimate))
    if isinstance(single, Estimate):
        from hfvram.show.text import text

        return text(single, width, paint, drawn=sys.stdout.isatty())
    from hfvram.show.table import table as beside

    return beside(rows, width, paint)


def as_dict(row: Row) -> dict[str, Any]:
    """A row as JSON has it: the answer, or the error with the model and what of the request tells it apart."""
    if isinstance(row.answer, HfvramError):
        failed = error_dict(row.answer.kind, row.answer.message)
        return failed | {"model": {"id": row.model}, "request": dict(row.differs)}
    return row.answer.to_dict()


def terminal() -> tuple[int, Callable[[str, str], str]]:
    """Width and colours of stdout: 80 to 120 columns on a terminal, 100 and plain where it is none."""
    if not sys.stdout.isatty():
        return int(os.environ.get("COLUMNS") or 100), plain
    import shutil

    plainly = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return min(120, max(60, shutil.get_terminal_size().columns)), plain if plainly else coloured


def notices(rows: list[Row], *, quiet: bool) -> None:
    """What is worth knowing about the answers, each once, and every failure, to stderr."""
    told: set[str] = set()
    for row in rows:
        failed = isinstance(row.answer, HfvramError)
        for message in [row.answer.message] if isinstance(row.answer, HfvramError) else row.answer.warnings:
            if message not in told and (failed or not quiet):
                told.add(message)
                _note(message)


def exit_code(rows: list[Row], asked: Collection[str]) -> int:
    """The code for these answers to a request in which the options `asked` were given."""
    failed = [row.answer.exit_code for row in rows if isinstance(row.answer, HfvramError)]
    if failed:
        return EXIT_FAILED if len(failed) < len(rows) else max(failed)
    fits = [row.answer.fit for row in rows if isinstance(row.answer, Estimate) and row.answer.fit]
    return EXIT_OK if all(_satisfies(fit, asked) for fit in fits) else EXIT_DOES_NOT_FIT


def _satisfies(fit: Fit, asked: Collection[str]) -> bool:
    limits = {"ctx": fit.max_ctx, "batch": fit.max_batch}
    wanted = [limit for name, limit in limits.items() if f"max_{name}" in asked and name not in asked]
    return all(wanted) if wanted else fit.fits


def _batch(file: str, jobs: int, **flags: bool) -> int:
    from hfvram.show.batch import batch

    return EXIT_FAILED if batch(file, jobs=jobs, as_json=flags["json"], progress=not flags["quiet"]) else EXIT_OK


def _web(host: str, port: int, browser: bool) -> int:
    from hfvram.show.web.server import serve

    serve(host, port, browser=browser)
    return EXIT_OK


def _gpus(text: str | None, **flags: bool) -> int:
    from hfvram.answer.gpus import gpus
    from hfvram.show.layout import columns

    words = (text or "").lower().split()
    found = [g for g in gpus() if all(w in f"{g.name} {g.vendor} {g.tier} {g.generation}".lower() for w in words)]
    if not found:
        raise HfvramError("usage", f"no GPU with {text!r} in its name, vendor or generation: `hfvram gpus` lists all")
    if flags["json"]:
        keys = ("name", "vendor", "tier", "generation", "memory_bytes")
        click.echo(dumps([{k: getattr(g, k) for k in keys} for g in found]))
    else:
        rows = [(g.name, f"{g.memory_bytes / GiB:.2f} GiB", g.vendor, g.tier, g.generation) for g in found]
        click.echo("\n".join(columns([("name", "usable memory", "vendor", "kind", "generation"), *rows], 100, "<><<<")))
    return EXIT_OK


def _card(model: str, write: str | None, token: str | None, **flags: bool) -> int:
    from hfvram.show.publish import Terminal, publish

    quiet = flags["quiet"]
    _, paint = terminal()
    user = Terminal(click.echo, (lambda _: None) if quiet else _note, lambda q: click.confirm(q, err=True), paint)
    given = {"file": write, "push": flags["push"], "confirmed": flags["yes"], "token": token}
    publish(model, user, **given, offline=flags["offline"])  # type: ignore[arg-type]
    return EXIT_OK


@click.pass_context
def _measure(ctx: click.Context, /, models: tuple[str, ...], **values: Any) -> int:
    from hfvram.show import measure

    given = {k: v for k, v in values.items() if ctx.get_parameter_source(k) is click.core.ParameterSource.COMMANDLINE}
    output = {k for k in OUTPUT if given.get(k)}
    logged = "read_log" in given
    if wrong := output - {"json", "quiet"} - (set() if logged else {"explain"}):
        raise HfvramError("usage", f"--{min(wrong)}: hfvram measure prints a table, or with --json an object")
    source = {k: v for k, v in given.items() if k in SOURCE}
    own = ("read_log", "save", "snapshot")
    asked = {k: v for k, v in given.items() if k not in SOURCE + OUTPUT + own}
    width = terminal()[0]
    if logged:
        told = measure.from_log(given["read_log"], models, asked, source)
        notes, shown = told.warnings, measure.log_text(told, output, width)
    else:
        with waiting("measuring", quiet="quiet" in output):
            found = measure.on_gpu(models, asked, source, given.get("save"), given.get("snapshot"))
        notes, shown = found.warnings, measure.gpu_text(found, output, width)
    for message in () if "quiet" in output else notes:
        _note(message)
    click.echo(shown)
    return EXIT_OK


def _hidden(parameters: list[click.Parameter]) -> list[click.Parameter]:
    """The request's options, of which `hfvram --help` tells."""
    for parameter in parameters:
        if isinstance(parameter, click.Option):
            parameter.hidden = parameter.name not in ("json", "quiet", "gpu", "ctx", "mode", "batch")
    return parameters


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"hfvram {__version__}")
        ctx.exit()


_JSON = click.Option(["--json"], is_flag=True, help="one JSON object a line")
_QUIET = click.Option(["-q", "--quiet"], is_flag=True, help="no progress, no notices")
ask = GroupedCommand(
    "hfvram",
    callback=_ask,
    help="How much GPU memory a Hugging Face model needs, and whether it fits, before anything is downloaded.",
    epilog="Exit codes: 0 answered (and fits), 1 no answer, 2 usage, 3 does not fit (of several: one does not).",
    params=[
        click.Argument(["models"], nargs=-1, metavar="MODEL..."),
        *options(),
        click.Option(["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_version),
    ],
)
COMMANDS = {
    "batch": click.Command(
        "batch",
        callback=_batch,
        help="Answer a JSON request a line of FILE (- for standard input), in order, an answer a line. "
        'A line: {"id": 1, "model": "ORG/NAME", "ctx": 8192}, with any option of the request.',
        params=[
            click.Argument(["file"]),
            _JSON,
            click.Option(["--jobs"], type=click.IntRange(1, 512), default=1, help="processes (1)"),
            _QUIET,
        ],
    ),
    "card": click.Command(
        "card",
        callback=_card,
        help="The section on GPU memory for the model card of MODEL, as Markdown: memory by context and quantization, "
        "what fits which GPU, what fine-tuning takes.",
        params=[
            click.Argument(["model"]),
            click.Option(["--write"], metavar="FILE", help="keep it in FILE, between <!-- hfvram:start --> and end"),
            click.Option(["--push"], is_flag=True, help="show the change of README.md on the Hub, ask, and propose it"),
            click.Option(["--yes"], is_flag=True, help="with --push: don't ask"),
            click.Option(["--token"], metavar="TOKEN", help="Hub token, in place of HF_TOKEN"),
            click.Option(["--offline"], is_flag=True, help="the cache and the built-in catalogue only"),
            _QUIET,
        ],
    ),
    "measure": click.Command(
        "measure",
        callback=_measure,
        help="Run the request on the local GPU, on a model with random weights, and set predicted against measured. "
        "Or, with --read-log, set the estimate against what a log of vLLM, SGLang or llama.cpp, or an out-of-memory "
        "message of PyTorch says: MODEL and options (all of hfvram's) win over what the log tells.",
        params=[
            click.Argument(["models"], nargs=-1, metavar="[MODEL]"),
            click.Option(
                ["--read-log"], metavar="FILE", help="a start-up log or an out-of-memory message (- for stdin)"
            ),
            click.Option(["--save"], metavar="FILE", help="append the measurement as a line of JSON"),
            click.Option(["--snapshot"], metavar="FILE", help="every allocation, for PyTorch's viewer of memory"),
            *_hidden(options()),
        ],
    ),
    "gpus": click.Command(
        "gpus",
        callback=_gpus,
        help="The GPUs known by name, with the memory that a process can use; TEXT narrows them down.",
        params=[click.Argument(["text"], required=False), click.Option(["--json"], is_flag=True, help="a JSON list")],
    ),
    "web": click.Command(
        "web",
        callback=_web,
        help="The page: the same question in a form, its answer as figures and pictures (needs hfvram[web]). Its "
        "address takes options: /?model=ORG/NAME&ctx=8192. On another host than this machine's own it answers "
        "strangers: without this machine's token.",
        params=[
            click.Option(["--host"], default="127.0.0.1", help="where it listens (127.0.0.1)"),
            click.Option(["--port"], type=click.IntRange(0, 65535), default=7860, help="(7860; 0: any that is free)"),
            click.Option(["--browser/--no-browser"], default=True, help="open it in the browser (yes)"),
        ],
    ),
}
