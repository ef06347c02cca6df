"""One rank of many: what the first GPU holds and runs, whose peers are not there and need not be.

A process group that moves nothing stands for them, and the code that people run does the rest: transformers' tensor
parallelism, FSDP2, DistributedDataParallel. Ranks that hold less (the last part of an uneven split) are not the first.
"""

import contextlib
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from hfvram.errors import HfvramError
from hfvram.memory.bitsandbytes import ON_LOADING
from hfvram.memory.exact.build import in_order
from hfvram.memory.exact.labels import name_tensors
from hfvram.memory.exact.quantized import method
from hfvram.memory.exact.run import Run
from hfvram.memory.mesh import mesh_of
from hfvram.request import Request

GPUS_A_NODE = 8
MAX_RANKS = 1 << 14


@contextlib.contextmanager
def ranks(run: Run, request: Request) -> Iterator[None]:
    """The ranks of a request, of which this process is the first. They are gone on leaving.

    Raises `usage` where the GPUs can't be divided so, for too many, for packed weights that can't be split so, and
    inside of a job that is distributed itself.
    """
    sizes = mesh_sizes(request)
    check_packed(request)
    if request.sp:
        from hfvram.memory.exact.sequence_parallel import check_lengths

        check_lengths(request)
    if dist.is_initialized():
        raise HfvramError(
            "usage", "this process is a rank of a distributed job: --method simulate needs one of its own"
        )
    hook = sys.excepthook  # which a process group replaces by one that prints its rank
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=math.prod(sizes.values()))
    try:
        run.mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        with contextlib.ExitStack() as stack:
            if request.fsdp:
                from hfvram.memory.exact.sharded import fsdp_on_meta

                stack.enter_context(fsdp_on_meta(run.tracker))
            if request.sp:
                from hfvram.memory.exact.sequence_parallel import styles

                stack.enter_context(styles())
            yield
    finally:
        run.mesh = None
        dist.destroy_process_group()
        sys.excepthook = hook


def check_packed(request: Request) -> None:
    """What bitsandbytes packs is not split by rows or columns, and only 4 bits survive FSDP. Raises `usage`.

    transformers' styles take the local weights of layers that say so (`_hf_quantized_needs_local_tp`), and those of
    bitsandbytes do not. FSDP2 hands its modules plain parameters: `Linear4bit` finds its scales again, `Linear8bitLt`
    (`self.weight.CB`) does not. And a policy that casts gathered weights would cast what is packed.
    """
    quant = method(request)
    if quant not in ON_LOADING:
        return
    if request.tp > 1:
        raise HfvramError("usage", f"--tp can't split weights of --quant {quant}: valid is --quant none (or --fsdp)")
    if request.fsdp and quant == "int8":
        raise HfvramError("usage", "--fsdp can't shard weights of --quant int8: valid are none, nf4 and fp4")
    if request.fsdp and request.mixed_precision not in ("no", request.dtype):
        raise HfvramError(
            "usage",
            f"--fsdp --mixed-precision {request.mixed_precision} would cast weights that are packed into "
            f"{request.dtype}: valid are --mixed-precision no, or --dtype {request.mixed_precision}",
        )


def mesh_sizes(request: Request) -> dict[str, int]:
    """The GPUs as replicas of shards of tensor parallel neighbours.

    `hybrid_shard` shards within a node of eight GPUs, and replicates over nodes. Raises `usage`.

    >>> mesh_sizes(Request(gpus=32, tp=2, fsdp="hybrid_shard"))
    {'replica': 4, 'shard': 4, 'tp': 2}
    """
    mesh = mesh_of(request)
    gpus, parallel = mesh.gpus, mesh.data
    if gpus > MAX_RANKS:
        raise HfvramError("usage", f"--gpus {gpus} is out of range: --method simulate answers up to {MAX_RANKS}")
    replicas, shards = (1, parallel) if request.fsdp else (parallel, 1)
    if request.fsdp == "hybrid_shard":
        node = max(1, GPUS_A_NODE // request.tp)
        if parallel > node and parallel % node:
            raise HfvramError(
                "usage",
                f"--gpus {gpus}: --fsdp hybrid_shard shards within nodes of {GPUS_A_NODE}, "
                f"valid are up to {node * request.tp} and its multiples",
            )
        replicas, shards = max(1, parallel // node), min(parallel, node)
    return {"replica": replicas, "shard": shards, "tp": request.tp}


def split(run: Run, model: Any, request: Request) -> None:
    """Split the model on meta over tensor parallel ranks; what stands then is the first one's part."""
    from hfvram.memory.exact.tensor_parallel import split_model

    split_model(model, run.mesh["tp"], request)
    stand(run, model)


def place(run: Run, model: Any, request: Request) -> Any:
    """The model, adapters in it, as one rank trains it: sharded, replicated, or as it is. Raises `usage`."""
    if request.fsdp:
        from hfvram.memory.exact.sharded import shard

        shard(model, request, run.mesh)
    elif run.mesh["replica"].size() > 1:
        if request.tp > 1:
            raise HfvramError(
                "usage", "--tp with more --gpus trains with --fsdp: DistributedDataParallel can't hold it"
            )
        from hfvram.memory.exact.data_parallel import replicate

        return replicate(run, model)
    stand(run, model)
    return model


def stand(run: Run, model: Any) -> None:
    """Count what this rank holds in the place of all that was built, in the order of `to_empty`, which allocates it."""
    run.tracker.start_over(in_order(model))
    name_tensors(run.tracker, model)
