"""Does it fit, what is the most that would, and what would make it fit: each the real estimate, run again."""

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import combinations
from math import log2

from hfvram.answer.estimate import Fit, Way
from hfvram.answer.gpus import Gpu
from hfvram.answer.placing import is_placed
from hfvram.answer.supported import by_code
from hfvram.errors import HfvramError
from hfvram.request import Request

DeviceBytes = Callable[[Request], int]
"""Bytes that a request takes on the fullest GPU; HfvramError where the request makes no sense for the model."""

LIMIT = 10**9
"""No context and no batch is searched beyond it."""
LEAST_CTX = 256
"""A context below this (or below the one asked) is not proposed as a way to make a model fit."""
MOST_WAYS = 6
MOST_RUNS = 8
"""Of a model's own code in search of ways to run it: each takes seconds, so the mildest changes come first."""
MOST_FORMED = 32
"""Of a training by formula, each of which takes tenths of a second."""
MOST_TRIPLES = 24
"""Three changes at once, where no two are enough."""
Change = Callable[[Request], Request]


def judge(device_bytes: DeviceBytes, request: Request, gpu: Gpu, *, max_positions: int | None = None) -> Fit:
    """Whether `request`, whose `ctx` is known, fits `gpu`, and the limits: with all else as asked, `max_ctx` is the
    largest context that fits, up to the model's own limit `max_positions` (or to `ctx` if that is beyond it), and
    `max_batch` the largest batch; 0 where not even one fits; where each step of the search takes seconds (training, and
    caches that only the exact engine knows), only if asked for. When it does not fit, `ways` says what would make it.
    """
    if request.ctx is None:
        raise ValueError("judge needs a request whose ctx is resolved")
    seen: dict[Request, int] = {}

    def measured(r: Request) -> int:
        if r not in seen:
            seen[r] = device_bytes(r)
        return seen[r]

    needed, capacity = measured(request), gpu.memory_bytes
    longest = max(request.ctx, max_positions) if max_positions else LIMIT
    fits = needed <= capacity
    searched = not by_code(request)
    return Fit(
        gpu=gpu.name,
        capacity_bytes=capacity,
        fits=fits,
        headroom_bytes=capacity - needed,
        max_ctx=largest_ctx(measured, request, capacity, longest) if searched or request.max_ctx else None,
        max_batch=largest_batch(measured, request, capacity) if searched or request.max_batch else None,
        ways=() if fits else ways(measured, request, capacity),
    )


def largest_ctx(device_bytes: DeviceBytes, request: Request, capacity: int, most: int) -> int:
    """The largest context up to `most` tokens that takes at most `capacity` bytes; 0 where none does."""
    return largest(lambda n: device_bytes(with_ctx(request, n)), capacity, request.ctx or 1, most)


def largest_batch(device_bytes: DeviceBytes, request: Request, capacity: int, most: int = LIMIT) -> int:
    """The largest batch up to `most` that takes at most `capacity` bytes; 0 where none does."""
    return largest(lambda n: device_bytes(request.with_(batch=n)), capacity, request.batch, most)


def with_ctx(request: Request, ctx: int) -> Request:
    """The request at another context, with fewer new tokens where they would not fit in it."""
    new = request.new_tokens
    return request.with_(ctx=ctx, new_tokens=new if new is None or new < ctx else ctx - 1 or None)


def largest(taken: Callable[[int], int], capacity: int, start: int, most: int) -> int:
    """The n in 1…most for which n fits and n + 1 does not, searched from `start`; 0 where 1 does not fit.

    `taken` grows with n, nearly in a straight line: a guess on the line through the two ends and a bisection take
    turns, so that a few evaluations do. Exact: both n and n + 1 have been evaluated. (What the allocator reserves may
    drop again further on, where sizes happen to match its segments; such an island is not looked for.)

    >>> largest(lambda n: 1000 + 7 * n, 10_000, start=64, most=10**9)
    1285
    """
    low, high, at = 0, most + 1, {}
    probe = min(start, most)
    while high - low > 1:
        at[probe] = taken(probe)
        low, high = (probe, high) if at[probe] <= capacity else (low, probe)
        if high > most:
            probe = min(most, low * 4)
        elif low == 0:
            probe = 1
        elif len(at) % 3:
            probe = low + (capacity - at[low]) * (high - low) // max(1, at[high] - at[low])
        else:
            probe = (low + high) // 2
        probe = min(max(probe, low + 1), high - 1)
    return low


