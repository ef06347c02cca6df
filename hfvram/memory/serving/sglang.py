"""SGLang's plan: mem_fraction_static·free − weights, in a pool a kind of layer: full, sliding, latent, recurrent.

Source: SGLang 0.5.23, mem_cache/kv_cache_configurator.py (_profile_available_bytes, _handle_max_mamba_cache),
model_executor/pool_configurator.py, mem_cache/memory_pool.py, arg_groups/memory_hook.py.
"""

from collections.abc import Callable
from functools import partial

from hfvram.memory.allocator import stand
from hfvram.memory.device import CONTEXT_BYTES
from hfvram.memory.forward import ELEMENT_BYTES
from hfvram.memory.serving.activations import Profile, peak_bytes
from hfvram.memory.serving.layers import attending, attention_cache, recurrent, state_cache
from hfvram.memory.serving.options import Options
from hfvram.memory.serving.plan import Plan, Pool
from hfvram.memory.serving.specs import WindowCache
from hfvram.memory.serving.weights import Draft, Stage, stages, standing, with_draft
from hfvram.model.architecture import Architecture
from hfvram.model.rope import RopeTable
from hfvram.units import GiB, MiB

PAGE = 1
"""Tokens of a page by default; the pool has one page more than it hands out."""
SLIDING_RATIO = 0.8
"""Tokens of the sliding layers' pool for one of the full layers' (--swa-full-tokens-ratio)."""
STATE_RATIO = 0.9
"""Bytes of recurrent states for one of the cache (--mamba-full-memory-ratio)."""
DISTRIBUTED_BYTES = GiB // 8
"""What NCCL holds once ranks are joined: 0.13 GiB (fixtures/published)."""
STATE_DTYPE = "fp32"
"""Of recurrent states, unless the configuration says otherwise (configs/mamba_utils.py, mamba2_state_dtype)."""

SIZES = ((20, 2048, 8, 8), (35, 4096, 48, 160), (60, 4096, 32, 160), (90, 8192, 256, 512), (160, 8192, 256, 512))
"""GiB of the GPU below which: tokens of a prefill, largest batch with a graph below and from tp 4 on."""


def defaults(o: Options) -> tuple[int, int]:
    """Tokens computed at a time, and the largest batch with a CUDA graph (memory_hook.py)."""
    size = (o.gpu_bytes or 80 * GiB) / GiB
    for below, chunk, few, many in SIZES:
        if size < below:
            return o.max_num_batched_tokens or chunk, few if o.tp < 4 else many
    return o.max_num_batched_tokens or 16384, 512


def static_fraction(o: Options) -> float:
    """--mem-fraction-static by default: what is left of the GPU beside 1.5 MiB a token of prefill, 2 a sequence in a
    graph and 512, on GPUs above 60 GiB at least 10 GiB. Left out: graphs of the prefill."""
    chunk, batch = defaults(o)
    total = (o.gpu_bytes or 0) / MiB
    reserved = 512 + max(chunk, 2048) * 1.5 + o.tp * o.pp / 8 * 1024 + (0 if o.enforce_eager else batch * 2)
    if total > 60 * 1024:
        reserved = max(reserved, 10 * 1024)
    return round((total - reserved) / total, 3)


def graph_bytes(layers: int, o: Options) -> int:
    """CUDA graphs of decoding: (0.4 + 0.008·L) GiB. A guess from two logs: 0.93 with 64 layers, 0.45 with 24."""
    return 0 if o.enforce_eager else int((0.4 + 0.008 * layers) * GiB)


def plan(a: Architecture, o: Options, rope: tuple[RopeTable, ...], draft: Draft | None = None) -> Plan:
    """The plan of the stage with the fewest tokens. A draft's layers keep as many tokens.

    Left out: SGLang takes the draft's layers to be as wide as the model's while it sizes the pools.
    """
    count = len(a.text.layers)
    parts = [_stage(a, o, rope, stage, draft if stage.heads else None) for stage in stages(count, o.pp)]
    if o.gpu_bytes is None:
        return max(parts, key=lambda p: p.loaded_bytes)
    return min(parts, key=lambda p: p.tokens if p.tokens is not None else p.room_bytes or 0)


