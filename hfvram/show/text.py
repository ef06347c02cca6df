"""One answer for the eye: the model, what is live at the peak, the peaks, the rule of thumb, the verdict."""

from collections.abc import Iterator

from hfvram.answer.estimate import Estimate, ModelFacts, Recommended, Serving
from hfvram.errors import printable
from hfvram.request import Request
from hfvram.show.bar import COLOURS, bar
from hfvram.show.layout import Paint, columns, plain, shortened, size
from hfvram.units import short_count

PLACES = {"cpu": "in CPU memory", "nvme": "on NVMe", "disk": "on disk"}
MOST_NAMES = 8
"""Names of small items that are told."""
MOST_ITEMS = 9
SMALL = 0.001
"""Share of the peak below which an item is folded away."""


def text(estimate: Estimate, width: int, paint: Paint = plain, drawn: bool = False) -> str:
    """The answer in lines of at most `width` characters, with a bar where there are colours or it is asked for."""
    e = estimate
    blocks = [headline(e, width, paint), components(e, width), items(e, width, paint)]
    if drawn or paint is not plain:
        blocks.append(bar(e, width, paint))
    blocks += [totals(e, width, paint), placement(e, width), ranks(e, width)]
    blocks += [elsewhere(e, width), verdict(e, width, paint)]
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def headline(e: Estimate, width: int, paint: Paint) -> list[str]:
    """The model, its parameters, its shape, and the request, a line each."""
    m = e.model
    commit = f" @ {m.commit[:12]}" if m.commit else ""
    active = f" ({short_count(m.active_parameters)} active)" if m.active_parameters != m.parameters else ""
    facts = [
        *columns([(f"{m.architecture} ({m.model_type}), {m.dtype}, source: {m.source}",)], width, "<"),
        *columns([(f"{m.parameters:,} parameters{active}, from {m.parameters_from}",)], width, "<"),
        *columns([(", ".join(shape(m)),)], width, "<"),
        *columns([(", ".join(asked(e)),)], width, "<"),
    ]
    name = printable(m.id)
    if len(name) + len(commit) > width:
        name, commit = shortened(name, width), f"\n{commit.strip()}" if commit else ""
    return [paint(name, "bold") + commit, *facts]


def shape(m: ModelFacts) -> Iterator[str]:
    """Sizes of a model in words, those that apply."""
    kinds = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in m.layer_kinds.items())
    yield f"{m.layers} layers ({kinds})" if kinds else f"{m.layers} layers"
    yield f"hidden size {m.hidden_size:,}"
    if m.attention_heads:
        kv = f", {m.kv_heads} for keys and values" if m.kv_heads and m.kv_heads != m.attention_heads else ""
        yield f"{m.attention_heads} heads of {m.head_dim}{kv}"
    if m.experts:
        yield f"{m.experts} experts, {m.experts_per_token} a token"
    if m.state_size:
        yield f"state size {m.state_size}"


def asked(e: Estimate) -> Iterator[str]:
    """The request in words: its main options, and every other that is not the default."""
    new = f" ({e.request.new_tokens:,} new)" if e.request.phase == "generate" and e.request.new_tokens else ""
    tokens = "token" if e.request.ctx == 1 else "tokens"
    yield f"{e.request.mode} with {e.request.ctx or 0:,} {tokens} of context{new}, batch {e.request.batch:,}"
    told = {"mode", "ctx", "batch", "new_tokens", "gpu", "method", "max_ctx", "max_batch", "recommend"}
    expected = Request().to_dict() | {"phase": "generate", "quant": "none", "gpus": 1}
    expected |= {"dtype": e.model.dtype, "kv_dtype": e.request.dtype}
    for name, value in e.request.to_dict().items():
        if name not in told and value not in (expected[name], "auto", None):
            words = name.replace("_", " ")
            yield words if value is True else f"no {words}" if value is False else f"{words} {_value(value)}"
    yield f"method {e.method}"


def components(e: Estimate, width: int) -> list[str]:
    """A row for each part of a pipeline."""
    if not e.components:
        return []
    rows = [("component", "parameters", "weights", "peak", "")]
    for name, part in e.components:
        peak, count = size(part.peak_allocated_bytes), short_count(part.model.parameters)
        rows.append((name, count, size(part.weights_bytes), peak, part.model.architecture))
    return columns(rows, width, "<>>><")


