"""Context parallelism by formula: each rank has s÷cp tokens of everything, and attention goes around all ranks.

A rank has two pieces of the sequence, one from its start and one from its end, so that causal attention is as much work
on each. Weights stand on all of them, or are sharded by FSDP over them as well (accelerate's `dp_shard_cp`). Ranks
differ in what is merged: the first one only halves of queries, the last one only whole ones, those between both; all
but the last see a jump in their positions, which transformers takes for packed sequences and makes a mask of.

Source: PyTorch 2.13, distributed/tensor/experimental/_context_parallel; accelerate, `ParallelismConfig(cp_size)` and
big_modeling.py `_attach_context_parallel_hooks`; transformers 5.17, trainer.py `_prepare_context_parallel_inputs`,
masking_utils.py `find_packed_sequence_indices`. Derived from that code, never measured.
"""

from hfvram.errors import HfvramError
from hfvram.memory.tensor_parallel import multiples
from hfvram.model.architecture import Architecture
from hfvram.model.layers import Attention, LatentAttention
from hfvram.request import Request


def kinds(cp: int) -> list[tuple[str, int, int]]:
    """Ranks that differ: their name, how many they are, and the number of one of them.

    >>> kinds(8)
    [('cp rank 1', 1, 0), ('cp ranks 2 to 7', 6, 6), ('cp rank 8', 1, 7)]
    >>> kinds(2)
    [('cp rank 1', 1, 0), ('cp rank 2', 1, 1)]
    """
    middle = "cp rank 2" if cp == 3 else f"cp ranks 2 to {cp - 1}"
    between = [(middle, cp - 2, cp - 2)] if cp > 2 else []
    return [("cp rank 1", 1, 0), *between, (f"cp rank {cp}", 1, cp - 1)]


def check(architecture: Architecture, request: Request) -> None:
    """Raises `usage` for a sequence that has no equal halves, and for attention that doesn't go around."""
    cp = f"--cp {request.cp}"
    pieces = 2 * request.cp * (request.tp if request.sp else 1)
    if (ctx := request.ctx or 0) % pieces:
        of = f"2·{request.cp}" + (f"·{request.tp}" if request.sp else "")
        near = multiples(ctx, pieces)
        raise HfvramError("usage", f"{cp}: --ctx {ctx} is not divisible by {of}, pieces alike: valid are {near}")
    if request.attention != "sdpa":
        raise HfvramError("usage", f"{cp} goes around by SDPA alone: valid is --attention sdpa")
    if request.padding:
        raise HfvramError("usage", f"{cp} knows causal masks alone: valid is --no-padding")
    mixers = [m for layer in architecture.text.layers for m in layer.mixers]
    name = architecture.class_name
    if architecture.task != "causal" or len(architecture.stacks) > 1:
        raise HfvramError("usage", f"{cp} is for decoders of text, {name} is none: valid is --cp 1")
    if not all(isinstance(m, Attention | LatentAttention) for m in mixers):
        raise HfvramError("usage", f"{cp}: layers of {name} carry a state along the sequence: valid is --cp 1")
    if any(isinstance(m, Attention) and m.window for m in mixers):
        raise HfvramError("usage", f"{cp}: layers of {name} see a window, not all before them: valid is --cp 1")
    if any("sdpa" not in m.implementations for m in mixers if isinstance(m, Attention | LatentAttention)):
        raise HfvramError("usage", f"{cp}: {name} can't run SDPA, which goes around: valid is --cp 1")
