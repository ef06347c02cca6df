"""The one exception type that hfvram raises on purpose: a kind, one line, and what to do about it."""

from typing import Final, Literal

Kind = Literal[
    "not_found",
    "revision_not_found",
    "gated",
    "unauthorized",
    "offline",
    "network",
    "rate_limited",
    "no_config",
    "bad_config",
    "bad_header",
    "unknown_architecture",
    "missing_extra",
    "no_gpu",
    "io",
    "usage",
]

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_DOES_NOT_FIT: Final = 3


class HfvramError(Exception):
    """Something that the user can act on.

    `message` is one line: what happened and what to do. It may quote input, so control characters are made visible.
    """

    def __init__(self, kind: Kind, message: str) -> None:
        self.kind: Kind = kind
        self.message = printable(message)
        super().__init__(self.message)

    def __reduce__(self) -> tuple[type["HfvramError"], tuple[Kind, str]]:
        """From one process to another."""
        return HfvramError, (self.kind, self.message)

    @property
    def exit_code(self) -> int:
        return EXIT_USAGE if self.kind == "usage" else EXIT_FAILED

    def to_dict(self) -> dict[str, str]:
        return {"kind": self.kind, "message": self.message}


def printable(text: str, limit: int = 500) -> str:
    r"""Text that is safe on a terminal: one line, no control or bidirectional characters, of bounded length.

    >>> printable("a\x1b[31m\nb")
    'a\\x1b[31m\\nb'
    """
    clean = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: limit + 1])
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"
