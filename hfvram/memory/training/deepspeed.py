"""DeepSpeed's own defaults, in elements, and what `auto` makes of them.

Source: DeepSpeed 0.19.8, runtime/zero/config.py, offload_config.py.
"""

from typing import Final

BUCKET_ELEMENTS: Final = 500_000_000
PREFETCH_ELEMENTS: Final = 50_000_000
PERSISTENCE_ELEMENTS: Final = 100_000
REUSE_ELEMENTS: Final = 1_000_000_000
SUB_GROUP_ELEMENTS: Final = 1_000_000_000
SWAP_BUFFERS: Final = 4
PARAM_BUFFERS, PARAM_BUFFER_ELEMENTS = 5, 100_000_000


def auto_bucket(hidden: int) -> int:
    """Elements of the reduce bucket where a configuration says `auto`.

    Source: transformers 5.17, integrations/deepspeed.py HfTrainerDeepSpeedConfig.trainer_config_finalize.
    """
    return hidden * hidden
