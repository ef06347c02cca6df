"""Sequence parallelism within tensor parallelism: what runs between the split blocks runs on a part of the sequence.

transformers 5.17 has the styles (distributed/tensor_parallel.py), but no model's plan uses them, and its
`enable_sequence_parallel` is "not wired up yet". So the plan is made here from the model's own for tensor parallelism,
as PyTorch's tutorial and torchtitan make theirs: the embedding's output is split along the sequence, norms and
residuals stay so (`SequenceParallel`), each block gathers its input once, its last product is reduced and scattered,
the head gathers. Positions and masks follow from the whole shape, which a DTensor keeps.

What a block gathers it also saves for its backward pass, as DTensor does it. Megatron-LM saves the part alone and
gathers again (Korthikanti et al., arXiv 2205.05198, section 4.2.2).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import implicit_replication
from torch.utils._pytree import tree_map
from transformers.distributed.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    RowwiseParallel,
    SequenceParallel,
    TensorParallelLayer,
    replace_layer_number_by_wildcard,
)

from hfvram.errors import HfvramError
from hfvram.memory.tensor_parallel import check_sequence
from hfvram.request import Request

SEQUENCE = Shard(1)
WITHIN = "rowwise_within_a_block"
LINEAR = ("colwise", "rowwise")
STYLES = {
    "rowwise": RowwiseParallel(output_layouts=SEQUENCE, use_local_output=False),
    "embedding_rowwise": RowwiseParallel(input_layouts=Replicate(), output_layouts=SEQUENCE, use_local_output=False),
    WITHIN: RowwiseParallel(),
}


class Gathered(TensorParallelLayer):  # type: ignore[misc]
    """A module that needs the whole sequence: what it is given is gathered once, what it returns is split again.

    `whole`: its code knows no DTensor, since it does more than split products.
    """

    def __init__(self, whole: bool) -> None:
        self.whole = whole

    def transform_inputs_pre_forward(self, module: Any, args: Any, kwargs: Any, mesh: DeviceMesh) -> Any:
        return tree_map(self.gathered, (args, kwargs))

    def gathered(self, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        value = value.redistribute(placements=[Replicate()])
        return value.to_local() if self.whole else value

    def transform_output_post_forward(self, module: Any, output: Any, mesh: DeviceMesh) -> Any:
        if isinstance(output, tuple):
            return (along_sequence(output[0], mesh), *output[1:])
        return along_sequence(output, mesh)


class Split(TensorParallelLayer):  # type: ignore[misc]
    """An embedding that every rank holds whole; each goes on with its part of the sequence."""

    def transform_output_post_forward(self, module: Any, output: Any, mesh: DeviceMesh) -> Any:
        return along_sequence(output, mesh)


class Whole(Gathered):
    """A head that no plan splits."""

    def transform_output_post_forward(self, module: Any, output: Any, mesh: DeviceMesh) -> Any:
        return output


def along_sequence(tensor: Any, mesh: DeviceMesh) -> Any:
    """This rank's part of a (b, s, …) tensor, as a DTensor."""
    if not isinstance(tensor, DTensor):
        tensor = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    return tensor if tensor.placements == (SEQUENCE,) else tensor.redistribute(placements=[SEQUENCE])


@contextlib.contextmanager
def styles() -> Iterator[None]:
    """transformers' styles as the plan needs them, and plain tensors taken for replicated ones, until the end."""
    for name, style in STYLES.items():
        ALL_PARALLEL_STYLES[name] = style
    try:
        with implicit_replication():
            yield
    finally:
        for name in STYLES:
            del ALL_PARALLEL_STYLES[name]  # transformers' own show again


def check_lengths(request: Request) -> None:
    """Raises `usage` where the sequence can't be split into equal parts, and for what has none to split."""
    if request.fsdp and request.mode in ("lora", "qlora"):
        raise HfvramError("usage", "--sp with adapters trains without --fsdp, which can't reduce their gradients so")
    if request.mode == "inference" and request.phase == "generate":
        raise HfvramError(
            "usage", "--sp is for whole sequences, generated tokens come one by one: valid are --phase prefill, encode"
        )
    check_sequence(request)


def split_sequence(model: Any, mesh: DeviceMesh) -> dict[str, str]:
    """Split what stands around the blocks of a model's plan, in place; the plan by which to split the blocks.

    Raises `usage` for a model of several stacks, whose sequences are not one, and for one whose layers have no plan.
    """
    plan = dict(model.tp_plan)
    patterns = {replace_layer_number_by_wildcard(name) for name, _ in model.named_modules()}
    stacks = {name[: name.index(".*") + 2] for name in plan if ".*" in name} & patterns
    if len(stacks) != 1:
        has = "has several" if stacks else "has none that --tp splits"
        raise HfvramError("usage", f"--sp is for models with one stack of layers, {type(model).__name__} {has}")
    stack = stacks.pop()
    norm = SequenceParallel(use_local_output=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        parent = replace_layer_number_by_wildcard(name.rpartition(".")[0])
        pattern = replace_layer_number_by_wildcard(name)
        if module is embedding:
            if pattern not in plan:
                Split().install_forward(module, mesh)
        elif module is head:
            if pattern not in plan:
                Whole(whole=True).install_forward(module, mesh)
        elif parent in (stack, stack[:-2].rpartition(".")[0]) and pattern not in plan:
            sizes = [p.dim() for p in module.parameters()]
            if sizes and max(sizes) <= 1:
                norm.install_forward(module, mesh)
            elif sizes and parent == stack:
                whole = not only_products(module, pattern, plan)
                Gathered(whole).install_forward(module, mesh)
                if whole:
                    inner = [k for k, style in plan.items() if k.startswith(pattern + ".") and style == "rowwise"]
                    plan |= dict.fromkeys(inner, WITHIN)
    return plan


def only_products(block: Any, pattern: str, plan: dict[str, str]) -> bool:
    """Whether all matrices of a block are split linear layers: its input goes into those alone."""
    for name, module in block.named_modules():
        own = list(module.parameters(recurse=False))
        planned = plan.get(replace_layer_number_by_wildcard(f"{pattern}.{name}"))
        if any(p.dim() > 1 for p in own) and not (isinstance(module, torch.nn.Linear) and planned in LINEAR):
            return False
    return True
