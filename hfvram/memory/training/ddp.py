"""DistributedDataParallel: gradients lie once more in buckets, which are reduced as they fill.

Source: PyTorch 2.11, torch/nn/parallel/distributed.py; torch/csrc/distributed/c10d/reducer.cpp (`initialize_buckets`,
`rebuild_buckets`, `compute_bucket_assignment_by_size`). Held event by event against that code
(`memory/exact/data_parallel.py`).
"""

from collections.abc import Iterator
from typing import Final

from hfvram.memory.mesh import mesh_of
from hfvram.memory.timeline import Tag
from hfvram.memory.training.data_parallel import Units
from hfvram.memory.training.states import Leaf, States
from hfvram.memory.training.stretch import TEMPLATE, copies
from hfvram.memory.training.tape import Parameter, Tape
from hfvram.request import Request

REDUCER: Final = "PyTorch 2.11: c10d/reducer.cpp"
BUCKETS = Tag("gradients in DDP's buckets", "gradients", "", REDUCER)
SYNCED = Tag("buffers, sent to all GPUs", "buffers", "", "PyTorch 2.11: nn/parallel/distributed.py _sync_buffers")
FIRST_BYTES: Final = 1 << 20
BUCKET_BYTES: Final = 25 << 20


def buckets(sizes: list[tuple[str, int]]) -> list[int]:
    """Bytes of each bucket: gradients in the order of their arrival as (dtype, bytes), a bucket for each dtype until
    it is full: the first at 1 MiB, the later ones at 25 MiB.

    >>> MiB = 1 << 20
    >>> [n // MiB for n in buckets([("bf16", 125 * MiB), *[("bf16", 16 * MiB)] * 5])]
    [125, 32, 32, 16]
    """
    full, limits = list[int](), dict[str, int]()
    filling: dict[str, int] = {}
    for dtype, nbytes in sizes:
        filling[dtype] = filling.get(dtype, 0) + nbytes
        if filling[dtype] >= limits.get(dtype, FIRST_BYTES):
            full.append(filling.pop(dtype))
            limits[dtype] = BUCKET_BYTES
    return full + list(filling.values())


class Ddp(Units):
    """One bucket for each dtype at first; from the second step on they are as gradients came in the first."""

    def __init__(self, t: Tape, states: States, request: Request, groups: int) -> None:
        super().__init__(t, states)
        self.groups = groups
        self.owners = {leaf.node: leaf for leaf in self.leaves}
        self.came: list[Leaf] = []
        self.rebuilt = False
        self.synced = True
        sums: dict[str, int] = {}
        mesh = mesh_of(request)
        self.apart = mesh.ep > 1 and mesh.data == 1
        """Whether experts are of this GPU alone: their gradients need no reduction."""
        for dtype, nbytes in self._sizes([leaf for leaf in self.leaves if not self._alone(leaf)]):
            sums[dtype] = sums.get(dtype, 0) + nbytes
        self.handles = [t.timeline.alloc(nbytes, BUCKETS) for nbytes in sums.values()]
        self.buffers = sum(n for n, tag in t.timeline.standing.tensors if tag.category == "buffers")

    def _alone(self, leaf: Leaf) -> bool:
        return self.apart and leaf.param.kind == "experts"

    def _sizes(self, leaves: list[Leaf]) -> Iterator[tuple[str, int]]:
        """Dtypes and bytes of these gradients, of the layers that are left out as well."""
        run: list[Leaf] = []
        for leaf in [*leaves, None]:
            if leaf is not None and leaf.segment == TEMPLATE:
                run.append(leaf)
                continue
            for x in run * copies(self.groups):
                yield x.tensor.dtype, x.tensor.nbytes
            run = []
            if leaf is not None:
                yield leaf.tensor.dtype, leaf.tensor.nbytes

    def enter_model(self) -> None:
        """Buckets are laid out anew once, and buffers sent, unless the pass before was of gradients that accumulate."""
        t = self.tape.timeline
        if self.came and not self.rebuilt:
            sizes = list(self._sizes(self.came))
            made = buckets(sizes)
            t.moment(BUCKETS, 4 * (len(sizes) + 1), 4 * len(made))  # what rank 0 tells the others
            t.free(*self.handles)
            self.handles = [t.alloc(nbytes, BUCKETS) for nbytes in made]
            self.rebuilt = True
        if self.synced and self.buffers:
            t.moment(SYNCED, self.buffers)
        self.synced = self.last

    def arrived(self, parameter: Parameter) -> None:
        if self.last and not self.rebuilt and not self._alone(self.owners[parameter]):
            self.came.append(self.owners[parameter])
