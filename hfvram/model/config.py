"""A configuration read with suspicion: sizes are whole numbers within reason, or the file is `bad_config`."""

from collections.abc import Mapping, Sequence
from typing import Any

from hfvram.errors import HfvramError, printable

MAX_SIZE = 1 << 24
"""No width, vocabulary or head count of a real model comes near this."""
MAX_LAYERS = 1024
MAX_NUMBER = 1e12


class Config:
    """Typed access to a `config.json` by key or alias.

    A key that is null gives the caller's default; one that is absent the family's, where `defaults` has it. `aliases`
    are the family's own names of keys (GPT-2's `n_embd` for `hidden_size`).
    """

    __slots__ = ("aliases", "defaults", "values")

    def __init__(
        self,
        values: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        self.values = values
        self.defaults = defaults or {}
        self.aliases = aliases or {}

    @property
    def model_type(self) -> str:
        return self.text("model_type", default="")

    def get(self, *names: str) -> Any:
        """The first of these keys that has a value, or None. A null in the file stands: it is no default's place."""
        keys = [key for name in names for key in (name, self.aliases.get(name)) if key]
        for source in (self.values, self.defaults):
            for key in keys:
                if (value := source.get(key)) is not None:
                    return value
            if any(key in source for key in keys):
                return None
        return None

    def size(self, *names: str, default: int | None = None, low: int = 1, high: int = MAX_SIZE) -> int:
        """A whole number between `low` and `high`; without a default its absence is an error, too."""
        value = self.get(*names)
        if value is None:
            if default is None:
                raise _bad(f"has no {names[0]}: the model's sizes can't be known without it")
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise _bad(f"has {_shown(value)} for {names[0]}, not a whole number")
        if not low <= value <= high:
            raise _bad(f"has {_shown(value)} for {names[0]}, not a number between {low} and {high}")
        return value

    def layers(self, *names: str, default: int | None = None) -> int:
        return self.size(*names, default=default, low=0, high=MAX_LAYERS)

    def number(self, *names: str, default: float) -> float:
        value = self.get(*names)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < MAX_NUMBER:
            raise _bad(f"has {_shown(value)} for {names[0]}, not a number")
        return float(value)

    def flag(self, *names: str, default: bool = False) -> bool:
        value = self.get(*names)
        if value is None:
            return default
        if not isinstance(value, (bool, int)):
            raise _bad(f"has {_shown(value)} for {names[0]}, not true or false")
        return bool(value)

    def text(self, *names: str, default: str) -> str:
        value = self.get(*names)
        if value is None:
            return default
        if not isinstance(value, str):
            raise _bad(f"has {_shown(value)} for {names[0]}, not text")
        return value

    def items(self, *names: str) -> list[Any] | None:
        """A list, of at most as many entries as there can be layers; None where there is none."""
        value = self.get(*names)
        if value is None:
            return None
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) > MAX_LAYERS:
            raise HfvramError("bad_config", f"config.json: {names[0]} is not a list of at most {MAX_LAYERS} entries")
        return list(value)

    def strings(self, *names: str) -> list[str] | None:
        value = self.items(*names)
        if value is not None and not all(isinstance(v, str) for v in value):
            raise HfvramError("bad_config", f"config.json: {names[0]} is not a list of words")
        return value

    def section(self, *names: str) -> "Config | None":
        """A nested object, None where there is none. `families.defaults.section` knows its type's defaults, too."""
        value = self.get(*names)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise HfvramError("bad_config", f"config.json: {names[0]} is not an object")
        return Config(value)

    def divided(self, name: str, size: int, parts: int) -> int:
        """size ÷ parts, which must come out whole (a head size, as a rule)."""
        if size % parts:
            raise HfvramError("bad_config", f"config.json: {name} {size} can't be divided by {parts}")
        return size // parts


def _shown(value: Any) -> str:
    """A value as a message can quote it; a number too long to print is not printed."""
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return f"a number of {value.bit_length()} bits"
    return printable(repr(value), 40)


def _bad(what: str) -> HfvramError:
    return HfvramError("bad_config", f"config.json {what}")
