"""The figures of a model card: memory by context and quantization, what common GPUs hold, what fine-tuning takes.

Nothing in it changes from day to day or by where the model was read: the same model, the same version of hfvram, the
same figures.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hfvram.answer.estimate import Method
from hfvram.answer.fit import difference, largest_ctx, with_ctx
from hfvram.answer.gpus import Gpu, find_gpu
from hfvram.answer.question import Session, answer, taken
from hfvram.errors import HfvramError
from hfvram.model.identify import Model
from hfvram.read.names import LocalPath, parse_name
from hfvram.request import Request

CONTEXTS = (4096, 8192, 32768, 131072, 1 << 20)
MOST_CONTEXTS = 4
UNLIMITED = 131072
"""As far as a card goes where a model has no limit of its own."""
TRIED = 8192
"""The same where the model's own code has to run: some of it makes real tensors of tokens × tokens."""
GPUS = ("RTX 4060", "RTX 3060 12GB", "RTX 4080", "RTX 4090", "RTX 5090", "L40S", "H100 SXM 80GB", "H200")
"""A common GPU of each size, the smallest first."""
NODES = ((2, "H100 SXM 80GB"), (4, "H100 SXM 80GB"), (8, "H100 SXM 80GB"), (8, "H200"))
"""Where no single one is enough."""
MARGIN = 1.25
"""Generations of GPUs differ by less than this in what they take."""
WORTH = 0.95
"""Kinds of numbers in which more of the weights' bytes are left than this are not worth a row."""
TRAINED = 2048
"""Tokens of a sequence that is trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on the device at each of a card's contexts, in one kind of numbers."""

    numbers: str
    request: Request
    weights_bytes: int
    device_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Holds:
    """The longest context that `gpus` of a GPU hold, for each kind of numbers: 0 where not even one token fits,
    None where that isn't answered."""

    gpu: str
    gpus: int
    memory_bytes: int
    contexts: tuple[int | None, ...]
    and_larger: bool = False
    """Whether it holds all that the model can, as then every larger one does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What a way to fine-tune takes of one GPU, the first common GPU that has it, and the options that ask for it."""

    name: str
    device_bytes: int
    gpu: str | None
    gpus: int
    options: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a model card says of memory. Lengths up to `longest` were tried, of which `limit` is the model's own limit;
    where they aren't found `exactly`, only those of `contexts` were.
    """

    id: str
    on_hub: bool
    parameters: int
    active_parameters: int
    cached: bool
    """Whether what is run keeps a cache, so that a context has generated tokens."""
    contexts: tuple[int, ...]
    limit: int | None
    longest: int
    memory: tuple[Memory, ...]
    holds: tuple[Holds, ...]
    exactly: bool
    training: tuple[Training, ...]
    trained_ctx: int
    method: Method
    versions: Mapping[str, str]
    basis: str
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def card(name: str, *, token: str | None = None, offline: bool = False) -> Card:
    """The card of a model. Raises as `Session.estimate`."""
    session = Session()
    base = session.estimate(name, Request(), token=token, offline=offline)
    model = session.model(name, Request(), token=token, offline=offline)
    limit = model.architecture.max_positions
    longest = limit or (UNLIMITED if model.architecture.closed_form else TRIED)
    columns = contexts(longest)
    rows = list(_memory(model, columns))
    useless = [row.numbers for row in rows[1:] if row.weights_bytes > WORTH * rows[0].weights_bytes]
    rows = [row for row in rows if row.numbers not in useless]
    notes = [w for w in base.warnings if w not in model.checkpoint.warnings]
    if useless:
        notes.append(f"{' and '.join(useless)}: hardly less, as most of this model's weights stay as they are stored")
    adapter = model.checkpoint.adapter
    named = parse_name(name)
    return Card(
        id=folder_name(named.path) if isinstance(named, LocalPath) else adapter.id if adapter else base.model.id,
        on_hub=not isinstance(named, LocalPath),
        parameters=base.model.parameters,
        active_parameters=base.model.active_parameters,
        cached=base.request.phase == "generate",
        contexts=columns,
        limit=limit,
        longest=longest,
        memory=tuple(rows),
        holds=tuple(_holds(model, rows, columns, longest)),
        exactly=model.architecture.closed_form,
        training=tuple(_trainings(model, min(TRAINED, limit or TRAINED))),
        trained_ctx=min(TRAINED, limit or TRAINED),
        method=base.method,
        versions=base.versions,
        basis=base.interval.basis,
        notes=tuple(notes),
        warnings=base.warnings,
    )


def folder_name(path: str) -> str:
    """The name of a model's folder, without where on this machine it is."""
    whole = os.path.abspath(path)
    return os.path.basename(os.path.dirname(whole) if os.path.isfile(whole) else whole) or "model"


def contexts(limit: int | None) -> tuple[int, ...]:
    """Columns of a table up to a model's limit, which is one of them: at most four.

    >>> contexts(131072), contexts(40960), contexts(1024), contexts(None)
    ((4096, 8192, 32768, 131072), (4096, 8192, 32768, 40960), (1024,), (4096, 8192, 32768, 131072))
    """
    most = limit or UNLIMITED
    below = [n for n in CONTEXTS if n < most]
    return (*below[-MOST_CONTEXTS + 1 :], most) if len(below) < MOST_CONTEXTS else (below[0], *below[-2:], most)


