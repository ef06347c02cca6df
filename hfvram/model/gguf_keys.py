"""Keys of a GGUF file under its architecture's name: whole numbers within bounds, one or one for each layer."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from hfvram.errors import HfvramError, printable

_NONE: Final = -1
LARGEST: Final = 10_000_000


class Keys:
    """The keys of `{arch}.…`."""

    def __init__(self, metadata: Mapping[str, Any], arch: str) -> None:
        self.arch = arch
        self._values = metadata

    def get(self, name: str) -> Any:
        """The value as it stands, None where there is none."""
        return self._values.get(f"{self.arch}.{name}")

    def size(self, name: str, *, default: int = _NONE, low: int = 1, high: int = LARGEST) -> int:
        """One number; of one for each layer, the largest. Raises `bad_header` for another, or none without default."""
        value = self.get(name)
        if isinstance(value, Sequence) and not isinstance(value, str) and value:
            value = max((v for v in value if type(v) is int), default=None)
        return self._checked(name, value, default, low, high)

    def of_layer(self, name: str, index: int, *, default: int = _NONE) -> int:
        """The layer's number, where there is one for each."""
        value = self.get(name)
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = value[index] if index < len(value) else None
        return self._checked(name, value, default, 0, LARGEST)

    def _checked(self, name: str, value: Any, default: int, low: int, high: int) -> int:
        if value is None and default != _NONE:
            return default
        if type(value) is not int or not low <= value <= high:
            what = "is missing" if value is None else f"is {printable(repr(value), 40)}, no size"
            raise HfvramError("bad_header", f"the GGUF key {printable(self.arch, 60)}.{name} {what}")
        return value
