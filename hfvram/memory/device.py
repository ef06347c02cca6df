"""What the GPU holds beside PyTorch's allocator: the CUDA context, and kernels and libraries loaded on demand."""

from hfvram.units import MiB

CONTEXT_BYTES = 527 * MiB
"""Driver and context of one process. Source: measured, H100, CUDA 13 (every case of fixtures/measured alike)."""
KERNELS_BYTES = 168 * MiB
"""cuBLAS and the kernels that inference loads. Source: measured, H100: 168 MiB in most inference cases, 160 to 270."""
TRAINING_KERNELS_BYTES = 240 * MiB
"""The same for training. Source: measured, H100: 240 MiB in most cases, 224 in others, more where kernels are tuned."""
SHARDED_KERNELS_BYTES = 310 * MiB
"""And on one rank of many, without what NCCL itself holds. Source: measured, H100, FSDP2: 310 MiB in every case."""


def device_bytes(reserved_bytes: int, kernels_bytes: int = KERNELS_BYTES) -> int:
    """What `nvidia-smi` shows for the process: reserved memory, context and loaded kernels."""
    return reserved_bytes + CONTEXT_BYTES + kernels_bytes


def kernels_bytes(mode: str, sharded: bool) -> int:
    """What the libraries and kernels of a mode of work hold."""
    if mode == "inference":
        return KERNELS_BYTES
    return SHARDED_KERNELS_BYTES if sharded else TRAINING_KERNELS_BYTES
