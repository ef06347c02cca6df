"""Data parallel training by DistributedDataParallel's own code on meta: its buckets hold the gradients once more."""

from typing import Any
from unittest.mock import patch

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hfvram.memory.exact.run import Run

BUCKETS = "gradients in DDP's buckets"
VERIFY = "torch.nn.parallel.distributed._verify_param_shape_across_processes"


class _Unlogged:
    """In the place of the logger, which times CUDA and CPU alone."""

    def set_runtime_stats_and_log(self) -> None: ...


def replicate(run: Run, model: Any) -> Any:
    """The model as every rank of the current process group trains it, wrapped as a Trainer does, tracked.

    Nothing is reduced: a hook hands each bucket back. Buckets are allocated whole, then again in the order in which
    gradients come (25 MiB each), as on CUDA.
    """
    one_shape = patch(VERIFY, lambda *args: None)  # ranks compare the shapes of their parameters; here there is one
    with run.tracker, one_shape, run.tracker.making("gradients", BUCKETS):
        wrapped = DistributedDataParallel(model)
    prepare = wrapped._pre_forward

    def pre_forward(*args: Any, **kwargs: Any) -> Any:
        with run.tracker.making("gradients", BUCKETS):  # which the second forward lays out anew
            return prepare(*args, **kwargs)

    wrapped._pre_forward = pre_forward
    wrapped.register_comm_hook(None, _handed_back)
    wrapped.logger = _Unlogged()
    return wrapped


def _handed_back(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
