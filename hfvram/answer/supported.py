"""What this version answers. Anything else that SPEC names is a usage error, never a wrong number."""

from typing import Any, Final

from hfvram.answer.splits import check_splits
from hfvram.errors import HfvramError, printable
from hfvram.memory import bitsandbytes
from hfvram.request import Request

SUPPORTED: Final[dict[str, tuple[Any, ...]]] = {
    "mode": ("inference", "train", "lora", "qlora"),
    "engine": ("transformers", "vllm", "sglang", "llama.cpp"),
    "method": ("auto", "formula", "simulate", "guide"),
    "cache": ("dynamic", "static", "offloaded", "quantized", "paged"),
    "pp": (1,),
    "ep": (1,),
    "cp": (1,),
    "sp": (False,),
    "zero": (None, 0, 1, 2, 3),
    "fsdp": (None, "full_shard", "shard_grad_op", "hybrid_shard"),
    "offload": ((), ("experts",), ("layers",)),
}
BY_SIMULATE: Final = ("sp",)
"""Options of which the exact engine answers every value, also for inference."""
TRAINING: Final = (
    *("gradient_checkpointing", "checkpoint_every", "mixed_precision", "grad_accum", "optimizer"),
    *("lora_r", "lora_targets", "lora_dropout", "adapter_dtype", "fsdp"),
    *("rslora", "dora", "modules_to_save", "freeze"),
)
ONLY: Final = {"freeze": ("train",)} | dict.fromkeys(("rslora", "dora", "modules_to_save"), ("lora", "qlora"))
"""Options of some kinds of training alone."""
OPTIMIZERS: Final = (
    *("adamw_torch_fused", "adamw_torch", "adamw_torch_loop", "sgd", "sgd_momentum", "adagrad", "rmsprop", "adafactor"),
    *bitsandbytes.OPTIMIZERS,
    *("galore_adamw", "apollo_adamw", "muon"),
)


def simulated_by_default(request: Request) -> bool:
    """Whether the exact engine answers where nobody says which: training but for what is DeepSpeed's, offloaded, a
    pipeline, experts or a sequence apart."""
    training = request.mode != "inference" and not request.zero and not request.offload
    return training and request.pp == request.ep == request.cp == 1


def by_code(request: Request) -> bool:
    """Whether the exact engine answers this request, which takes it seconds."""
    return request.method == "simulate" or (request.method == "auto" and simulated_by_default(request))


def check(request: Request) -> None:
    """Raises `usage` for what this version can't answer, and for training options of an inference request."""
    check_splits(request)
    for name, values in SUPPORTED.items():
        value = getattr(request, name)
        if name in ("pp", "ep", "cp", "sp", "offload") and request.mode != "inference":
            continue  # `splits` says what goes together
        if name == "offload" and value and request.method == "simulate":
            values = ((),)
        if request.method == "simulate" and name in BY_SIMULATE:
            continue
        if value not in values:
            words = ", ".join(
                ",".join(v) if isinstance(v, tuple) else str(v) for v in values if v is not None and v != ()
            )
            option = "--" + name.replace("_", "-")
            shown = ",".join(value) if isinstance(value, tuple) else value
            more = ", and --phase prefill and encode with --method simulate" if name in BY_SIMULATE else ""
            raise HfvramError(
                "usage",
                f"{option} {shown} is not supported yet: this version answers {option} {words or '(none)'}{more}",
            )
    if request.optimizer not in OPTIMIZERS:
        valid = ", ".join(OPTIMIZERS)
        raise HfvramError("usage", f"--optimizer {printable(request.optimizer, 40)} is unknown: valid are {valid}")
    default = Request()
    for name, modes in ONLY.items():
        if request.mode not in ("inference", *modes) and getattr(request, name) != getattr(default, name):
            option, shown = f"--{name.replace('_', '-')}", " and ".join(modes)
            raise HfvramError("usage", f"{option} is for --mode {shown}, --mode {request.mode} has no use for it")
    if request.dora and request.mode == "qlora":
        raise HfvramError("usage", "--dora is not answered for packed weights: valid is --mode lora")
    for name in TRAINING:
        if request.mode == "inference" and getattr(request, name) != getattr(default, name):
            raise HfvramError(
                "usage", f"--{name.replace('_', '-')} is for training, --mode inference has no use for it"
            )
