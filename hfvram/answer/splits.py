"""Which ways to share a training over GPUs and CPU memory go together. What doesn't is a usage error that says what
would; whether layers and sizes divide is checked where they are split."""

from typing import Final

from hfvram.errors import HfvramError
from hfvram.request import Request

TRAINING_OFFLOADS: Final = ("optimizer", "optimizer=nvme", "params", "params=nvme", "activations")
"""What `--offload` moves while training; the rest is for inference."""
SHARDS: Final = "--zero 1, 2 or 3, or --fsdp"


def check_splits(request: Request) -> None:
    """Raises `usage` for what does not go together."""
    zero, offload = request.zero or 0, set(request.offload)
    if request.mode == "inference":
        if request.cp > 1:
            raise _usage(
                f"--cp {request.cp} shares the sequence of a training step, and keeps no cache to generate from: "
                "valid for --mode inference is --cp 1, where --tp shares the heads and their cache"
            )
        if request.pp_chunks > 1:
            raise _usage("--pp-chunks is for training, --mode inference has no use for it")
        if zero or request.zero_bucket:
            raise _usage("--zero is for training, --mode inference has no use for it")
        return
    if request.zero_bucket and not zero:
        raise _usage("--zero-bucket is ZeRO's: valid with --zero 1, 2 or 3")
    if zero and request.fsdp:
        raise _usage(f"--zero {zero} and --fsdp {request.fsdp} both shard: valid is one of them")
    if request.method == "simulate" and (zero or offload):
        what = f"--zero {zero}" if zero else f"--offload {','.join(request.offload)}"
        raise _usage(f"{what} has no exact engine: valid is --method formula")
    if request.sp and request.tp == 1:
        raise _usage("--sp splits the sequence over the ranks of --tp: valid is --tp 2 and more")
    if request.cp > 1 and request.method == "simulate":
        raise _usage(f"--cp {request.cp} has no exact engine: valid is --method formula")
    if request.cp > 1 and zero:
        raise _usage(f"--cp {request.cp} trains with FSDP2 or replicated, not with --zero {zero}: valid is --fsdp")
    if request.pp_chunks > 1 and request.pp == 1:
        raise _usage("--pp-chunks splits the layers of a pipeline's ranks: valid is --pp 2 and more")
    if request.pp > 1:
        _check_pipeline(request)
    elif request.ep > 1:
        _check_experts(request)
    if request.fsdp and request.gpus == 1:
        raise _usage(f"--fsdp {request.fsdp} shards over several GPUs: valid are --gpus 2 and more")
    if other := offload - set(TRAINING_OFFLOADS):
        raise _usage(
            f"--offload {','.join(sorted(other))} is not supported yet: this version answers --offload "
            f"{', '.join(TRAINING_OFFLOADS)} while training"
        )
    for what in ("optimizer", "params"):
        if {what, f"{what}=nvme"} <= offload:
            raise _usage(f"--offload {what} and {what}=nvme: valid is one of them")
    if {"optimizer", "optimizer=nvme"} & offload and not zero:
        valid = "--offload params, which takes the optimizer with it" if request.fsdp else "--zero 1, 2 or 3"
        raise _usage(f"--offload optimizer is DeepSpeed's: valid with {valid}")
    if "optimizer=nvme" in offload and zero < 3:
        raise _usage(f"--offload optimizer=nvme with --zero {zero}: NVMe needs --zero 3")
    if {"params", "params=nvme"} & offload and zero < 3 and not request.fsdp:
        raise _usage("--offload params needs parameters that are sharded: valid with --zero 3 or --fsdp")
    if "params=nvme" in offload and not zero:
        raise _usage("--offload params=nvme is DeepSpeed's: valid with --zero 3")
    if "activations" in offload and not request.gradient_checkpointing:
        raise _usage("--offload activations moves the inputs of checkpointed layers: add --gradient-checkpointing")


def _check_pipeline(request: Request) -> None:
    """Raises `usage` for what no pipeline was worked out with."""
    pp = f"--pp {request.pp}"
    others = [f"--{name} {getattr(request, name)}" for name in ("ep", "cp") if getattr(request, name) > 1]
    others += [f"--offload {','.join(request.offload)}"] * bool(request.offload)
    if request.method == "simulate":
        raise _usage(f"{pp} has no exact engine: valid is --method formula")
    if request.fsdp or (request.zero or 0) > 1:
        other = f"--fsdp {request.fsdp}" if request.fsdp else f"--zero {request.zero}"
        raise _usage(f"{pp} keeps gradients over its microbatches, {other} shards them: valid are --zero 1 and DDP")
    if request.pp_chunks > 1 and request.pp_schedule != "1f1b":
        raise _usage(f"--pp-chunks {request.pp_chunks} interleaves 1f1b: valid is --pp-schedule 1f1b")
    if others:
        raise _usage(f"{pp} with {' and '.join(others)} is not supported yet: valid is one of them alone")
    if request.tp > 1 and (request.zero or (request.gpus or 1) > request.tp * request.pp):
        valid = f"valid is --gpus {request.tp * request.pp} without --zero"
        raise _usage(f"{pp} with --tp {request.tp}, held more than once, is not supported yet: {valid}")


def _check_experts(request: Request) -> None:
    """Raises `usage` for what experts of several ranks were not worked out with."""
    ep = f"--ep {request.ep}"
    if request.method == "simulate":
        raise _usage(f"{ep} has no exact engine: valid is --method formula")
    if request.mode != "train":
        raise _usage(f"{ep} with --mode {request.mode} is not supported yet: valid is --mode train")
    others = [f"--{name} {getattr(request, name)}" for name in ("tp", "cp") if getattr(request, name) > 1]
    others += [f"--{name} {getattr(request, name)}" for name in ("zero", "fsdp") if getattr(request, name)]
    others += ["--sp"] * request.sp
    others += [f"--offload {','.join(request.offload)}"] * bool(request.offload)
    if others:
        raise _usage(f"{ep} with {' and '.join(others)} is not supported yet: valid are more --gpus, replicated by DDP")


def _usage(message: str) -> HfvramError:
    return HfvramError("usage", message)