def _stage(a: Architecture, o: Options, rope: tuple[RopeTable, ...], stage: Stage, draft: Draft | None) -> Plan:
    weights = with_draft(standing(a, o.dtype, o.quant, o.tp, stage, rope, o.pp), draft, o.dtype, o.tp)
    loaded = stand(weights).reserved
    room = None
    if o.gpu_bytes is not None:
        before = o.gpu_bytes - CONTEXT_BYTES - (DISTRIBUTED_BYTES if o.tp * o.pp > 1 else 0)
        room = int(before * (o.utilization or static_fraction(o))) - loaded
    full, sliding, state, window = cells(a, o, stage)
    if draft:
        layers = len(draft[0].text.layers)
        ahead = sum(cells(draft[0], o, Stage(0, layers, layers))[:2])
        full += ahead
    pools, tokens = _pools(full, sliding, state, window, None if room is None else max(0, room))
    profile = Profile(defaults(o)[0], 1, ELEMENT_BYTES[o.dtype], o.tp, o.quant)
    return Plan(
        engine="sglang",
        standing=weights,
        loaded_bytes=loaded,
        activation_bytes=peak_bytes(a, profile, stage.first, stage.last),
        non_torch_bytes=CONTEXT_BYTES + (DISTRIBUTED_BYTES if o.tp * o.pp > 1 else 0),
        graph_bytes=graph_bytes(stage.last - stage.first, o),
        pools=pools,
        tokens=tokens,
        bytes_a_token=round(full + SLIDING_RATIO * sliding) if full else sliding,
        room_bytes=room,
    )


def cells(a: Architecture, o: Options, stage: Stage) -> tuple[int, int, int, int]:
    """Bytes of a token in the full layers and in the sliding ones, of a state in all recurrent ones; the window.

    Layers that read another's cache have one of their own here, and chunked layers keep all tokens.
    """
    conv, states = ELEMENT_BYTES[o.dtype], ELEMENT_BYTES[o.state_dtype or STATE_DTYPE]
    full = sliding = state = window = 0
    for layer in a.text.layers[stage.first : stage.last]:
        for mixer in attending(layer, shared=True):
            cache = attention_cache(mixer, o.cache_element_bytes, o.tp, windowed=True)
            one = cache.page_bytes // cache.block
            if isinstance(cache, WindowCache):
                sliding, window = sliding + one, cache.window
            else:
                full += one
        state += sum(state_cache(m, o.tp, conv, states, 1).own_bytes for m in recurrent(layer))
    return full, sliding, state, window


def _pools(full: int, sliding: int, state: int, window: int, room: int | None) -> tuple[tuple[Pool, ...], int | None]:
    """The pools that `room` is shared by, each with a spare page or slot, and the tokens of the first."""
    pools: list[Pool] = []
    if state:
        share = None if room is None else int(room * STATE_RATIO / (1 + STATE_RATIO)) if full or sliding else room
        slots = None if share is None else max(0, share // state - 1)
        pools.append(Pool("states", state, slots, lambda tokens: 1, f"{state:,} B a request", 1))
        room = room if room is None or slots is None else max(0, room - (slots + 1) * state)
    cell = full + SLIDING_RATIO * sliding if full else sliding
    tokens = None if room is None else int(room / cell) // PAGE * PAGE if cell else None
    if full:
        pools.insert(0, Pool("tokens", full, tokens, _all, f"{full:,} B a token", PAGE))
    if sliding:
        kept = tokens if tokens is None or not full else int(tokens * SLIDING_RATIO)
        needs: Callable[[int], int] = partial(_within, window)
        pools.append(Pool("sliding tokens", sliding, kept, needs, f"{sliding:,} B a token", PAGE))
    return tuple(pools), tokens


def _all(tokens: int) -> int:
    return tokens


def _within(window: int, tokens: int) -> int:
    return min(tokens, window + PAGE)
