"""What of PyTorch's choices depends on the GPU's generation, by compute capability.

Source: PyTorch, transformers/cuda/sdp_utils.cpp: cuDNN stands first for 9.0, 10.0 and 10.3
(`check_prefer_cudnn_attention`), flash attention runs from 8.0 to 12.1, and needs heads of up to 192 for training on
8.6, 8.9 and 12.x (`check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120`), fused kernels take bf16 from
8.0 on; cuda/CublasHandlePool.cpp `parseChosenWorkspaceSize`: 32 MiB on 9.x, 10.x and 12.x, else :4096:2:16:8. All of
it but Hopper's row is read, not measured.
"""

from dataclasses import dataclass
from typing import Final

MEASURED: Final = "9.0"
"""The compute capability on which everything was measured (an H100), and which stands for a GPU that nobody named."""


@dataclass(frozen=True, slots=True)
class Generation:
    """Which attention kernels a GPU has, and cuBLAS's workspace on it."""

    name: str
    cudnn_first: bool = False
    """cuDNN's attention is taken where it can run; elsewhere it is never reached."""
    flash: bool = True
    bf16: bool = True
    """The fused kernels take bf16; without, it is left to the math path."""
    narrow_backward: bool = False
    """Flash attention trains heads of up to 192, or of more than 224 without dropout."""
    alignment: tuple[int, int] = (8, 4)
    """Head sizes that the memory-efficient kernel takes are multiples of these: in half precision, in fp32."""
    cublas_bytes: int = (4096 * 2 + 16 * 8) << 10


CUBLAS_SOURCE: Final = "PyTorch 2.11: CublasHandlePool.cpp; 32 MiB from Hopper on, 8.125 MiB before"
LARGE_BYTES: Final = 32 << 20
"""cuBLAS's workspace from Hopper on."""

GENERATIONS: Final[dict[str, Generation]] = {
    "6.0": Generation("Pascal", flash=False, bf16=False, alignment=(1, 1)),
    "6.1": Generation("Pascal", flash=False, bf16=False, alignment=(1, 1)),
    "7.0": Generation("Volta", flash=False, bf16=False, alignment=(8, 1)),
    "7.5": Generation("Turing", flash=False, bf16=False, alignment=(8, 1)),
    "8.0": Generation("Ampere"),
    "8.6": Generation("Ampere", narrow_backward=True),
    "8.9": Generation("Ada", narrow_backward=True),
    "9.0": Generation("Hopper", cudnn_first=True, cublas_bytes=LARGE_BYTES),
    "10.0": Generation("Blackwell", cudnn_first=True, cublas_bytes=LARGE_BYTES),
    "10.3": Generation("Blackwell", cudnn_first=True, cublas_bytes=LARGE_BYTES),
    "12.0": Generation("Blackwell", narrow_backward=True, cublas_bytes=LARGE_BYTES),
    "12.1": Generation("Blackwell", narrow_backward=True, cublas_bytes=LARGE_BYTES),
}


def generation(capability: str | None) -> Generation:
    """The row of a compute capability; Hopper's for one that is not known."""
    return GENERATIONS[capability or MEASURED]


HOPPER: Final = generation(None)
