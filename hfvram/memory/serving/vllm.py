"""vLLM's plan: KV = utilization·total − weights − activation peak − non-torch, in blocks of equal pages.

Source: vLLM 0.19.0, v1/worker/gpu_worker.py (determine_available_memory), engine/arg_utils.py, config/vllm.py,
v1/core/kv_cache_utils.py. In 0.19 CUDA graphs come on top of the utilization asked for.
"""

from dataclasses import replace

from hfvram.memory.allocator import stand
from hfvram.memory.forward import ELEMENT_BYTES
from hfvram.memory.serving.activations import Profile, peak_bytes
from hfvram.memory.serving.groups import Groups, beside_states, grouped
from hfvram.memory.serving.layers import attending, attention_cache, recurrent, state_cache
from hfvram.memory.serving.options import Options
from hfvram.memory.serving.plan import Plan, Pool
from hfvram.memory.serving.specs import Cache, StateCache
from hfvram.memory.serving.weights import Draft, Stage, stages, standing, with_draft
from hfvram.model.architecture import Architecture
from hfvram.model.rope import RopeTable
from hfvram.units import GiB

UTILIZATION = 0.9
"""--gpu-memory-utilization by default (config/cache.py)."""
LARGEST_GRAPH = 512
NON_TORCH_BYTES = {"one": GiB // 4, "tensor parallel": 21 * GiB // 10, "pipeline": 7 * GiB // 100}
"""What the process gains beside PyTorch's allocator while profiling: 0.24 to 0.27 GiB on one GPU, 2.06 to 2.21 with
tensor parallelism (NCCL, custom all-reduce), 0.07 in a pipeline. Calibrated: vLLM 0.19 on H100 (fixtures/published)."""


def sequences(o: Options) -> int:
    """--max-num-seqs: 1024 on GPUs of 70 GiB and more, else 256 (engine/arg_utils.py, get_batch_defaults)."""
    return o.max_num_seqs or (1024 if o.large else 256)


def batched_tokens(o: Options) -> int:
    """--max-num-batched-tokens of `vllm serve`: 8192 or 2048, never more than all sequences at full length."""
    return o.max_num_batched_tokens or min(8192 if o.large else 2048, sequences(o) * o.ctx)


def graph_bytes(layers: int, o: Options) -> int:
    """CUDA graphs: (0.38 + 0.016·L) GiB for 51 batch sizes up to 512, less with fewer of them.

    Calibrated on the 34 runs of vLLM 0.19 in fixtures/published (0.51 to 1.61 GiB): within 0.4 GiB.
    """
    largest = min(2 * sequences(o), LARGEST_GRAPH)
    count = len([n for n in (1, 2, 4) if n <= largest]) + len(range(8, min(largest, 255) + 1, 8))
    count += len(range(256, largest + 1, 16))
    return 0 if o.enforce_eager else int((0.38 + 0.016 * layers) * GiB * count / 51)


def caches(a: Architecture, o: Options) -> list[tuple[int, Cache]]:
    """The cache of every layer that has one; beside recurrent layers, attention's blocks are as long as their pages."""
    conv = ELEMENT_BYTES[o.dtype]
    state = ELEMENT_BYTES[o.state_dtype] if o.state_dtype else conv
    found: list[tuple[int, Cache]] = []
    for i, layer in enumerate(a.text.layers):
        states = [state_cache(m, o.tp, conv, state, o.ctx) for m in recurrent(layer)]
        found += [(i, attention_cache(m, o.cache_element_bytes, o.tp, windowed=True)) for m in attending(layer)]
        found += [(i, s) for s in states]
    return _paired(found)


def _paired(found: list[tuple[int, Cache]]) -> list[tuple[int, Cache]]:
    tokens = [c for _, c in found if not isinstance(c, StateCache)]
    states = [c for _, c in found if isinstance(c, StateCache)]
    if not tokens or not states:
        return found
    widest = max(states, key=lambda s: s.own_bytes)
    grown = {t: beside_states(t, widest)[0] for t in dict.fromkeys(tokens)}
    page = max(t.page_bytes for t in grown.values())
    return [(i, replace(c, padded_bytes=page) if isinstance(c, StateCache) else grown[c]) for i, c in found]


def plan(a: Architecture, o: Options, rope: tuple[RopeTable, ...], draft: Draft | None = None) -> Plan:
    """The plan of the stage with the fewest blocks. Raises `usage` for what vLLM can't split or group.

    A draft model's layers are grouped with the model's own, and stand on the last stage.
    """
    layers = len(a.text.layers)
    groups = grouped(caches(with_layers(a, draft[0]) if draft else a, o))
    parts = [_stage(a, o, rope, groups, stage, draft if stage.heads else None) for stage in stages(layers, o.pp)]
    if o.gpu_bytes is None:
        return max(parts, key=lambda p: p.loaded_bytes)
    return min(parts, key=lambda p: p.pools[0].units if p.pools and p.pools[0].units is not None else p.room_bytes or 0)


def with_layers(a: Architecture, draft: Architecture) -> Architecture:
    """The model with a draft's layers behind its own."""
    stack = replace(a.text, layers=a.text.layers + draft.text.layers)
    return replace(a, stacks=tuple(stack if s.name == a.main else s for s in a.stacks))


def _stage(
    a: Architecture, o: Options, rope: tuple[RopeTable, ...], groups: Groups, stage: Stage, draft: Draft | None
) -> Plan:
    weights = with_draft(standing(a, o.dtype, o.quant, o.tp, stage, rope, o.pp, o.ep), draft, o.dtype, o.tp, o.ep)
    loaded = stand(weights).allocated
    profile = Profile(batched_tokens(o), sequences(o), ELEMENT_BYTES[o.dtype], o.tp, o.quant)
    activations = peak_bytes(a, profile, stage.first, stage.last)
    kind = "tensor parallel" if o.tp > 1 else "pipeline" if o.pp > 1 else "one"
    outside = NON_TORCH_BYTES[kind]
    room = None
    if o.gpu_bytes is not None:
        requested = int(o.gpu_bytes * (o.utilization or UTILIZATION))
        room = requested - loaded - activations - outside
    row = groups.row_bytes(stage.first, None if stage.heads else stage.last)
    count, step = len(groups.groups), profile.tokens
    units = None if room is None else max(0, room) // row if row else 0
    slots = f"{row:,} B a block of {groups.block:,} tokens" if count else ""
    pool = Pool(
        name="blocks",
        unit_bytes=row,
        units=units,
        needs=lambda tokens: groups.blocks(tokens, step),
        formula=slots,
        wastes=lambda tokens: groups.waste(tokens, step),
    )
    return Plan(
        engine="vllm",
        standing=weights,
        loaded_bytes=loaded,
        activation_bytes=activations,
        non_torch_bytes=outside,
        graph_bytes=graph_bytes(stage.last - stage.first, o),
        pools=(pool,) if row else (),
        tokens=None if units is None or not row else groups.tokens(units),
        bytes_a_token=round(row * count / groups.block) if count else 0,
        room_bytes=room,
    )