def ways(device_bytes: DeviceBytes, request: Request, capacity: int) -> tuple[Way, ...]:
    """Changes, and pairs of changes where neither alone is enough, with which `request` fits; the mildest first. Where
    no pair of a training by formula is enough, three of them that promise to be."""
    stepwise = by_code(request) or request.mode != "inference"
    singles = fixed_changes(request) if stepwise else changes(device_bytes, request, capacity)
    runs = MOST_RUNS if by_code(request) else MOST_FORMED
    tried: list[tuple[Change, ...]] = [(change,) for change in singles]
    tried += combinations(singles, 2)
    if stepwise:
        tried.sort(key=lambda parts: cost(request, _with(request, parts)))
    enough: set[Change] = set()
    found: dict[Request, int] = {}
    seen: dict[Request, int] = {}

    def attempt(parts: tuple[Change, ...]) -> None:
        try:
            changed = _with(request, parts)
        except HfvramError:  # a search of one that makes no sense for the model
            return
        if changed in seen:
            return
        try:
            seen[changed] = device_bytes(changed)
        except HfvramError:
            seen[changed] = 1 << 62
        if seen[changed] <= capacity:
            found[changed] = seen[changed]
            if len(parts) == 1:
                enough.update(parts)

    for change in singles if stepwise and not by_code(request) else ():
        attempt((change,))
    for parts in tried:
        if not enough.intersection(parts) and not (stepwise and len(seen) == runs):
            attempt(parts)
    if stepwise and not found and not by_code(request):
        for parts in promising(device_bytes(request), capacity, singles, seen, request):
            attempt(parts)
    mildest = sorted(found, key=lambda changed: cost(request, changed))
    fewer = {x.with_(gpus=None): x for x in reversed(mildest)}  # the same on more GPUs says nothing new
    mildest = [x for x in mildest if fewer[x.with_(gpus=None)] == x]
    return tuple(Way(change=difference(request, x), device_bytes=found[x]) for x in mildest[:MOST_WAYS])


def promising(
    needed: int, capacity: int, singles: Sequence[Change], seen: dict[Request, int], request: Request
) -> list[tuple[Change, ...]]:
    """Three changes that would be enough if each saved what it saves alone, the mildest first."""
    saved = {change: needed - seen.get(_with(request, (change,)), needed) for change in singles}
    three: list[tuple[Change, ...]] = [
        x for x in combinations(singles, 3) if needed - sum(saved[change] for change in x) <= capacity
    ]
    found = {_with(request, x): x for x in three}
    return [found[x] for x in sorted(found.keys() - seen.keys(), key=lambda x: cost(request, x))][:MOST_TRIPLES]


def _with(request: Request, parts: tuple[Change, ...]) -> Request:
    return reduce(lambda r, change: change(r), parts, request)


