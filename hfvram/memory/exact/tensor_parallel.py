"""Tensor parallelism by transformers' own code: the model's plan, its layers split as DTensors, the first rank's part.

Source: transformers 5.17, distributed/mixin.py `maybe_distribute_model` (what `from_pretrained(tp_plan="auto")` calls),
distributed/tensor_parallel.py, and the `base_model_tp_plan` of each configuration.
"""

import math
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from hfvram.errors import HfvramError
from hfvram.request import Request


def split_model(model: Any, mesh: DeviceMesh, request: Request) -> None:
    """Split a model on meta by its own plan over the ranks of `mesh`, in place.

    Raises `usage` for a model without a plan, and where its heads or widths can't be split evenly.
    """
    try:
        from transformers.distributed import DistributedConfig
    except ImportError as error:
        raise HfvramError("usage", "--tp with --method simulate needs transformers 5.17 or newer") from error
    plan = getattr(model, "tp_plan", None)
    if not plan:
        raise HfvramError("usage", f"{type(model).__name__} has no plan for --tp: valid is 1")
    heads = split_heads(model, plan)
    if any(n % mesh.size() for n in heads):
        most = math.gcd(*heads)
        valid = ", ".join(str(n) for n in range(1, most + 1) if most % n == 0)
        shown = " and ".join(str(n) for n in sorted(set(heads)))
        raise HfvramError("usage", f"--tp {mesh.size()} does not divide {shown} heads: valid are {valid}")
    if request.sp:
        from hfvram.memory.exact.sequence_parallel import split_sequence

        model._tp_plan = split_sequence(model, mesh)
    try:
        model.maybe_distribute_model(model, DistributedConfig(tp_size=mesh.size(), tp_plan="auto"), mesh)
    except ValueError as error:
        raise HfvramError("usage", f"--tp {mesh.size()}: {error}") from error
    compact(model)
    model.tie_weights(recompute_mapping=False)


def split_heads(model: Any, plan: dict[str, str]) -> list[int]:
    """The heads of each projection that the plan splits by columns, where its attention says how wide a head is."""
    from transformers.distributed.tensor_parallel import replace_layer_number_by_wildcard

    heads = set()
    for name, module in model.named_modules():
        width = getattr(module, "head_dim", None)
        for child, projection in module.named_children():
            if plan.get(replace_layer_number_by_wildcard(f"{name}.{child}")) == "colwise" and isinstance(width, int):
                heads.add(projection.out_features // width)
    return sorted(heads)


def compact(model: Any) -> None:
    """Give every local part a storage of its own size: a part cut from a whole may be a view into it."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if isinstance(parameter, DTensor):
                local = parameter.to_local().detach()
                if local.untyped_storage().nbytes() > local.numel() * local.itemsize:
                    own = DTensor.from_local(
                        torch.empty_like(local),
                        parameter.device_mesh,
                        parameter.placements,
                        run_check=False,
                        shape=parameter.shape,
                        stride=parameter.stride(),
                    )
                    module._parameters[name] = torch.nn.Parameter(own, requires_grad=parameter.requires_grad)