def items(e: Estimate, width: int, paint: Paint) -> list[str]:
    """What is live at the peak, the largest first, small items folded into one line."""
    peak = e.peak_allocated_bytes or 1
    shown = sorted(e.items, key=lambda i: -i.bytes)[:MOST_ITEMS]
    shown = [i for i in shown if i.bytes >= SMALL * peak]
    folded = [i for i in e.items if i not in shown and i.bytes]
    rows = [(i.name, size(i.bytes), _share(i.bytes, peak), i.formula) for i in shown]
    if folded:
        rest = sum(i.bytes for i in folded)
        told = list(dict.fromkeys(i.name for i in folded))
        more = len(told) - MOST_NAMES
        names = ", ".join(told if more <= 1 else [*told[:MOST_NAMES], f"{more} more"])
        rows.append((f"{len(folded)} smaller", size(rest), _share(rest, peak), names))
    lines = columns(rows, width, "<>><")
    heading = f"Live at the peak ({e.peak_phase})" if e.peak_phase else "Live at the peak"
    colours = {i.name: COLOURS.get(i.category, "white") for i in shown}
    return [paint(heading, "bold"), *(_painted(line, colours, paint) for line in lines)]


def totals(e: Estimate, width: int, paint: Paint) -> list[str]:
    """The whole of weights and cache, the three peaks, the interval, the rule of thumb."""
    whole = {
        "weights": e.weights_bytes,
        "cache": e.cache_bytes,
        "gradients": e.gradients_bytes,
        "optimizer": e.optimizer_bytes,
        "activations": e.activations_bytes,
    }
    low, high = size(e.interval.low_bytes), size(e.interval.high_bytes)
    rows = [
        *((name, size(count), "") for name, count in whole.items() if count),
        *((name, size(count), note) for name, count, note in peaks(e)),
        ("on the device", size(e.device_bytes), f"with context and kernels; {low} to {high}: {e.interval.basis}"),
        ("rule of thumb", size(e.guide.bytes), e.guide.formula),
    ]
    rows[-2:-2] = served(e)
    return [_painted(line, {"on the device": "bold"}, paint) for line in columns(rows, width, "<><")]


def peaks(e: Estimate) -> list[tuple[str, int, str]]:
    """Allocated and reserved memory; llama.cpp allocates its buffers once and reserves no more."""
    if e.request.engine == "llama.cpp":
        return [("allocated", e.peak_allocated_bytes, "in llama.cpp's buffers, from the start")]
    reserved = "held by PyTorch's caching allocator"
    return [
        ("peak allocated", e.peak_allocated_bytes, "in live blocks"),
        ("peak reserved", e.peak_reserved_bytes, reserved),
    ]


def ranks(e: Estimate, width: int) -> list[str]:
    """A row for each kind of GPU, where they differ."""
    if len(e.ranks) < 2:
        return []
    rows = rank_rows(e)
    return columns([(*row, "") for row in rows], width, "<" + ">" * (len(rows[0]) - 1) + "<")


def placement(e: Estimate, width: int) -> list[str]:
    """Where the modules of a placed model are."""
    return columns(place_rows(e), width, "<><")


def place_rows(e: Estimate) -> list[tuple[str, str, str]]:
    """A table of devices, the weights on each, and which modules they are of."""
    rows = [(p.device, size(p.weights_bytes), p.modules) for p in e.placement]
    return [("placed on", "weights", "modules"), *rows] if rows else []


def rank_rows(e: Estimate) -> list[tuple[str, ...]]:
    """A table of the kinds of GPUs: those of their sums that are not nothing everywhere."""
    kinds = ("weights", "cache", "gradients", "optimizer", "activations")
    shown = [n for n in kinds if any(getattr(r, f"{n}_bytes") for r in e.ranks)]
    rows: list[tuple[str, ...]] = [("GPUs", "of them", *shown, "allocated", "device")]
    for r in e.ranks:
        sums = [getattr(r, f"{n}_bytes") for n in (*shown, "peak_allocated", "device")]
        rows.append((r.name, f"{r.gpus:,}", *map(size, sums)))
    return rows


def served(e: Estimate) -> list[tuple[str, str, str]]:
    """What a serving engine's cache is in rows."""
    if e.serving is None:
        return []
    return cells(e.serving) if e.request.engine == "llama.cpp" else pool(e.serving, e.request.ctx or 1)


def pool(s: Serving, ctx: int) -> list[tuple[str, str, str]]:
    """A serving engine's pool in rows: its bytes and tokens, what a token takes, how many requests it holds."""
    rows = [("cache a token", f"{s.kv_bytes_per_token:,} B", "as the engine counts its pool's tokens")]
    if s.state_bytes:
        slots = "" if s.state_slots is None else f"{s.state_slots:,} of them in the pool"
        rows.append(("state a request", size(s.state_bytes), slots))
    if s.waste_bytes:
        rows.append(("unused in blocks", size(s.waste_bytes), "of the cache: the last block of each request"))
    if s.kv_pool_bytes is not None:
        tokens = "" if s.kv_tokens is None else f"{s.kv_tokens:,} tokens as the engine prints it"
        rows.append(("pool", size(s.kv_pool_bytes), tokens))
    if s.max_concurrency is not None:
        rows.append(("concurrency", f"{s.max_concurrency:,.2f}", f"requests of {ctx:,} tokens at once"))
    return rows


