"""How much GPU memory a Hugging Face model needs, before anything is downloaded.

>>> from hfvram import Request
>>> Request(ctx=8192, quant="nf4").batch
1
"""

from typing import TYPE_CHECKING, Any

from hfvram.errors import HfvramError
from hfvram.request import Request

if TYPE_CHECKING:
    from hfvram.answer.estimate import Estimate

__all__ = ["Estimate", "HfvramError", "Request", "__version__", "estimate"]
__version__ = "0.1.0"


def estimate(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    file: str | None = None,
    **options: Any,
) -> "Estimate":
    """What `model` (a Hub id, a folder, a file) takes, with the command line's options as keywords: `ctx=8192`.

    Raises HfvramError, whose `kind` says why there is no answer.
    """
    from hfvram.answer.question import Session

    request = Request.from_dict(options)
    return Session().estimate(model, request, revision=revision, token=token, offline=offline, file=file)


def __getattr__(name: str) -> Any:
    if name == "Estimate":
        from hfvram.answer.estimate import Estimate

        return Estimate
    raise AttributeError(f"module 'hfvram' has no attribute {name!r}")
