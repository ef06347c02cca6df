"""What the GPU holds beside PyTorch's allocator: the CUDA context, and kernels and libraries loaded on demand."""

from hfvram.units import MiB

CONTEXT_BYTES = 527 * MiB
"""Driver and context of one process. Source: measured, H100, CUDA 13 (every case of fixtures/measured alike)."""
KERNELS_BYTES = 168 * MiB
"""cuBLAS and the kernels that inference loads. Source: measured, H100: 168 MiB in most inference cases, 160 to 270."""


def device_bytes(reserved_bytes: int) -> int:
    """What `nvidia-smi` shows for the process: reserved memory, context and loaded kernels."""
    return reserved_bytes + CONTEXT_BYTES + KERNELS_BYTES
