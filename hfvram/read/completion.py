"""A name that nobody published, and the one published name that it can mean."""

import re
from collections.abc import Iterable

from hfvram.errors import HfvramError
from hfvram.read.hub import Hub

_VERSION = r"-v\d+(?:\.\d+)*"
_SUFFIX = re.compile(rf"(?:{_VERSION})?(?:-hf)?|-hf{_VERSION}")


def plausible(name: str, published: Iterable[str]) -> list[str]:
    """The names that differ by case, or by a version or format at the end; variants of a model never count.

    >>> plausible("mistralai/Mixtral-8x7B", ["mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1"])
    ['mistralai/Mixtral-8x7B-v0.1']
    """
    low = name.lower()
    return sorted(
        {p for p in published if p != name and p.lower().startswith(low) and _SUFFIX.fullmatch(p.lower()[len(low) :])}
    )


def complete(name: str, hub: Hub) -> str | None:
    """The only plausible completion on the Hub, None where there is none.

    Raises `not_found` that lists them where there are several.
    """
    author, _, base = name.rpartition("/")
    try:
        found = plausible(name, hub.search(base, author or None))
        if not found and author:  # the owner may be in another case too, and the Hub compares owners exactly
            found = plausible(name, hub.search(base, None))
    except HfvramError:
        return None
    if len(found) > 1:
        raise HfvramError("not_found", f"no model {name} on the Hub; did you mean {', '.join(found)}?")
    return found[0] if found else None
