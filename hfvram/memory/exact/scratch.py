"""What CUDA's kernels hold beside their inputs and outputs, where the meta kernels do not show it."""

from typing import Any

import torch

from hfvram.memory.generation import CUBLAS_SOURCE
from hfvram.memory.timeline import Tag

aten = torch.ops.aten
CUBLASLT_BYTES = 1 << 20
"""cuBLASLt's, which products with a bias use, one for each thread too. Source: PyTorch 2.11, CUDABlas.cpp."""
CUBLAS = Tag("cuBLAS workspace", "workspace", "one for each thread that multiplies", CUBLAS_SOURCE)
CUBLASLT = Tag("cuBLASLt workspace", "workspace", "1 MiB, one a thread", "PyTorch 2.11: CUDABlas.cpp")
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


def embedding_scratch_bytes(tokens: int, width: int, rows: int) -> tuple[int, ...]:
    """An embedding's backward sorts its tokens where they are more than 3,072, and sums runs of ten in fp32.

    Source: PyTorch 2.11, native/cuda/Embedding.cu and EmbeddingBackwardKernel.cu.

    >>> embedding_scratch_bytes(3072, 2048, 32000), embedding_scratch_bytes(4096, 8, 32000)[-1]
    ((), 144160)
    """
    if tokens <= 3072:
        return ()
    segments = min(tokens, rows)
    runs = tokens // 10 + segments
    return (tokens * 8, tokens * 8, tokens * 8, segments * 8, segments * 8, runs * 8, runs * width * 4)
