"""DeepSpeed's own estimators of model states under ZeRO-2 and 3, as they print: no answer is made of them.

They know parameters alone: no activations, no buckets, no allocator; AdamW over 16-bit parameters with fp32 masters.
`factor` is their allowance for buffers in CPU memory.

Source: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py `estimate_zero2_model_states_mem_needs`, runtime/zero/stage3.py
`estimate_zero3_model_states_mem_needs`; their tables in DeepSpeed's documentation, "Memory Requirements".
"""

from typing import NamedTuple


class Needs(NamedTuple):
    """Bytes of a node's CPU memory, and of each GPU."""

    cpu_bytes: int
    gpu_bytes: int

    def __str__(self) -> str:
        return f"{self.cpu_bytes / 2**30:.2f}GB | {self.gpu_bytes / 2**30:.2f}GB"


def zero2_needs(
    parameters: int,
    gpus_per_node: int = 1,
    nodes: int = 1,
    offload_optimizer: bool = True,
    factor: float = 1.5,
    gradients_whole: bool = False,
) -> Needs:
    """ZeRO-2: 2P + 18P/n on a GPU, 2P with the optimizer offloaded; CPU memory P·max(4n, 16)·factor, or 4P·g·factor.

    Earlier releases, whose tables the documentation prints, held gradients whole: 4P + 16P/n (`gradients_whole`).

    T5-3B on a node of 8 GPUs, as documented:

    >>> for offload in (True, False):
    ...     print(zero2_needs(2_851_598_336, 8, offload_optimizer=offload, gradients_whole=True))
    127.48GB | 5.31GB
    127.48GB | 15.93GB
    >>> print(zero2_needs(2_851_598_336, 8, offload_optimizer=False))
    127.48GB | 11.29GB
    """
    gpus = nodes * gpus_per_node
    if offload_optimizer:
        return Needs(int(parameters * max(4 * gpus, 16) * factor), 2 * parameters)
    whole, parted = (4, 16) if gradients_whole else (2, 18)
    return Needs(int(parameters * 4 * gpus_per_node * factor), whole * parameters + parted * parameters // gpus)


def zero3_needs(
    parameters: int,
    largest_layer: int,
    gpus_per_node: int = 1,
    nodes: int = 1,
    offload_optimizer: bool = True,
    offload_parameters: bool = True,
    zero_init: bool = True,
    factor: float = 1.5,
) -> Needs:
    """ZeRO-3: four bytes for each parameter of the largest layer, and 18P/n, 2P/n (optimizer offloaded) or nothing (all
    offloaded). Without `zero.Init` each process builds the whole model in CPU memory first.

    T5-3B on a node of 8 GPUs, as documented:

    >>> for away, init in ((2, True), (2, False), (1, True), (1, False), (0, True), (0, False)):
    ...     print(zero3_needs(2_851_598_336, 32_899_072, 8, 1, away > 0, away > 1, init))
    71.71GB | 0.12GB
    127.48GB | 0.12GB
    63.74GB | 0.79GB
    127.48GB | 0.79GB
    1.47GB | 6.10GB
    127.48GB | 6.10GB

    T5-small on one GPU, as printed by a user:

    >>> for away, init in ((2, True), (1, True), (0, True), (0, False)):
    ...     print(zero3_needs(60_506_624, 16_449_536, 1, 1, away > 0, away > 1, init))
    1.52GB | 0.06GB
    1.35GB | 0.17GB
    0.09GB | 1.08GB
    0.34GB | 1.08GB
    """
    gpus, layer = nodes * gpus_per_node, 4 * largest_layer
    if offload_optimizer:
        each = 18 if offload_parameters else 16
        gpu = layer if offload_parameters else layer + 2 * parameters // gpus
        most = each / nodes if zero_init else max(4 * gpus_per_node, each / nodes)
        return Needs(int(parameters * most * factor), gpu)
    built = layer if zero_init else 4 * parameters
    return Needs(int(built * gpus_per_node * factor), layer + 18 * parameters // gpus)
