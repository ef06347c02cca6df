"""What CUDA's kernels choose and hold, by sizes alone: facts that both engines need, without torch.

Source: PyTorch 2.11, transformers/cuda/sdp_utils.cpp, native/cuda/, CublasHandlePool.cpp; what is not said there was
measured on an H100 (fixtures/measured).
"""

from typing import Final, Literal

from hfvram.memory.generation import CUBLAS_SOURCE, Generation
from hfvram.memory.timeline import Tag

Kernel = Literal["cudnn", "flash", "efficient"]
CUBLASLT_BYTES: Final = 1 << 20
"""cuBLASLt's, which products with a bias use, one for each thread too. Source: PyTorch 2.11, CUDABlas.cpp."""
CUBLAS = Tag("cuBLAS workspace", "workspace", "one for each thread that multiplies", CUBLAS_SOURCE)
CUBLASLT = Tag("cuBLASLt workspace", "workspace", "1 MiB, one a thread", "PyTorch 2.11: CUDABlas.cpp")


def round_up(size: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step


def attention_kernel(
    dtype: str,
    heads: tuple[int, int, int],
    widths: tuple[int, int],
    gpu: Generation,
    *,
    masked: bool,
    gqa: bool,
    narrow: bool,
) -> Kernel | None:
    """The kernel that PyTorch picks for `scaled_dot_product_attention`, None for the math path.

    `heads` and `widths` are those of queries, keys and values, and of queries and values; `narrow` whether flash
    attention's backward (if one comes) has room where it needs to be narrow (`flash_backward_fits`). Heads that differ
    without `gqa` leave only math. Half precision without a mask takes cuDNN where it stands first (heads of up to 128),
    else flash (up to 256); the rest is efficient, where it takes the dtype and the head size.
    """
    half = dtype in ("bf16", "fp16")
    if dtype == "bf16" and not gpu.bf16:
        return None
    grouped = len({*heads}) > 1
    if grouped and not (gqa and half and not masked and gpu.flash):
        return None
    d, dv = widths
    if half and not masked and d == dv <= 256:
        if gpu.cudnn_first and d <= 128 and d % 8 == 0:
            return "cudnn"
        if gpu.flash and (not gpu.narrow_backward or narrow):
            return "flash"
        if grouped:
            return None
    alignment = gpu.alignment[0 if half else 1]
    return None if d % alignment or dv % alignment else "efficient"


def flash_backward_fits(width: int, dropout: float) -> bool:
    """Whether flash attention trains heads of this width where its backward has less shared memory than it wants."""
    return width <= 192 or (width > 224 and not dropout)


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
