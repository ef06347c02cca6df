"""DeepSpeed's own defaults, in elements, and what `auto` makes of them.

Source: DeepSpeed 0.19.8, runtime/zero/config.py, offload_config.py.
"""

from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Buckets:
    """Elements of the reduce bucket, of what is fetched ahead, and up to which a parameter stays whole."""

    reduce: int = BUCKET_ELEMENTS
    prefetch: int = PREFETCH_ELEMENTS
    persistence: int = PERSISTENCE_ELEMENTS


def buckets(asked: str | None, hidden: int) -> Buckets:
    """Those of `--zero-bucket`: DeepSpeed's own, a number of elements for the reduce bucket, or `auto` for all three.

    >>> buckets("auto", 4096)
    Buckets(reduce=16777216, prefetch=15099494, persistence=40960)
    >>> buckets("2e8", 4096).reduce
    200000000
    """
    if asked == "auto":
        return Buckets(auto_bucket(hidden), int(0.9 * hidden * hidden), 10 * hidden)
    return Buckets(reduce=int(float(asked))) if asked else Buckets()
