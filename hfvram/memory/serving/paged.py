"""transformers' continuous batching: one pool of blocks of 256 tokens, made of most of what the weights leave.

M tokens computed at a time, N tokens in the pool, groups of l layers each, p = a_kv·d, e bytes of an element: the
pool takes 2·l·p·e a token; N is the largest for which it, the indices, the mask of M·(N + M) and the larger of two
moments, logits in fp32 and all keys and values read, are within 0.8 of what is free. Left out: CUDA graphs, which only
flash-attn gets, and what `generate_batch` holds on the host.
Source: transformers 5.17, generation/continuous_batching/cache.py (`PagedAttentionMemoryHandler`,
`PagedAttentionCache`, `group_layers_by_attn_type`), cache_manager.py, initialization.py. Read, not measured.
"""

from math import floor, gcd, sqrt
from typing import NamedTuple

from hfvram.errors import HfvramError
from hfvram.memory.allocator import stand
from hfvram.memory.device import CONTEXT_BYTES
from hfvram.memory.forward import ELEMENT_BYTES
from hfvram.memory.serving.options import Options
from hfvram.memory.serving.plan import Plan, Pool
from hfvram.memory.serving.weights import Draft
from hfvram.memory.weights import standing
from hfvram.model.architecture import Architecture
from hfvram.model.layers import Attention
from hfvram.model.rope import RopeTable

BLOCK = 256
SPARE = 2
"""Blocks beside those that are handed out: what is read and written for nothing."""
PERCENT = 0.8
"""Of the free memory (`max_memory_percent`)."""
TOKENS, FEWEST_TOKENS = 8192, 256
ROW_OF_BLOCKS = 32
"""Blocks of a request in the table of the fast path."""


class Terms(NamedTuple):
    """Bytes a token of a batch, a token of the pool, a pair of both, and a pair of tokens of the batch."""

    m: int
    n: int
    mn: int
    mm: int

    def bytes(self, m: int, n: int) -> int:
        return self.m * m + self.n * n + self.mn * m * n + self.mm * m * m


class Layout(NamedTuple):
    """Groups of full and of sliding layers, the layers of each, the window, and numbers of a token in one layer."""

    full: int
    sliding: int
    layers: int
    window: int
    page: int

    def blocks(self, tokens: int) -> int:
        """Blocks that a request of `tokens` needs in all groups."""
        whole = -(-tokens // BLOCK)
        return whole * self.full + min(whole, -(-self.window // BLOCK)) * self.sliding

    def waste(self, tokens: int) -> float:
        """The part of these blocks in which there is no token that is needed, in blocks."""
        kept = tokens * self.full + min(tokens, self.window) * self.sliding
        return self.blocks(tokens) - kept / BLOCK


def layout(a: Architecture) -> Layout:
    """Groups of equal size. Raises `usage` for layers that transformers' paged cache does not know."""
    mixers = [m for x in a.text.layers for m in x.mixers]
    kinds = [m.kind for m in mixers]
    part = a.attention
    if part is None or any(k not in ("full_attention", "sliding_attention") for k in kinds):
        other = next((k for k in kinds if k not in ("full_attention", "sliding_attention")), "no attention")
        raise HfvramError("usage", f"--cache paged is for full and sliding attention, not {other}: valid is dynamic")
    sizes = {(m.kv_heads, m.head_dim, m.value_dim) for m in mixers if isinstance(m, Attention)}
    if len(sizes) > 1 or part.head_dim != part.value_dim:
        raise HfvramError("usage", "--cache paged is for keys and values of one size in all layers: valid is dynamic")
    sliding = sum(bool(m.window) for m in mixers if isinstance(m, Attention))
    full = len(mixers) - sliding
    each = gcd(full, sliding)
    window = next((m.window for m in mixers if isinstance(m, Attention) and m.window), 0)
    return Layout(full // each, sliding // each, each, window, part.kv_heads * part.head_dim)


def terms(a: Architecture, at: Layout, e: int, masks: int) -> tuple[Terms, Terms]:
    """Of the two moments, logits and attention, with what stands for good beside them."""
    part = a.attention
    heads = part.heads * part.head_dim if part else 0
    twice = 1 if masks else 2  # inputs are doubled where batches overlap, which needs that there is no mask
    groups = at.full + at.sliding
    n = 2 * at.layers * at.page * e + twice * groups * 8
    m = twice * (7 * 4 + 4 + groups * (ROW_OF_BLOCKS * 4 + 8 + 8))
    pairs = twice * masks * e
    logits = Terms(m + a.hidden_size * e + a.vocab_size * 4, n, pairs, pairs)
    attention = Terms(m + e * (a.hidden_size + heads + 2 * at.page), n + 2 * at.page * e, pairs, pairs)
    return logits, attention


def solve(found: tuple[Terms, ...], free: int, batch: int | None) -> tuple[int, int]:
    """Tokens at a time and blocks, the most for which every moment fits.

    Without a number given, a batch is 8192 tokens, or what fills a tenth of the pool where that is less.
    """
    if batch is None:
        rooms = []
        for x in found:
            square, line = x.mn * 0.1 + x.mm * 0.01, x.n + x.m * 0.1
            root = (-line + sqrt(line * line + 4 * square * free)) / (2 * square) if square else free / line
            rooms.append(int(floor(root) * 0.1))
        batch = max(min(TOKENS, *rooms), FEWEST_TOKENS)
    m = batch
    return m, min(floor((free - x.m * m - x.mm * m * m) / (x.n + x.mn * m)) // BLOCK for x in found)


def plan(a: Architecture, o: Options, rope: tuple[RopeTable, ...], draft: Draft | None = None) -> Plan:
    """The pool of one GPU; without one, what the requests need."""
    at, e = layout(a), ELEMENT_BYTES[o.dtype]
    weights = standing(a, o.dtype, o.quant, True)
    stands = stand(weights)
    masks = 0 if o.flash else 2 if at.sliding else 1
    found = terms(a, at, e, masks)
    unit = BLOCK * 2 * at.layers * at.page * e
    units = room = None
    batch = min(o.max_num_batched_tokens or TOKENS, TOKENS)
    n = 0
    if o.gpu_bytes is not None:
        free = int((o.gpu_bytes - stands.reserved) * PERCENT)
        batch, blocks = solve(found, free, o.max_num_batched_tokens) if free > 0 else (FEWEST_TOKENS, 0)
        units, n = max(0, blocks), max(0, blocks) * BLOCK
        room = free - max(x.bytes(batch, 0) for x in found)
    pool = 2 * at.layers * at.page * e * n
    groups = at.full + at.sliding
    return Plan(
        engine="transformers",
        standing=weights,
        loaded_bytes=stands.allocated,
        activation_bytes=max(x.bytes(batch, n) for x in found) - pool,
        non_torch_bytes=CONTEXT_BYTES,
        graph_bytes=0,
        pools=(
            Pool(
                name="blocks",
                unit_bytes=unit,
                units=units,
                needs=at.blocks,
                formula=f"{unit:,} B a block of {BLOCK} tokens",
                spare=SPARE,
                wastes=at.waste,
            ),
        ),
        tokens=None if units is None else units // groups * BLOCK,
        bytes_a_token=unit * groups // BLOCK,
        room_bytes=room,
    )
