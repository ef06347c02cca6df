"""What somebody asks the page, in the form or in the address, as a model and a request. All of it is a stranger's."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlencode

import click

from hfvram.errors import HfvramError, printable
from hfvram.request import Request
from hfvram.show.options import options

FORM: Final = ("mode", "ctx", "batch", "quant", "engine", "gpu")
"""Options that have a control of their own; the others are typed as on the command line."""
SOURCE: Final = ("revision", "file")
"""Of the options that say how a model is read, those that name something in its repo."""
REFUSED: Final = ("trust_remote_code", "token", "offline")
"""What a stranger may not decide about the machine that the page is on."""
MOST_CHARACTERS: Final = 2000
_SWITCHES: Final = {"true": True, "1": True, "yes": True, "on": True, "": True} | dict.fromkeys(
    ("false", "0", "no", "off"), False
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A model's name and the options that were given, as text or as the request has them."""

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def request(self) -> Request:
        """Raises `usage` for options that don't exist or values that they can't have."""
        return Request.from_dict({k: v for k, v in self.options.items() if k not in SOURCE})

    @property
    def source(self) -> dict[str, Any]:
        return {k: str(v) for k, v in self.options.items() if k in SOURCE}

    @property
    def query(self) -> str:
        """The address's query that asks the same.

        >>> Asked("a/b", {"ctx": "8k", "lora_targets": ("q", "v"), "padding": True}).query
        'model=a/b&ctx=8k&lora_targets=q,v&padding=true'
        """
        return urlencode({"model": self.model} | {k: _text(v) for k, v in self.options.items()}, safe="/,:@")

    @property
    def more(self) -> str:
        """The options without a control, as the command line has them.

        >>> Asked("a/b", {"ctx": "8k", "tp": 2, "padding": True, "double_quant": False}).more
        '--tp 2 --padding --no-double-quant'
        """
        return " ".join(_flag(k, v) for k, v in self.options.items() if k not in FORM)


def from_form(model: str | None, more: str | None, controls: Mapping[str, Any], *, local_gpu: bool) -> Asked:
    """The question in the form; controls that are empty or at their default are left out. Raises `usage`."""
    default = Request().to_dict()
    chosen = {k: str(v).strip() for k, v in controls.items() if v is not None}
    given = {k: v for k, v in chosen.items() if v and v != str(default[k])}
    return _allowed(Asked((model or "").strip(), given | from_line(more or "")), local_gpu)


def from_query(query: Mapping[str, str], *, local_gpu: bool) -> Asked | None:
    """The question in the address, None where it names no model. Raises `usage`.

    What other sites add to an address (`__theme`, `utm_source`) is left out.

    >>> from_query({"model": "a/b", "ctx": "8k", "gradient-checkpointing": "true", "__theme": "dark"}, local_gpu=False)
    Asked(model='a/b', options={'ctx': '8k', 'gradient_checkpointing': True})
    """
    given: dict[str, Any] = {}
    for name, value in query.items():
        key = name.strip().replace("-", "_")
        if key == "model" or key.startswith(("__", "utm_")):
            continue
        switch = isinstance(Request().to_dict().get(key), bool)
        given[key] = _SWITCHES.get(value.strip().lower(), value) if switch else value.strip()
    model = query.get("model", "").strip()
    return _allowed(Asked(model, given), local_gpu) if model else None


def from_line(line: str) -> dict[str, Any]:
    """Options as the command line has them. Raises `usage`.

    >>> from_line("--tp 2 --padding")
    {'tp': '2', 'padding': True}
    """
    if len(line) > MOST_CHARACTERS:
        raise HfvramError("usage", f"more than {MOST_CHARACTERS:,} characters of options")
    command = click.Command("page", params=options(), add_help_option=False)
    try:
        ctx = command.make_context("page", shlex.split(line))
    except click.ClickException as error:
        raise HfvramError("usage", f"other options: {error.format_message()}") from None
    except ValueError as error:
        raise HfvramError("usage", f"other options: {error}") from None
    given = click.core.ParameterSource.COMMANDLINE
    return {k: v for k, v in ctx.params.items() if ctx.get_parameter_source(k) is given}


def _allowed(asked: Asked, local_gpu: bool) -> Asked:
    """Raises `usage` for what the page does not answer."""
    if len(asked.model) > MOST_CHARACTERS or any(len(str(v)) > MOST_CHARACTERS for v in asked.options.values()):
        raise HfvramError("usage", f"more than {MOST_CHARACTERS:,} characters")
    for name in asked.options:
        if name in REFUSED or (name not in SOURCE and name not in Request().to_dict()):
            option = "--" + printable(name.replace("_", "-"), 40)
            raise HfvramError("usage", f"the page has no {option}: the command line says what there is (hfvram --help)")
    if not local_gpu and str(asked.options.get("gpu", "")).lower() == "local":
        raise HfvramError("usage", "--gpu local: this page is not on your machine, name a GPU or a size such as 24GB")
    return asked


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, (list, tuple)) else str(value)


def _flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {shlex.quote(_text(value))}"
