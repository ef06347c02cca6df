"""How much GPU memory a Hugging Face model needs, before anything is downloaded.

>>> from hfvram import Request
>>> Request(ctx=8192, quant="nf4").batch
1
"""

from typing import TYPE_CHECKING, Any

from hfvram.errors import HfvramError
from hfvram.request import Request

if TYPE_CHECKING:
    from hfvram.answer.dry_run import DryRun
    from hfvram.answer.estimate import Estimate

__all__ = ["DryRun", "Estimate", "HfvramError", "Request", "__version__", "dry_run", "estimate"]
__version__ = "0.1.0"


def estimate(
    model: str | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    file: str | None = None,
    **options: Any,
) -> "Estimate":
    """What `model` (a Hub id, a folder, a file) takes, with the command line's options as keywords: `ctx=8192`.

    `from_` is the path of a training file, or a list of them, which may name the model.
    Raises HfvramError, whose `kind` says why there is no answer.
    """
    from hfvram.answer.from_files import noted, understood
    from hfvram.answer.question import Session

    model, options, own, notes = understood(model, options)
    if not model:
        raise HfvramError("usage", "which model? An id, a folder or a file, or from_= a file that names one")
    request = Request.from_dict(options)
    found = Session().estimate(model, request, revision=revision or own, token=token, offline=offline, file=file)
    return noted(found, notes)


def dry_run(gpu: str | None = None) -> "DryRun":
    """What a GPU would hold while the PyTorch code in its `with` runs: any model, loss, optimizer and loop.

    Nothing is computed: inside, tensors are on the meta device. `gpu` names one whose choice of kernels matters, else
    an H100's are taken. Raises `missing_extra` without torch, `usage` for an unknown GPU.
    """
    from hfvram.answer.dry_run import DryRun
    from hfvram.show.dry_run import report

    return DryRun(report, gpu)


def __getattr__(name: str) -> Any:
    if name == "Estimate":
        from hfvram.answer.estimate import Estimate

        return Estimate
    if name == "DryRun":
        from hfvram.answer.dry_run import DryRun

        return DryRun
    raise AttributeError(f"module 'hfvram' has no attribute {name!r}")