def cells(s: Serving) -> list[tuple[str, str, str]]:
    """llama.cpp's caches in rows: a token's bytes in layers that see all or have a window, a sequence's state."""
    rows = []
    if s.kv_bytes_per_token:
        rows.append(("cache a token", f"{s.kv_bytes_per_token:,} B", f"{s.kv_tokens or 0:,} cells"))
    if s.sliding_bytes and s.block_bytes:
        rows.append(("within a window", f"{s.sliding_bytes:,} B", "a token more in the layers that have one"))
    if s.state_bytes:
        rows.append(("state a sequence", size(s.state_bytes), f"{s.state_slots or 0:,} of them"))
    return rows


def elsewhere(e: Estimate, width: int) -> list[str]:
    """What each GPU's process keeps elsewhere: the sum, and its items beneath."""
    lines: list[str] = []
    for place, count in placed(e):
        lines += columns([(place, size(count), process(e))], width, "<><")
        rows = [(i.name, size(i.bytes), i.formula) for i in e.offloaded if PLACES[i.place] == place]
        lines += columns(rows, width, "<><", indent=2)
    return lines


def placed(e: Estimate) -> list[tuple[str, int]]:
    """Places other than the GPU that hold something, and how much."""
    places = (("cpu", e.cpu_bytes), ("nvme", e.nvme_bytes), ("disk", e.disk_bytes))
    return [(PLACES[place], count) for place, count in places if count]


def process(e: Estimate) -> str:
    """Whose memory that is."""
    return "for the one process" if e.placement else "for each GPU's process"


def verdict(e: Estimate, width: int, paint: Paint) -> list[str]:
    """Whether it fits, by how much, the limits, and what would make it fit; GPUs that would run it, if asked."""
    lines: list[str] = []
    if f := e.fit:
        word, colour = ("fits", "green") if f.fits else ("does not fit", "red")
        first, *limits = judged(e)
        lines += [paint(word, colour) + first.removeprefix(word), *limits]
        if f.ways:
            lines.append("fits with:")
            lines += columns([(way.change, size(way.device_bytes), "") for way in f.ways], width, "<><", indent=2)
        elif not f.fits:
            lines.append("no single change, and no pair of changes, makes it fit")
    if e.recommended:
        lines.append("smallest GPUs that run it:")
        lines += columns([recommendation(r) for r in e.recommended], width, "<><", indent=2)
    return lines


def judged(e: Estimate) -> list[str]:
    """The verdict in a sentence, and what the limits are in another; nothing where no GPU is named."""
    if not (f := e.fit):
        return []
    room = f"{size(abs(f.headroom_bytes))} {'to spare' if f.fits else 'too much'}"
    taken = f"{size(e.device_bytes)} of {size(f.capacity_bytes)}"
    if e.serving and e.serving.kv_pool_bytes is not None:
        taken = f"the requests take {size(e.cache_bytes)} of a pool of {size(e.serving.kv_pool_bytes or 0)}"
    if e.placement and e.cpu_bytes + e.disk_bytes and f.headroom_bytes < f.capacity_bytes - e.device_bytes:
        room = f"and {size(-f.headroom_bytes)} of weights have no room on the GPUs"
    gpus = f"{len(e.ranks)} × {f.gpu}" if e.placement else f.gpu
    said = [f"{'fits' if f.fits else 'does not fit'} {gpus}: {taken}, {room}"]
    limits = [(n, v) for n, v in (("context", f.max_ctx), ("batch", f.max_batch)) if v is not None]
    most = [f"{n} {v:,}" if v else f"not even {n} 1" for n, v in limits]
    if any(v for _, v in limits):
        said.append(f"most that fits, all else as asked: {' or '.join(most)}")
    elif limits:
        said.append("not even one token fits")
    return said


def recommendation(r: Recommended) -> tuple[str, str, str]:
    """A recommended GPU, its memory, and how to ask for as many as it takes."""
    if r.gpus == 1:
        return r.gpu, size(r.capacity_bytes), r.options
    return f"{r.gpus} × {r.gpu}", size(r.capacity_bytes), f"each, {r.options}" if r.options else "each"


def _share(count: int, whole: int) -> str:
    return f"{100 * count / whole:.1f} %"


def _painted(line: str, colours: dict[str, str], paint: Paint) -> str:
    name = next((n for n in sorted(colours, key=len, reverse=True) if line.startswith(n + " ")), None)
    return paint(name, colours[name]) + line[len(name) :] if name else line


def _value(value: object) -> str:
    return (
        ", ".join(map(str, value))
        if isinstance(value, list)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )
