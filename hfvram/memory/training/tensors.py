"""Tensors without values: a shape, strides, a dtype and a storage whose birth and death are written to the timeline.

Storages die as Python forgets them, so that code over these tensors allocates and frees as the same code over real
ones. Source: PyTorch 2.11, aten/src/ATen/TensorIterator.cpp (layout of element-wise results), TensorUtils.cpp
`computeStride_impl` (which views need a copy).
"""

from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from hfvram.memory.training.tape import Node

Shape = tuple[int, ...]
ITEM_BYTES: Final = {
    "fp32": 4,
    "bf16": 2,
    "fp16": 2,
    "int64": 8,
    "int32": 4,
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "fp8": 1,
}
FLOATING: Final = frozenset(("fp32", "bf16", "fp16"))


class Storage:
    """Bytes on the device, freed when nothing refers to them any more; without events they stand for good."""

    __slots__ = ("events", "handle")

    def __init__(self, events: list[int] | None = None, handle: int = -1) -> None:
        self.events = events
        self.handle = handle

    def __del__(self) -> None:
        if self.events is not None:
            self.events.append(~self.handle)


class Tensor:
    """A view of a storage. `node` makes its gradient go on, as `grad_fn` does; None where no gradient is needed."""

    __slots__ = ("base", "dtype", "index", "node", "shape", "storage", "strides")

    def __init__(
        self, storage: Storage, shape: Shape, strides: Shape, dtype: str, node: "Node | None" = None, index: int = 0
    ) -> None:
        self.storage = storage
        self.shape = shape
        self.strides = strides
        self.dtype = dtype
        self.node = node
        self.index = index
        self.base: Tensor | None = None
        """What it is a view of: autograd holds that, so that a gradient that is a view is never added to in place."""

    @property
    def is_leaf(self) -> bool:
        """Whether it is a parameter itself."""
        return self.storage.events is None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of its elements, not of its storage."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def half(self) -> bool:
        return self.dtype in ("bf16", "fp16")

    def alias(self) -> "Tensor":
        """The same bytes without the graph: what autograd saves."""
        return Tensor(self.storage, self.shape, self.strides, self.dtype)

    def as_(self, shape: Shape, strides: Shape) -> "Tensor":
        """Another view of the same storage, without the graph."""
        view = Tensor(self.storage, shape, strides, self.dtype)
        view.base = self.base or self
        return view


@lru_cache(maxsize=4096)
def contiguous(shape: Shape) -> Shape:
    """Strides of rows after rows.

    >>> contiguous((2, 3, 4))
    (12, 4, 1)
    """
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


@lru_cache(maxsize=4096)
def is_contiguous(shape: Shape, strides: Shape) -> bool:
    """Whether it lies row after row; dimensions of one element don't count."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1:
            if stride != step:
                return False
            step *= size
    return True


@lru_cache(maxsize=4096)
def is_dense(shape: Shape, strides: Shape) -> bool:
    """Whether its elements lie side by side in some order of the dimensions, none of them twice."""
    step = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1:
            if stride != step:
                return False
            step *= size
    return True


@lru_cache(maxsize=4096)
def broadcast(*shapes: Shape) -> Shape:
    """The shape of an element-wise result.

    >>> broadcast((2, 1, 4), (3, 1))
    (2, 3, 4)
    """
    rank = max(len(s) for s in shapes)
    padded = [(1,) * (rank - len(s)) + s for s in shapes]
    return tuple(max(sizes) for sizes in zip(*padded, strict=True))


@lru_cache(maxsize=4096)
def layout(shape: Shape, *operands: tuple[Shape, Shape]) -> Shape:
    """Strides of an element-wise result: dense, its dimensions in the order in which the operands lie, the first of
    them that tells deciding. Source: TensorIterator.cpp `reorder_dimensions`.

    >>> layout((2, 4, 8, 16), ((2, 4, 8, 16), (512, 16, 64, 1)), ((1, 1, 8, 16), (128, 128, 16, 1)))
    (512, 16, 64, 1)
    """
    if all(s == shape and is_contiguous(s, strides) for s, strides in operands):
        return contiguous(shape)
    first = operands[0]
    if all(x == first for x in operands) and first[0] == shape and is_dense(*first):
        return first[1]
    rank = len(shape)
    known = []
    for own, strides in operands:
        pad = rank - len(own)
        pairs = zip(own, strides, shape[pad:], strict=True)
        known.append((0,) * pad + tuple([0 if n == 1 != size else stride for n, stride, size in pairs]))

    def compare(a: int, b: int) -> int:
        for strides in known:
            if strides[a] == 0 or strides[b] == 0:
                continue
            if strides[a] != strides[b]:
                return -1 if strides[a] < strides[b] else 1
            if shape[a] > shape[b]:
                return 1
        return 0

    order = list(range(rank - 1, -1, -1))
    for i in range(1, rank):
        at = i
        for before in range(i - 1, -1, -1):
            found = compare(order[before], order[at])
            if found > 0:
                order[before], order[at] = order[at], order[before]
                at = before
            elif found < 0:
                break
    strides_out, step = [0] * rank, 1
    for dim in order:
        strides_out[dim] = step
        step *= shape[dim]
    return tuple(strides_out)


@lru_cache(maxsize=4096)
def viewed(shape: Shape, strides: Shape, new: Shape) -> Shape | None:
    """Strides of the same elements in another shape; None where that needs a copy.

    >>> viewed((2, 8, 4, 16), (512, 64, 16, 1), (2, 8, 64))
    (512, 64, 1)
    >>> viewed((2, 4, 8, 16), (512, 16, 64, 1), (8, 8, 16)) is None
    True
    """
    if shape == new:
        return strides
    if prod(new) == 0:
        return contiguous(new)
    out = [0] * len(new)
    at = len(new) - 1
    elements = view_elements = 1
    base = strides[-1] if strides else 1
    for dim in range(len(shape) - 1, -1, -1):
        elements *= shape[dim]
        if dim == 0 or (shape[dim - 1] != 1 and strides[dim - 1] != elements * base):
            while at >= 0 and (view_elements < elements or new[at] == 1):
                out[at] = view_elements * base
                view_elements *= new[at]
                at -= 1
            if view_elements != elements:
                return None
            if dim > 0:
                base = strides[dim - 1]
                elements = view_elements = 1
    return tuple(out) if at == -1 else None


@lru_cache(maxsize=4096)
def preserved(shape: Shape, strides: Shape) -> Shape:
    """Strides of a copy that keeps its source's order of dimensions (`empty_like`, `clone`, `to`)."""
    return strides if is_dense(shape, strides) else layout(shape, (shape, strides))
