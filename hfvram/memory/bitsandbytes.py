"""bitsandbytes' numbers, of which both engines make what it allocates.

Source: bitsandbytes 0.49, functional.py (weights) and optim/optimizer.py `init_state` (optimizers).
"""

from typing import Final

ON_LOADING: Final = ("nf4", "fp4", "int8")
"""Quantizations that are made while a model is loaded; all others are the checkpoint's own."""
BLOCK, NESTED_BLOCK = 64, 256
"""4-bit weights to a scale, and scales to a scale of theirs where they are quantized, too."""
FEW_ROWS: Final = 32
"""Rows that are multiplied by the packed weights themselves: up to 512 it depends on the layer's sizes, that many
always (`_gemm_4bit_use_custom_cuda`)."""
STATE_BLOCK: Final = 256
"""Values of a state in 8 bits to a scale."""
SMALL_STATE: Final = 4096
"""Tensors of fewer values keep their states in fp32."""
PAGED_STATE: Final = 100_000
"""States of so many values and more are managed memory where the optimizer is paged."""
OPTIMIZERS: Final[dict[str, tuple[int, int, bool]]] = {
    "adamw_8bit": (2, 8, False),
    "adamw_bnb_8bit": (2, 8, False),
    "paged_adamw_8bit": (2, 8, True),
    "paged_adamw_32bit": (2, 32, True),
    "ademamix": (3, 32, False),
    "ademamix_8bit": (3, 8, False),
    "paged_ademamix_32bit": (3, 32, True),
    "paged_ademamix_8bit": (3, 8, True),
    "lion": (1, 32, False),
    "lion_32bit": (1, 32, False),
    "lion_8bit": (1, 8, False),
    "paged_lion_32bit": (1, 32, True),
    "paged_lion_8bit": (1, 8, True),
    "rmsprop_bnb": (1, 32, False),
    "rmsprop_bnb_32bit": (1, 32, False),
    "rmsprop_bnb_8bit": (1, 8, False),
}
"""Its optimizers by transformers' names: states of a parameter, their bits, whether they are paged."""
