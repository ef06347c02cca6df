"""How the GPUs of a request stand to one another: which of them hold one model together, and how often it is held."""

from dataclasses import dataclass

from hfvram.errors import HfvramError
from hfvram.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """GPUs by what they divide: widths (`tp`), layers (`pp`), experts (`ep`), the sequence (`cp`), sequences (`data`).

    >>> Mesh(gpus=32, tp=4, pp=2).data
    4
    """

    gpus: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    cp: int = 1

    @property
    def model(self) -> int:
        """GPUs that hold one model together."""
        return self.tp * self.pp * self.ep * self.cp

    @property
    def data(self) -> int:
        """How often the model is held: what DDP, ZeRO and FSDP shard or replicate over."""
        return self.gpus // self.model


def mesh_of(request: Request) -> Mesh:
    """The mesh of a request: as many GPUs as hold the model unless `--gpus` names a multiple. Raises `usage`.

    >>> mesh_of(Request(gpus=16, tp=2)).data, mesh_of(Request(tp=2, pp=2)).gpus
    (8, 4)
    """
    mesh = Mesh(tp=request.tp, pp=request.pp, ep=request.ep, cp=request.cp)
    gpus = request.gpus or mesh.model
    if gpus % mesh.model:
        valid = f"valid are {mesh.model}, {2 * mesh.model}, …"
        raise HfvramError("usage", f"--gpus {gpus} is not divisible by the {mesh.model} that hold the model: {valid}")
    return Mesh(gpus=gpus, tp=mesh.tp, pp=mesh.pp, ep=mesh.ep, cp=mesh.cp)
