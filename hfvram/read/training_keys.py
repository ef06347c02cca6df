"""The keys of a training file while they are read: each is taken by name and type, and what nobody took is told."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hfvram.errors import HfvramError, printable

DTYPES = {
    **dict.fromkeys(("float32", "fp32", "float", "torch.float32"), "fp32"),
    **dict.fromkeys(("bfloat16", "bf16", "torch.bfloat16"), "bf16"),
    **dict.fromkeys(("float16", "fp16", "half", "torch.float16"), "fp16"),
    "auto": "auto",
}
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
OPTIMIZERS = {
    "adamw_hf": "adamw_torch",
    "adamw": "adamw_torch",
    "paged_adamw": "paged_adamw_32bit",
}
"""Older names of transformers' optimizers. All others pass as they are: what is not answered is a usage error."""


@dataclass(slots=True)
class Keys:
    """A mapping under reading. `options` has what it says, `implied` what its tool does where it says nothing."""

    file: str
    values: Mapping[str, Any]
    prefix: str = ""
    model: str | None = None
    revision: str | None = None
    deepspeed: str | None = None
    total_batch: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    implied: dict[str, Any] = field(default_factory=dict)
    uncounted: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)

    def raw(self, *names: str) -> Any:
        """The value of the first of these keys that is there; null and "auto" are nobody's wish."""
        found = None
        for name in names:
            self.taken.add(name)
            value = self.values.get(name)
            if found is None and value is not None and value != "auto" and value != "":
                found = value
        return found

    def text(self, *names: str) -> str | None:
        """A word. Raises `usage` for anything else."""
        value = self.raw(*names)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, (int, float)):
            return str(value).lower()
        raise self.wrong(names[0], value, "text")

    def number(self, *names: str) -> int | None:
        """A whole number of at least 1. Raises `usage` for anything else."""
        value = self.raw(*names)
        if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit() and len(value) < 12:
            value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10**9:
            raise self.wrong(names[0], value, "a whole number from 1 to 10^9")
        return value

    def share(self, name: str) -> float | None:
        """A number from 0 to below 1. Raises `usage` for anything else."""
        value = self.raw(name)
        try:
            number = None if value is None or isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            raise self.wrong(name, value, "a number") from None
        if number is not None and not 0 <= number < 1:
            raise self.wrong(name, value, "in 0 ≤ p < 1")
        return number

    def flag(self, *names: str) -> bool | None:
        """True, false, or None where nothing is said. Raises `usage` for anything else."""
        value = self.raw(*names)
        if value is None or isinstance(value, bool):
            return value
        word = str(value).strip().lower() if isinstance(value, (str, int)) else ""
        if word in (*TRUE, *FALSE):
            return word in TRUE
        raise self.wrong(names[0], value, "true or false")

    def words(self, *names: str) -> tuple[str, ...] | None:
        """A list of words, or a text with commas. Raises `usage` for anything else."""
        value = self.raw(*names)
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if value is None:
            return None
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            return tuple(value) or None
        raise self.wrong(names[0], value, "a list of names")

    def section(self, *names: str) -> "Keys | None":
        """A mapping within this one, whose unknown keys are told with its name; None where there is none."""
        value = self.raw(*names)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(names[0], value, "a mapping")
        return Keys(
            file=self.file,
            values={str(k): v for k, v in value.items()},
            prefix=f"{self.prefix}{names[0]}.",
            options=self.options,
            implied=self.implied,
            uncounted=self.uncounted,
            unknown=self.unknown,
            notes=self.notes,
        )

    def put(self, **options: Any) -> None:
        """Options as hfvram has them; None is nothing said."""
        self.options.update({k: v for k, v in options.items() if v is not None})

    def offload(self, *what: str) -> None:
        """What lives in CPU memory, beside what does already."""
        self.options["offload"] = tuple(dict.fromkeys((*self.options.get("offload", ()), *what)))

    def dtype(self, *names: str) -> str | None:
        """A dtype in hfvram's words; one that isn't is told."""
        value = self.text(*names)
        if value is not None and value not in DTYPES:
            self.unknown.append(self.told(names[0], value))
        return DTYPES.get(value or "")

    def attention(self, *names: str) -> str | None:
        """An attention implementation that is answered; any other is told."""
        value = self.text(*names)
        if value in (None, "sdpa", "eager", "flash_attention_2"):
            return value
        if "flash" in (value or ""):
            self.notes.append(f"{self.file}: {names[0]} {printable(value or '', 40)} counts as flash_attention_2")
            return "flash_attention_2"
        self.unknown.append(self.told(names[0], value))
        return None

    def finish(self, no_matter: Iterable[str] = (), uncounted: Iterable[str] = ()) -> None:
        """Tell what was not taken: keys that matter and aren't counted, and those that nobody knows."""
        for name in uncounted:
            if self.raw(name) not in (None, False, 0, [], {}):
                self.uncounted.append(self.prefix + name)
        known = self.taken | set(no_matter)
        self.unknown += [self.prefix + k for k, v in self.values.items() if k not in known and v is not None]

    def told(self, name: str, value: object) -> str:
        """A key with its value, as it is listed."""
        return f"{self.prefix}{name} {printable(str(value), 40)}"

    def wrong(self, name: str, value: object, wanted: str) -> HfvramError:
        """The error for a value of the wrong kind."""
        shown = printable(repr(value) if isinstance(value, (str, int, float)) else type(value).__name__, 40)
        return HfvramError("usage", f"{self.file}: {self.prefix}{name} {shown} is not {wanted}")


def names(text: str) -> frozenset[str]:
    """A table of keys, written as words."""
    return frozenset(text.split())


def precision(keys: Keys, bf16: bool | None, fp16: bool | None) -> str | None:
    """Autocast's dtype of two flags, of which one may be set."""
    if bf16 and fp16:
        keys.notes.append(f"{keys.file} contradicts itself: bf16 and fp16 are both true; bf16 is taken")
    return "bf16" if bf16 else "fp16" if fp16 else "no" if bf16 is False or fp16 is False else None


def optimizer(name: str | None) -> str | None:
    """transformers' present name of an optimizer."""
    return None if name is None else OPTIMIZERS.get(name, name)
