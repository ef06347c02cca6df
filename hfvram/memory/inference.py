"""Inference by formula: the timeline of `generate` (prefill, then decoding), of a prefill alone, or of an encoder.

The layers' own allocations are in `attention`, `feed_forward` and their neighbours; here they stand in the order in
which transformers runs them. Source: transformers 5.17, generation/utils.py and models/llama/modeling_llama.py; every
kind of layer is held against the model's own code on the meta device.
"""

from dataclasses import replace

from hfvram.memory.allocator import GRAPHS
from hfvram.memory.attention import implementation, needs_mask, stored_tokens
from hfvram.memory.blocks import HIDDEN, normalize
from hfvram.memory.compressed import window
from hfvram.memory.forward import Forward
from hfvram.memory.hybrid import hybrid, is_hybrid, keeps_embedding, scales_embedding
from hfvram.memory.mixers import feed, grow_cache, mix
from hfvram.memory.offload import BROUGHT_LAYER, HOOKS, brought_layer
from hfvram.memory.packed_cache import AWAY, RESIDUAL, LayerCache, chain
from hfvram.memory.repetition import Pattern, pattern, repeat
from hfvram.memory.streams import STREAMS, collapse, streams_layer
from hfvram.memory.timeline import Tag, Timeline
from hfvram.memory.workspaces import workspaces
from hfvram.model.architecture import Architecture, Stack
from hfvram.model.layers import (
    Attention,
    CompressedAttention,
    FeedForward,
    LatentAttention,
    Layer,
    Mixer,
    MixtureOfExperts,
)

GENERATE = "transformers 5.17: generation/utils.py"
IDS = Tag("token ids, mask and positions", "inputs", "b·s·8", GENERATE)
ANGLES = Tag("rotary angles", "activations", "b·s·d·e", "transformers 5.17: LlamaRotaryEmbedding.forward")
MASK = Tag("attention mask", "activations", "b·s·t", "transformers 5.17: masking_utils.py")
IMAGE = Tag("images", "inputs", "b·c·height·width·e", GENERATE)
LOGITS = Tag("logits", "activations", "b·V·e", GENERATE)
RECEIVED = Tag("hidden states from another GPU", "activations", "b·s·h·e", HOOKS)


