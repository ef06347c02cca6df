"""Meta kernels, each asked once for the same shapes: most are Python, a hundred times as slow as what they find out.

Outputs that are new tensors are made again by size, stride and dtype; what works in place returns its first argument.
Whatever else an operator does (views, outputs that share a storage, numbers) is left to the kernel.
"""

from typing import Any

import torch

RESIZES = ("resize", "set_", "unsafe_view", "lift", "alias")
GROUPED_MM = torch.ops.aten._grouped_mm.default
_empty = torch.empty_strided


class MetaKernels:
    """The answers so far, by operator and by what its arguments look like."""

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}
        self.kinds: dict[Any, str] = {}

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is GROUPED_MM and args[0].dtype != torch.bfloat16:
            return _grouped_mm(*args, **kwargs)
        kind = self.kinds.get(func)
        if kind is None:
            kind = self.kinds[func] = _kind(func)
        if kind == "other":
            return func(*args, **kwargs)
        try:
            key = (func, _look(args), _look(tuple(kwargs.items())) if kwargs else None)
            answer = self.known.get(key)
        except (_Unlike, TypeError):
            return func(*args, **kwargs)
        if answer is None:
            out = func(*args, **kwargs)
            self.known[key] = _answer(kind, out, args)
            return out
        if answer is False:
            return func(*args, **kwargs)
        if answer is True:
            return args[0]
        if type(answer) is _Several:
            return tuple(a and _empty(a[0], a[1], dtype=a[2], device="meta") for a in answer)
        size, stride, dtype = answer
        return _empty(size, stride, dtype=dtype, device="meta")


def _grouped_mm(a: Any, b: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """Products by group in fp32 or fp16: CUDA multiplies group by group into one output, where meta takes only bf16.

    Source: PyTorch 2.11, native/cuda/GroupedBlas.cpp and GroupedMMUtils.h.
    """
    groups = () if a.dim() != b.dim() else (offs.shape[0] if a.dim() == 2 else a.shape[0],)
    return a.new_empty((*groups, a.shape[-2], b.shape[-1]), dtype=out_dtype)


class _Unlike(Exception):
    """An argument that is no plain tensor on meta."""


class _Several(tuple[Any, ...]):
    """Several outputs."""


def _kind(func: Any) -> str:
    """`new` outputs, `in place`, or other."""
    schema = func._schema
    if any(part in schema.name for part in RESIZES):
        return "other"
    aliases = [r.alias_info for r in schema.returns]
    if schema.is_mutable:
        first = schema.arguments[0].alias_info if schema.arguments else None
        return "in place" if len(aliases) == 1 and first is not None and first.is_write else "other"
    return "new" if aliases and not any(aliases) else "other"


def _look(values: Any) -> Any:
    """What a kernel reads of these arguments, hashable."""
    looks: list[Any] = []
    for value in values:
        kind = type(value)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            if not value.is_meta:
                raise _Unlike
            looks.append((value.shape, value.stride(), value.dtype))
        elif kind is tuple or kind is list:
            looks.append(_look(value))
        elif isinstance(value, torch.Tensor):
            raise _Unlike
        else:
            looks.append((kind, value))
    return tuple(looks)


def _answer(kind: str, out: Any, args: tuple[Any, ...]) -> Any:
    """How to give the same output again: True for the first argument, False for not at all."""
    if kind == "in place":
        return out is args[0]
    if type(out) is torch.Tensor:
        return _form(out, args)
    if isinstance(out, tuple) and all(o is None or type(o) is torch.Tensor for o in out):
        forms = [o if o is None else _form(o, args) for o in out]
        if not any(form is False for form in forms):
            return _Several(forms)
    return False


def _form(out: Any, args: tuple[Any, ...]) -> Any:
    """Size, stride and dtype of a tensor whose storage is all its own and no larger than it needs."""
    if not out.is_meta or out.storage_offset():
        return False
    storage = out.untyped_storage()
    needed = 1 + sum((n - 1) * s for n, s in zip(out.shape, out.stride(), strict=True)) if out.numel() else 0
    if storage.nbytes() != needed * out.element_size() or _shares(storage._cdata, args):
        return False
    return out.shape, out.stride(), out.dtype


def _shares(key: int, values: Any) -> bool:
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.untyped_storage()._cdata == key:
                return True
        elif isinstance(value, (list, tuple)) and _shares(key, value):
            return True
    return False
