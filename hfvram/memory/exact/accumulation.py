"""Gradients that are added up in place: on meta, and under a dispatch mode, autograd makes a new tensor of every two.

CUDA adds into the first one where it is dense and nobody else holds it or its storage. What that looks like in Python's
frames and in reference counts is looked up once, in a backward pass where it is known. Source: PyTorch 2.11,
torch/csrc/autograd/input_buffer.cpp `can_accumulate_inplace`, ATen/TensorSubclassLikeUtils.h.
"""

import sys
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode

ADD = torch.ops.aten.add.Tensor


class _Alone(NamedTuple):
    """How far autograd's call is above the dispatch, and the references to a tensor and a storage that are its own."""

    frames: int
    tensor: int
    storage: int


def in_place(old: Any, new: Any, caller: Any) -> bool:
    """Whether autograd, called from this frame's caller, would add `new` into `old`."""
    known = alone()
    for _ in range(known.frames):
        caller = caller.f_back
        if caller is None:
            return False
    if caller.f_code is not _engine_run_backward.__code__ or type(old) is not torch.Tensor:
        return False
    if old.shape != new.shape or old.dtype != new.dtype:
        return False
    return (old._use_count(), _held(old)) == (known.tensor, known.storage) and _is_dense(old)


def _held(tensor: Any) -> int:
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def _is_dense(tensor: Any) -> bool:
    return bool(torch.ops.aten.is_non_overlapping_and_dense.default(tensor))


class _Looks(TorchDispatchMode):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.found: list[_Alone] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ADD and not torch.is_grad_enabled():
            frame, frames = sys._getframe(0), 0
            while frame.f_code is not _engine_run_backward.__code__:
                assert frame.f_back is not None
                frame, frames = frame.f_back, frames + 1
            self.found.append(_Alone(frames, args[0]._use_count(), _held(args[0])))
        return func(*args, **(kwargs or {}))


@lru_cache(maxsize=1)
def alone() -> _Alone:
    """Of two gradients of a leaf, both just computed. First asked outside of dispatch: in it there is no autograd."""
    leaf = torch.empty(2, device="meta", requires_grad=True)
    with torch.enable_grad(), _Looks() as looks:
        out = (leaf.sin() + leaf.cos()).sum()
        torch.autograd.backward([out])
    found: list[_Alone] = looks.found
    return found[0]