def generate(t: Timeline, architecture: Architecture, f: Forward, new_tokens: int) -> None:
    """Prefill of `f.tokens` tokens a sequence, then `new_tokens` − 1 steps of one token each.

    Of the steps, the first and the last are written: between them the cache only grows.
    """
    prompt, steps = f.tokens, new_tokens - 1
    f = replace(f, use_cache=architecture.generates_cache)
    caches = prefill(t, architecture, f)
    if not f.use_cache:
        t.mark("decode")
        forward(t, architecture, replace(f, tokens=prompt + steps, decoding=steps > 0), caches)
        return
    t.mark("decode")
    first = len(t.sizes)
    written = {1, steps}
    if f.cache == "quantized":
        written.add(steps // RESIDUAL * RESIDUAL)  # the last time that all is packed anew
    f = replace(f, prompt=prompt)
    for step in sorted(step for step in written if 1 <= step <= steps):
        forward(t, architecture, replace(f, tokens=1, past=prompt + step - 1, decoding=True), caches)
    if f.static_length and f.quant not in ("nf4", "fp4", "int8"):  # compiled: CUDA graphs have a pool of their own
        t.streams.update(dict.fromkeys(range(first, len(t.sizes)), GRAPHS))
    _count_cache(t, caches)


def prefill(t: Timeline, architecture: Architecture, f: Forward) -> list[list[int]]:
    """One pass over `f.tokens` tokens a sequence that fills the cache. Returns each layer's handles of it."""
    count = len(architecture.text.layers)
    caches: list[list[int]] = chain(count) if f.cache == "offloaded" else [[] for _ in range(count)]
    t.symbols = symbols(architecture, f)
    t.mark("prefill")
    t.alloc(3 * f.batch * f.tokens * 8, IDS)
    workspaces(t, f, architecture, architecture.text)
    forward(t, architecture, f, caches)
    _count_cache(t, caches)
    return caches


def encode(t: Timeline, architecture: Architecture, f: Forward) -> None:
    """One pass of a model: hidden states, or logits of every token, come out; a decoder fills a cache all the same."""
    own = architecture.text
    f = replace(f, use_cache=architecture.generates_cache, tokens=own.tokens or f.tokens if own.pixels else f.tokens)
    t.symbols = symbols(architecture, f)
    t.mark("encode")
    if not own.pixels:
        t.alloc(f.batch * f.tokens * 8, IDS)
    looking = [stack for stack in architecture.stacks if stack.pixels] if architecture.task == "encoder" else []
    for stack in looking:
        t.alloc(f.batch * stack.pixels * f.element_bytes, IMAGE)
    workspaces(t, f, architecture, own, *looking)
    for stack in looking:
        if stack is not own:
            _look(t, replace(f, tokens=stack.tokens or f.tokens), stack)
    forward(t, architecture, f, [[] for _ in architecture.text.layers])


def _look(t: Timeline, f: Forward, stack: Stack) -> None:
    """The tower of images beside the one of text: what comes out of it is one vector an image."""
    embedded = hidden = t.alloc(f.bytes(stack.hidden_size), HIDDEN)
    for layer in stack.layers:
        out = run_layer(t, f, layer, hidden, [])
        t.free(*[] if hidden == embedded else [hidden])
        hidden = out
    t.free(embedded, hidden)


def _count_cache(t: Timeline, caches: list[list[int]]) -> None:
    away = sum(sum(cache.away) for cache in caches if isinstance(cache, LayerCache))
    t.cache_bytes = away or sum(t.sizes[handle] for cache in caches for handle in cache)
    here = sum(t.sizes[handle] for cache in caches for handle in cache if isinstance(cache, LayerCache))
    t.elsewhere = [x for x in t.elsewhere if x[1] is not AWAY] + ([("cpu", AWAY, away - here)] if away else [])


def forward(t: Timeline, architecture: Architecture, f: Forward, caches: list[list[int]]) -> None:
    """One pass through the main stack, up to the logits of the last token.

    Of layers of one shape the first two are written whole, the others by their pattern; while decoding, they only grow
    their caches.
    """
    stack = architecture.text
    tables_away = f.stage.tables_away_bytes if f.stage else 0
    if f.stage and f.stage.receives:
        t.moment(BROUGHT_LAYER, *[tables_away] * bool(tables_away))
        held, kept = list[int](), set[int]()
        embedded = t.alloc(_stream_bytes(f, stack), RECEIVED)
    else:
        brought = [t.alloc(tables_away, BROUGHT_LAYER)] if tables_away else []
        unscaled = [t.alloc(f.bytes(stack.hidden_size), HIDDEN)] if scales_embedding(stack.layers) else []
        held, embedded = _embed(t, f, architecture)
        t.free(*unscaled, *brought)
        kept = set(held)
        held += _per_layer_inputs(t, f, stack)
    if keeps_embedding(stack.layers):
        held.append(t.alloc(f.bytes(stack.hidden_size), HIDDEN))
    held += [*_angles(t, f, stack.layers), *_masks(t, f, stack.layers)]
    hidden = embedded
    written: dict[int, Pattern | None] = {}
    returned: list[int] = []
    for layer, cache in zip(stack.layers, caches, strict=True):
        if not f.source and layer.mixers and all(m.kind == "cross_attention" for m in layer.mixers):
            continue  # without an image, Llama 3.2 Vision leaves these layers out
        if f.past and id(layer) in written:
            grow_cache(t, f, layer, cache)
            continue
        left: list[int] = []
        if known := written.get(id(layer)):
            out = repeat(t, known, cache, left)
        else:
            start = len(t.events)
            brought = [*brought_layer(t, f, layer)]
            out = run_layer(t, f, layer, hidden, cache, left)
            t.free(*brought)
            again = id(layer) in written and not f.past
            known_away = isinstance(cache, LayerCache)  # where each layer fetches the next, none is like another
            written[id(layer)] = pattern(t, start, cache, out, left) if again and not known_away else None
        t.free(*returned)
        returned = left
        if hidden not in kept:
            t.free(hidden)
        hidden = out
    held += returned
    if stack.layers and stack.layers[-1].streams > 1 and (not f.stage or f.stage.ends):
        one = collapse(t, f, stack.hidden_size, stack.layers[-1].streams)
        t.free(hidden)
        hidden = one
    if architecture.final_norm:
        stream = replace(f, dtype="fp32") if t.sizes[hidden] > f.bytes(stack.hidden_size) else f
        normed = normalize(t, stream, stack.hidden_size, architecture.final_norm)
        t.free(hidden)
        hidden = normed
    t.free(*held)
    if architecture.task == "encoder":
        _classify(t, f, architecture)
    if architecture.task != "encoder":
        _logits(t, f, architecture)
    t.free(hidden)


def _logits(t: Timeline, f: Forward, architecture: Architecture) -> None:
    """Logits, and the last token's in fp32 for the choice of the next; of several GPUs they come back to the first."""
    stage = f.stage
    if not architecture.generates and not (stage and stage.generates and stage.first):
        return
    rows = f.rows if architecture.logits_of_all_tokens else f.batch
    nbytes = rows * architecture.vocab_size * f.element_bytes
    away = stage.head_away_bytes if stage else 0
    brought = [t.alloc(away, BROUGHT_LAYER)] if away else []
    logits = t.alloc(nbytes, LOGITS)
    t.free(*brought)
    last = [t.alloc(f.batch * architecture.vocab_size * 4, LOGITS)] if not stage or stage.first else []
    if architecture.logits_softcap and architecture.generates:
        t.moment(LOGITS, nbytes)
    t.free(logits, *last)


def _stream_bytes(f: Forward, stack: Stack) -> int:
    """Hidden states as one layer hands them to the next."""
    layer = stack.layers[0] if stack.layers else None
    wide = layer is not None and layer.residual_fp32 and f.half
    nbytes = f.fp32_bytes(stack.hidden_size) if wide else f.bytes(stack.hidden_size)
    return nbytes * (layer.streams if layer else 1)


def _embed(t: Timeline, f: Forward, architecture: Architecture) -> tuple[list[int], int]:
    """What stays of the embeddings to the end of the pass, and the first hidden states.

    A decoder holds the tokens' embeddings and those of their positions, an encoder their sum alone.
    """
    stack = architecture.text
    nbytes = f.bytes(stack.hidden_size)
    tables = sum(p.kind == "embedding" and p.shape[-1] == stack.hidden_size for p in stack.before)
    normed = any(p.kind == "norm" and p.shape == (stack.hidden_size,) for p in stack.before)
    if stack.layers and stack.layers[0].streams > 1:
        return [t.alloc(nbytes, HIDDEN)], t.alloc(nbytes * stack.layers[0].streams, STREAMS)
    if architecture.task == "encoder" or (tables < 2 and not normed):
        embedded = t.alloc(nbytes, HIDDEN)
        return [embedded], embedded
    held = [t.alloc(nbytes, HIDDEN) for _ in range(tables)]
    return held, t.alloc(nbytes, HIDDEN)


def _per_layer_inputs(t: Timeline, f: Forward, stack: Stack) -> list[int]:
    """Gemma-4's second embedding, one row for each layer, and its sum with a projection of the first one, both held."""
    around = (*stack.before, *stack.after)
    table = next((p for p in around if p.kind == "embedding" and "per_layer" in p.name), None)
    if table is None:
        return []
    nbytes = f.bytes(table.shape[1])
    looked_up, projected = t.alloc(nbytes, HIDDEN), t.alloc(nbytes, HIDDEN)
    normed = normalize(t, f, table.shape[1], "rms")
    t.free(projected)
    total, scaled = t.alloc(nbytes, HIDDEN), t.alloc(nbytes, HIDDEN)
    t.free(total, normed)
    return [looked_up, scaled]


def _classify(t: Timeline, f: Forward, architecture: Architecture) -> None:
    """An encoder's head over all tokens: masked-language models transform each, and project it to the vocabulary."""
    vocab = architecture.vocab_size
    tables = (*architecture.head, *architecture.text.before) if architecture.tied_head else architecture.head
    widths = [p.shape[1] for p in tables if len(p.shape) == 2 and p.shape[0] == vocab and p.kind != "norm"]
    if widths:
        width = f.bytes(widths[0])
        t.moment(HIDDEN, width, width)
        t.moment(LOGITS, width, f.bytes(vocab))


def run_layer(
    t: Timeline, f: Forward, layer: Layer, hidden: int, cache: list[int], left: list[int] | None = None
) -> int:
    """One layer: its output's handle; `hidden`, its input, is the caller's to free, and so is what it adds to `left`:
    the weights of its attention, where the model holds them on."""
    width = layer_width(layer)
    if is_hybrid(layer):
        return hybrid(t, f, layer, cache)
    if layer.streams > 1:
        return streams_layer(t, f, layer, width, cache)
    if layer.residual_fp32 and f.half:
        return _fp32_residual(t, f, layer, width, hidden, cache)
    returned = left if layer.returns_weights and left is not None else None
    if layer.parallel:
        return _parallel(t, f, layer, width, cache, returned)
    residual, kept = hidden, list[int]()
    dense = layer.feed_forward if isinstance(layer.feed_forward, FeedForward) else None
    widens = f.dtype == "fp16" and dense is not None and dense.fp32_in_fp16
    for part in (*layer.mixers, layer.feed_forward):
        if part is None:
            continue
        normed = [normalize(t, f, width, layer.norm)] if layer.norm_position != "post" else []
        if isinstance(part, FeedForward | MixtureOfExperts):
            out = feed(t, f, part, normed)
            holds = False
        else:
            out, weights = mix(t, f, part, cache)
            (kept if returned is None else returned).extend(weights)
            holds = layer.keeps is not None
            if layer.keeps == "mixed and normed":
                kept += normed
                normed = []
        t.free(*normed)
        if layer.norm_position != "pre":
            after = normalize(t, f, width, layer.norm)
            t.free(out)
            out = after
        if adds_residual(part):
            total = out
        else:
            wide = widens and (part is layer.feed_forward or t.sizes[residual] > f.bytes(width))
            total = t.alloc(f.fp32_bytes(width) if wide else f.bytes(width), HIDDEN)
            kept += [out] if holds else []
            t.free(*[] if holds else [out])
        if residual != hidden:
            t.free(residual)
        residual = total
    t.free(*kept)
    return residual


def adds_residual(part: Mixer | FeedForward | MixtureOfExperts) -> bool:
    """Whether a part of a layer adds the residual itself."""
    return part.adds_residual if isinstance(part, FeedForward) else isinstance(part, Attention) and part.flattened


def _fp32_residual(t: Timeline, f: Forward, layer: Layer, width: int, hidden: int, cache: list[int]) -> int:
    """A layer of one mixer whose sum is fp32: the embedding is cast up for it, later inputs down for the norm."""
    cast_down = [t.alloc(f.bytes(width), HIDDEN)] if t.sizes[hidden] > f.bytes(width) else []
    normed = normalize(t, f, width, layer.norm)
    t.free(*cast_down)
    cast_up = [] if cast_down else [t.alloc(f.fp32_bytes(width), HIDDEN)]
    out, kept = mix(t, f, layer.mixers[0], cache)
    t.free(normed)
    total = t.alloc(f.fp32_bytes(width), HIDDEN)
    t.free(out, *cast_up, *kept)
    return total


def _parallel(
    t: Timeline, f: Forward, layer: Layer, width: int, cache: list[int], returned: list[int] | None = None
) -> int:
    normed = [normalize(t, f, width, layer.norm) for _ in range(1 + layer.norms_first)]
    mixed, kept = mix(t, f, layer.mixers[0], cache)
    if returned is not None:
        returned += kept
        kept = []
    fed = feed(t, f, layer.feed_forward) if layer.feed_forward else mixed
    both = t.alloc(f.bytes(width), HIDDEN)
    total = t.alloc(f.bytes(width), HIDDEN)
    t.free(both, fed, *([mixed] if fed != mixed else []), *normed, *kept)
    return total


def symbols(architecture: Architecture, f: Forward) -> dict[str, int]:
    """The field's symbols for this model and pass, so that formulas can be shown with their numbers."""
    found = {
        "b": f.batch,
        "s": f.tokens,
        "t": f.past + f.tokens,
        "e": f.element_bytes,
        "h": architecture.hidden_size,
        "V": architecture.vocab_size,
        "P": architecture.parameters,
    }
    if attention := architecture.attention:
        found |= {"a": attention.heads, "a_kv": attention.kv_heads, "d": attention.head_dim}
    dense = (x.feed_forward for x in architecture.text.layers if isinstance(x.feed_forward, FeedForward))
    if feed_forward := next(dense, None):
        found["f"] = feed_forward.intermediate_size
    if moe := architecture.moe:
        found |= {"f": moe.intermediate_size, "E": moe.experts, "k": moe.top_k}
    return found


def layer_width(layer: Layer) -> int:
    """The hidden size of a layer, by the first of its parts."""
    part = layer.mixers[0] if layer.mixers else layer.feed_forward
    return part.hidden_size if part else 0


def _angles(t: Timeline, f: Forward, layers: tuple[Layer, ...]) -> list[int]:
    """Cosines and sines of every rotary size that the layers use, for all tokens."""
    mixers = {id(m): m for x in layers for m in x.mixers}.values()
    sizes = {m.rotary.dim for m in mixers if isinstance(m, Attention) and m.rotary}
    sizes |= {m.qk_rope_head_dim for m in mixers if isinstance(m, LatentAttention)}
    return [t.alloc(f.bytes(dim), ANGLES) for dim in sorted(sizes) for _ in range(2)]


def _masks(t: Timeline, f: Forward, layers: tuple[Layer, ...]) -> list[int]:
    """One mask for each kind of attention that is given one: booleans, or for eager attention an additive one."""
    mixers = {id(m): m for x in layers for m in x.mixers}.values()
    parts = {m.window: m for m in mixers if isinstance(m, Attention)}
    parts |= {m.window: window(m) for m in mixers if isinstance(m, CompressedAttention)}
    indexed = any(isinstance(m, LatentAttention) and m.index_top_k for m in mixers)
    if indexed and f.attention != "flash_attention_2":  # the indexer always reads one
        return [t.alloc(f.rows * (f.past + f.tokens), MASK)]
    masks = []
    for part in parts.values():
        eager = implementation(f, part) == "eager"
        if not part.causal and not f.masked:
            continue
        if not (eager or needs_mask(f, part)) or f.attention == "flash_attention_2":
            continue
        attended = f.static_length if f.static_length and f.past else stored_tokens(part, f.past, f.tokens)
        square = f.tokens * attended
        t.moment(MASK, square, square)
        whole = square * (f.batch if f.masked or f.mask_of_ones or eager else 1)
        if eager:
            t.moment(MASK, whole)
        additive = t.alloc(whole * f.element_bytes, MASK) if eager else None
        if additive is None or part.scores == "fp32 bias":  # MPT casts it back to booleans
            masks.append(t.alloc(whole, MASK))
            t.free(*[] if additive is None else [additive])
        else:
            masks.append(additive)
    return masks