def numbers(model: Model) -> Iterator[tuple[str, Request]]:
    """Kinds of numbers that a model can be loaded in, in words, and the request for each. As stored comes first."""
    stored, dtype = model.architecture.quantization, model.architecture.dtype
    yield f"{stored or dtype}, as stored", Request()
    if stored or model.components:
        return
    if dtype == "fp32":
        yield "bf16", Request(dtype="bf16")
    lower = "bf16" if dtype == "fp32" else "auto"
    yield "int8 (bitsandbytes)", Request(dtype=lower, quant="int8")
    yield "nf4, 4 bits (bitsandbytes)", Request(dtype=lower, quant="nf4")


def _memory(model: Model, columns: tuple[int, ...]) -> Iterator[Memory]:
    """A row for each kind of numbers that the model can have; what it can't is left out."""
    for words, request in numbers(model):
        try:
            found = [answer(model, with_ctx(request, ctx)) for ctx in columns]
        except HfvramError:
            if request == Request():
                raise
            continue
        device = tuple(e.device_bytes for e in found)
        yield Memory(numbers=words, request=request, weights_bytes=found[0].weights_bytes, device_bytes=device)


def _holds(model: Model, rows: list[Memory], columns: tuple[int, ...], longest: int) -> Iterator[Holds]:
    """What common GPUs hold, from the largest that holds nothing to the first that holds all; where the model as
    stored fits none of them, the fewest of the largest that hold it, each layer split over them."""
    formed = model.architecture.closed_form
    nothing: Holds | None = None
    for name in GPUS:
        gpu, _ = find_gpu(name)
        most: tuple[int | None, ...] = tuple(
            _longest(model, row, gpu, 1, longest) if formed else _widest(columns, row.device_bytes, gpu.memory_bytes)
            for row in rows
        )
        whole = all(n == longest for n in most)
        found = Holds(gpu=gpu.name, gpus=1, memory_bytes=gpu.memory_bytes, contexts=most, and_larger=whole)
        if not any(most):
            nothing = found
            continue
        if nothing:
            yield nothing
            nothing = None
        yield found
        if whole:
            return
    if nothing:
        yield nothing
    if most[0] or not formed or model.components:
        return
    for gpus, name in NODES:
        gpu, _ = find_gpu(name)
        if first := _longest(model, rows[0], gpu, gpus, longest):
            others = tuple(_longest(model, row, gpu, gpus, longest) for row in rows[1:])
            yield Holds(gpu=gpu.name, gpus=gpus, memory_bytes=gpu.memory_bytes, contexts=(first, *others))
            return


def _widest(columns: tuple[int, ...], device_bytes: tuple[int, ...], capacity: int) -> int:
    return max((ctx for ctx, count in zip(columns, device_bytes, strict=True) if count <= capacity), default=0)


def _longest(model: Model, row: Memory, gpu: Gpu, gpus: int, longest: int) -> int | None:
    """The longest context that fits, of which the model's limit is tried first; None where that isn't answered."""
    if row.weights_bytes > gpus * gpu.memory_bytes:
        return 0
    request = with_ctx(_on(row.request, gpu), longest)
    if gpus > 1:
        request = request.with_(gpus=gpus, tp=gpus)
    try:
        return largest_ctx(lambda r: taken(model, r), request, gpu.memory_bytes, longest)
    except HfvramError:  # numbers or a model that can't be split so
        return None


def _on(request: Request, gpu: Gpu) -> Request:
    return request.with_(compute_capability=gpu.capability)


def _trainings(model: Model, ctx: int) -> Iterator[Training]:
    """Ways to fine-tune that have a formula, with checkpointing, one sequence at a time."""
    shared = Request(mode="train", ctx=ctx, gradient_checkpointing=True, method="formula")
    ways = {"full": shared, "LoRA": shared.with_(mode="lora"), "QLoRA": shared.with_(mode="qlora")}
    for name, request in ways.items():
        try:
            found = answer(model, request)
            gpu, gpus = _first(model, request, found.device_bytes, found.weights_bytes)
        except HfvramError:
            continue
        options = difference(Request(method="formula"), request)
        yield Training(name=name, device_bytes=found.device_bytes, gpu=gpu, gpus=gpus, options=options)


def _first(model: Model, request: Request, device_bytes: int, weights_bytes: int) -> tuple[str | None, int]:
    """The smallest common GPU that holds a training, else the fewest of the largest that do, sharded."""
    for name in GPUS:
        gpu, _ = find_gpu(name)
        near = device_bytes < MARGIN * gpu.memory_bytes
        if near and taken(model, _on(request, gpu)) <= gpu.memory_bytes:
            return gpu.name, 1
    for gpus, name in NODES:
        gpu, _ = find_gpu(name)
        shared = _on(request, gpu).with_(gpus=gpus, fsdp="full_shard")
        if weights_bytes < gpus * gpu.memory_bytes and taken(model, shared) <= gpu.memory_bytes:
            return gpu.name, gpus
    return None, 1