def fixed_changes(request: Request) -> list[Change]:
    """What could be changed about a request of which every run takes seconds, each by a fixed step, not by a search."""
    found: list[Change] = []
    if request.mode == "inference" and request.quant in ("auto", "none"):
        found += [lambda r: r.with_(quant="int8"), lambda r: r.with_(quant="nf4")]
    if request.mode != "inference" and not request.gradient_checkpointing:
        found.append(lambda r: r.with_(gradient_checkpointing=True))
    if request.checkpoint_every > 1:
        found.append(lambda r: r.with_(checkpoint_every=1))
    if request.mode == "train" and request.optimizer.startswith("adamw_torch"):
        found.append(lambda r: r.with_(optimizer="adamw_8bit"))
    if request.batch > 1:
        found.append(lambda r: r.with_(batch=max(1, r.batch // 4)))
    if request.mode == "train":
        found.append(lambda r: r.with_(mode="lora", optimizer=request.optimizer))
    if request.mode in ("train", "lora") and request.quant in ("auto", "none"):
        found.append(lambda r: r.with_(mode="qlora", optimizer=request.optimizer))
    if (request.ctx or 0) > LEAST_CTX:
        found.append(lambda r: with_ctx(r, max(LEAST_CTX, (r.ctx or 0) // 4)))
    return found + (shared(request) if request.mode != "inference" else [])


def shared(request: Request) -> list[Change]:
    """Ways to share a training: sharded over the GPUs that there are, over more of them, and in CPU memory; what is
    DeepSpeed's the exact engine can't run."""
    gpus, sharded = request.gpus or 1, request.fsdp or request.zero
    formed = not by_code(request)
    found: list[Change] = []
    if gpus > 1 and not sharded:
        found.append(lambda r: r.with_(fsdp="full_shard"))
    if formed and gpus > 1 and not request.fsdp:
        found += [lambda r, stage=stage: r.with_(zero=stage) for stage in range(1, 4) if stage > (request.zero or 0)]  # type: ignore[misc]
    if formed and request.tp == 1 and not request.offload:
        found += [lambda r, n=n: split(r, n, gpus) for n in (2, 4, 8) if gpus % n == 0]  # type: ignore[misc]
    for times in (2, 4, 8):
        if sharded:
            found.append(lambda r, times=times: r.with_(gpus=times * (r.gpus or 1)))  # type: ignore[misc]
        else:
            found.append(lambda r, times=times: r.with_(gpus=times * (r.gpus or 1), fsdp="full_shard"))  # type: ignore[misc]
    what = "params" if request.fsdp else "optimizer"
    if formed and sharded and not {what, f"{what}=nvme"} & set(request.offload):
        found.append(lambda r: r.with_(offload=(*r.offload, what)))
    if formed and request.zero == 3 and not {"params", "params=nvme"} & set(request.offload):
        found.append(lambda r: r.with_(offload=tuple(dict.fromkeys((*r.offload, "optimizer", "params")))))
    return found


def split(request: Request, tp: int, gpus: int) -> Request:
    """Each layer over `tp` of the GPUs; over what is left a training is sharded."""
    return request.with_(tp=tp, gpus=gpus, zero=None, fsdp=(request.fsdp or "full_shard") if gpus > tp else None)


def changes(device_bytes: DeviceBytes, request: Request, capacity: int) -> list[Change]:
    """What could be changed about `request`, in the order in which changes are combined.

    A new kind of change is an entry here and its price in `cost`.
    """
    found: list[Change] = []
    if request.kernels == "fallback":
        found.append(lambda r: r.with_(kernels="fused"))
    if request.attention == "eager":
        found.append(lambda r: r.with_(attention="sdpa"))
    if request.dtype == "fp32":
        found.append(lambda r: r.with_(dtype="bf16"))
    if request.quant in ("auto", "none"):
        found.append(lambda r: r.with_(quant="int8"))
    if request.quant in ("auto", "none", "int8", "fp8"):
        found.append(lambda r: r.with_(quant="nf4"))
    if not request.offload and request.tp == 1:
        found += [lambda r: r.with_(offload=("experts",)), lambda r: r.with_(offload=("layers",))]
    if (request.gpus or 1) > 1 and request.tp == 1 and not request.offload:
        found.append(lambda r: r.with_(tp=request.gpus or 1))
    if is_placed(request):
        found += [lambda r, times=times: r.with_(gpus=times * (request.gpus or 1)) for times in (2, 4)]  # type: ignore[misc]
    if request.batch > 1:
        found.append(lambda r: r.with_(batch=max(1, largest_batch(device_bytes, r, capacity, r.batch))))
    if (request.ctx or 0) > LEAST_CTX:
        found.append(lambda r: with_ctx(r, max(LEAST_CTX, largest_ctx(device_bytes, r, capacity, r.ctx or LEAST_CTX))))
    return found


def cost(asked: Request, changed: Request) -> float:
    """What a change takes away: 1 for 8 bits or half of the context, half of that where it only takes time."""
    price = log2((asked.ctx or 1) / (changed.ctx or 1)) + log2(asked.batch / changed.batch) / 2
    if asked.quant != changed.quant:
        price += {"int8": 1.0, "nf4": 1.5}[changed.quant]
    if asked.mode != changed.mode:
        price += {"lora": 1.0, "qlora": 1.5}[changed.mode]
    price += log2((changed.gpus or 1) / (asked.gpus or 1))
    price += 0.2 * ((asked.fsdp, asked.zero) != (changed.fsdp, changed.zero)) + 0.1 * (changed.zero or 0)
    price += sum({"experts": 2.0, "layers": 4.0}.get(what, 0.8) for what in set(changed.offload) - set(asked.offload))
    price += 0.4 * log2(changed.tp / asked.tp)
    price += 0.3 * (asked.gradient_checkpointing != changed.gradient_checkpointing)
    price += 0.2 * (asked.checkpoint_every != changed.checkpoint_every)
    return price + 0.4 * (asked.optimizer != changed.optimizer) + 0.5 * (asked.dtype != changed.dtype)


def difference(asked: Request, changed: Request) -> str:
    """The options that differ, as the command line has them.

    >>> difference(Request(ctx=8192), Request(ctx=4096, quant="int8"))
    '--ctx 4096 --quant int8'
    >>> difference(Request(mode="train"), Request(mode="lora", gradient_checkpointing=True))
    '--mode lora --gradient-checkpointing'
    >>> difference(Request(zero=3), Request(zero=None, tp=2))
    '--tp 2, no --zero'
    """
    before, after = asked.to_dict(), changed.to_dict()
    changes = {f"--{name.replace('_', '-')}": value for name, value in after.items() if value != before[name]}
    words = {k: ",".join(v) if isinstance(v, list) else v for k, v in changes.items() if v is not None}
    given = " ".join(option if value is True else f"{option} {value}" for option, value in words.items())
    return ", ".join([*filter(None, [given]), *(f"no {k}" for k, v in changes.items() if v is None)])
