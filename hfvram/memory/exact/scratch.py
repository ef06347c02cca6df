"""What CUDA's kernels hold beside their inputs and outputs, where the meta kernels do not show it."""

from typing import Any

import torch

from hfvram.memory.cuda_kernels import embedding_scratch_bytes

aten = torch.ops.aten
MATRIX_PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.addbmm, aten._grouped_mm, aten._scaled_mm}


def scratch_bytes(operator: Any, args: tuple[Any, ...]) -> tuple[int, ...]:
    """Tensors of one operator's kernel, which are there for its time alone.

    Softmax's backward multiplies into a tensor of its own; a sort keeps indices and values twice; `_safe_softmax` marks
    rows that are masked whole. Source: PyTorch 2.11, native/cuda/SoftMax.cu, Sort.cu; measured exactly.
    """
    if operator is aten._softmax_backward_data:
        return (args[0].numel() * args[0].element_size(),)
    if operator in (aten.sort, aten.argsort):
        return (args[0].numel() * 8, args[0].numel() * args[0].element_size())
    if operator is aten._safe_softmax:
        return (args[0].numel(),)
    if operator is aten.embedding_dense_backward:
        return embedding_scratch_bytes(args[1].numel(), args[0].shape[-1], args[2])
    return ()
