"""What this version answers. Anything else that SPEC names is a usage error, never a wrong number."""

from typing import Any, Final

from hfvram.errors import HfvramError
from hfvram.request import Request

SUPPORTED: Final[dict[str, tuple[Any, ...]]] = {
    "mode": ("inference",),
    "engine": ("transformers",),
    "method": ("auto", "formula", "simulate", "guide"),
    "cache": ("dynamic", "static"),
    "gpus": (None, 1),
    "tp": (1,),
    "pp": (1,),
    "ep": (1,),
    "cp": (1,),
    "sp": (False,),
    "zero": (None, 0),
    "fsdp": (None,),
    "offload": ((),),
}
BY_SIMULATE: Final = ("mode", "gpus", "tp", "fsdp")
"""Options of which the exact engine answers every value."""
TRAINING: Final = (
    *("gradient_checkpointing", "mixed_precision", "grad_accum", "optimizer"),
    *("lora_r", "lora_targets", "lora_dropout", "adapter_dtype", "fsdp"),
)
ON_LOADING: Final = ("nf4", "fp4", "int8")
"""Quantizations that are made while a model is loaded; all others are the checkpoint's own."""


def check(request: Request) -> None:
    """Raises `usage` for what this version can't answer, and for training options of an inference request."""
    for name, values in SUPPORTED.items():
        value = getattr(request, name)
        if request.method == "simulate" and name in BY_SIMULATE:
            continue
        if value not in values:
            words = ", ".join(str(v) for v in values if v is not None and v != ())
            option = "--" + name.replace("_", "-")
            shown = ",".join(value) if isinstance(value, tuple) else value
            more = ", and the others with --method simulate" if name in BY_SIMULATE else ""
            raise HfvramError(
                "usage",
                f"{option} {shown} is not supported yet: this version answers {option} {words or '(none)'}{more}",
            )
    default = Request()
    for name in TRAINING:
        if request.mode == "inference" and getattr(request, name) != getattr(default, name):
            raise HfvramError(
                "usage", f"--{name.replace('_', '-')} is for training, --mode inference has no use for it"
            )
