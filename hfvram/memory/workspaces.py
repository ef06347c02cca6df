"""What matrix products take beside their inputs and outputs, once for the thread that runs the model.

Source: PyTorch 2.11, CublasHandlePool.cpp and CUDABlas.cpp: cuBLAS's workspace, and cuBLASLt's, by which a product adds
its bias (`addmm` with a bias of one dimension); both stay.
"""

from collections.abc import Iterable, Iterator

from hfvram.memory.cuda_kernels import CUBLASLT, CUBLASLT_BYTES
from hfvram.memory.forward import Forward
from hfvram.memory.generation import CUBLAS_SOURCE
from hfvram.memory.timeline import Tag, Timeline
from hfvram.model.architecture import Architecture, Stack
from hfvram.model.layers import Param

WORKSPACE = Tag("cuBLAS workspace", "workspace", "", CUBLAS_SOURCE)
APART = ("dt_proj",)
"""Layers whose weight alone is multiplied, their bias being added by another kernel (Mamba's step size)."""


def workspaces(t: Timeline, f: Forward, architecture: Architecture, *stacks: Stack) -> None:
    """Allocate the workspaces that a pass through these stacks and the head needs."""
    t.alloc(f.gpu.cublas_bytes, WORKSPACE)
    if f.quant != "int8" and adds_bias(_params(architecture, stacks)):  # LLM.int8() adds a bias after its product
        t.alloc(CUBLASLT_BYTES, CUBLASLT)


def adds_bias(params: Iterable[Param]) -> bool:
    """Whether one of these layers adds a bias within its product.

    >>> from hfvram.model.layers import linear
    >>> adds_bias(linear("q_proj", 8, 8)), adds_bias(linear("q_proj", 8, 8, bias=True))
    (False, True)
    >>> adds_bias(linear("dense", 8, 8, bias=True, kind="linear_subclass"))  # Falcon's own: product + bias
    False
    """
    products = ""
    for param in params:
        stem, _, what = param.name.rpartition(".")
        if what == "weight":
            products = stem if param.kind in ("linear", "head") else ""
        elif param.kind == "bias" and stem and stem == products and not stem.endswith(APART):
            return True
    return False


def _params(architecture: Architecture, stacks: tuple[Stack, ...]) -> Iterator[Param]:
    for stack in stacks:
        yield from stack.before
        for layer in {id(layer): layer for layer in stack.layers}.values():
            yield from layer.all_params()
        yield from stack.after
    yield from architecture.head
