"""What a recurrent mixer keeps: the states that it writes, in bytes."""

from hfvram.memory.forward import Forward
from hfvram.memory.mixers import mix
from hfvram.memory.timeline import Standing, Timeline
from hfvram.model.layers import Recurrent


def state_bytes(part: Recurrent, batch: int, dtype: str) -> int:
    """Bytes of the states after a prefill; they don't depend on its length."""
    t, states = Timeline(Standing(())), list[int]()
    mix(t, Forward(batch=batch, tokens=8, dtype=dtype), part, states)
    return sum(t.sizes[h] for h in states)
