"""Where a card's section goes: to stdout, into a file, or to the Hub as a pull request that was looked at."""

import difflib
import sys
from collections.abc import Callable
from dataclasses import dataclass

from hfvram import __version__
from hfvram.answer.card import Card, card
from hfvram.errors import HfvramError, printable
from hfvram.show.card import section
from hfvram.show.layout import Paint
from hfvram.show.progress import waiting
from hfvram.show.section import updated, write

TITLE = "GPU memory figures"
DESCRIPTION = f"""The section between the hfvram markers says how much GPU memory the model takes by context and
quantization, and on which GPUs it fits. Written by `hfvram card`, version {__version__}; nothing else is changed."""
COLOURS = {"+": "green", "-": "red", "@": "cyan"}


@dataclass(frozen=True, slots=True)
class Terminal:
    """Who is spoken to: `say` is for stdout, `note` for stderr, `ask` a question of yes or no."""

    say: Callable[[str], None]
    note: Callable[[str], None]
    ask: Callable[[str], bool]
    paint: Paint


def publish(
    name: str, terminal: Terminal, *, file: str | None, push: bool, confirmed: bool, token: str | None, offline: bool
) -> None:
    """Print the card of a model, or keep it in `file`, or propose it on the Hub."""
    if push and offline:
        raise HfvramError("usage", "--push needs the Hub: leave --offline out")
    if push and not confirmed and not sys.stdin.isatty():
        raise HfvramError("usage", "--push asks before it opens a pull request: answer on a terminal, or pass --yes")
    if confirmed and not push:
        raise HfvramError("usage", "--yes is for --push")
    with waiting(f"estimating {printable(name, 60)}"):
        made = card(name, token=token, offline=offline)
    for warning in made.warnings:
        terminal.note(warning)
    if file is not None:
        done = write(file, section(made))
        terminal.note(f"{file}: {'the section is written' if done else 'nothing to change'}")
    if push:
        propose(name, made, terminal, confirmed, token)
    elif file is None:
        terminal.say(section(made))


def propose(name: str, made: Card, terminal: Terminal, confirmed: bool, token: str | None) -> None:
    """Show what would change in README.md on the Hub, ask, and open a pull request."""
    from hfvram.read import pull_request

    readme = pull_request.read_readme(name, token)
    if readme.id.lower() != made.id.lower():
        raise HfvramError("usage", f"--push wants the exact name: {made.id}, not {name}")
    before = readme.data or b""
    after = updated(before, section(made), f"README.md of {readme.id}")
    if after == before:
        terminal.note(f"README.md of {readme.id}: nothing to change")
        return
    terminal.say("\n".join(terminal.paint(line, COLOURS.get(line[:1], "white")) for line in difference(before, after)))
    if not confirmed and not terminal.ask(f"Open a pull request with this change at {readme.id}?"):
        terminal.note("nothing was sent")
        return
    opened = pull_request.propose(readme, after, title=TITLE, description=DESCRIPTION, token=token)
    for warning in opened.warnings:
        terminal.note(warning)
    terminal.note("it is proposed already:" if opened.opened_before else "opened a pull request:")
    terminal.say(opened.url)


def difference(before: bytes, after: bytes) -> list[str]:
    """The change of README.md as `diff -u` shows it; what would steer a terminal is made visible."""
    old, new = (
        [printable(line.rstrip("\r"), 10_000) for line in data.decode().split("\n")] for data in (before, after)
    )
    return list(difflib.unified_diff(old, new, "README.md", "README.md", lineterm=""))
