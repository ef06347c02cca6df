"""What a model makes once for all of its layers: positions' angles and masks. None of it needs a gradient."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Final

from hfvram.memory.timeline import Tag
from hfvram.memory.training.blocks import unknown
from hfvram.memory.training.kinds import Kind
from hfvram.memory.training.tape import Tape
from hfvram.memory.training.tensors import Tensor
from hfvram.model.layers import Attention, Dropout, LatentAttention, Layer, Mixer, Rotary
from hfvram.request import Request

ROPE = "transformers 5.17: LlamaRotaryEmbedding.forward"
ANGLES = Tag("rotary angles", "activations", "s·d·e", ROPE)
POSITIONS = Tag("positions", "activations", "s·8", "transformers 5.17: LlamaModel.forward")
MASK = Tag("attention mask", "activations", "b·s·t", "transformers 5.17: masking_utils.py")


WIDE: Final = ("fp32", "neighbours, cast")
"""Ways to rotate (`Kind.rotates`) whose angles stay in fp32."""


@dataclass(slots=True)
class Surroundings:
    """Angles by rotary size, masks by window (None for none), and what layers need to know: the request, the code."""

    class_name: str
    kind: Kind
    request: Request
    rotary: dict[tuple[int, str], tuple[Tensor, Tensor]] = field(default_factory=dict)
    positions: Tensor | None = None
    alibi: Tensor | None = None
    ones: Tensor | None = None
    """A mask of ones that the model makes up."""
    encoded: Tensor | None = None
    """What the encoder made, in a decoder that attends to it."""
    biases: dict[bool, Tensor] = field(default_factory=dict)
    """Of relative positions: of the layer's own, and (True) of those to the encoder."""
    cached: list[Tensor] = field(default_factory=list)
    """Keys and values that are cached in training, too."""
    held: Tensor | None = None
    """What a layer returned beside its output."""
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)
    dropout: Dropout = field(default_factory=Dropout)
    router_logits: list[Tensor] = field(default_factory=list)
    """Of each mixture of experts, where a loss is made of them."""

    @property
    def packs(self) -> bool:
        """Whether positions are looked through for packed sequences: of Qwen2-VL they have three dimensions."""
        kind = self.kind
        return kind.counts and kind.packs and kind.masks_know and not kind.masks_first and kind.angles != "in three"

    @property
    def caches(self) -> bool:
        """Whether keys and values are cached."""
        return self.kind.caches and not self.request.gradient_checkpointing

    def of(self, layer: Layer) -> "Surroundings":
        """With the angles and the mask that this layer is given, where others are given other ones."""
        part = layer.mixers[0] if layer.mixers else None
        if not isinstance(part, Attention) or (len(self.rotary) < 2 and len(self.masks) < 2):
            return self
        rotary = {key: angles for key, angles in self.rotary.items() if part.kind in key or "" in key}
        return replace(self, rotary=rotary, masks={w: m for w, m in self.masks.items() if w == part.window})

    def angles(self, part: Attention) -> tuple[Tensor, Tensor]:
        """Cosines and sines for this layer's heads, (1, 1, s, d)."""
        assert part.rotary is not None
        return self.rotary[part.rotary.dim, part.kind if self.kind.angles == "by layer type" else ""]

    def eager(self, part: Attention) -> bool:
        """Whether attention is written out, as asked or because the code can't do anything else."""
        asked = self.request.attention
        return (asked if asked in part.implementations else part.implementations[0]) == "eager"


@lru_cache(maxsize=64)
def expanded(part: LatentAttention) -> Attention:
    """The attention that its expanded heads make."""
    return Attention(
        hidden_size=part.hidden_size,
        heads=part.heads,
        kv_heads=part.heads,
        head_dim=part.head_dim,
        value_dim=part.v_head_dim,
        rotary=Rotary(dim=part.qk_rope_head_dim, style=part.rotary_style),
        implementations=part.implementations,
        params=(),
    )


def _softmaxes(mixers: Iterable[Mixer]) -> list[Attention]:
    return [
        expanded(m) if isinstance(m, LatentAttention) else m
        for m in mixers
        if isinstance(m, Attention | LatentAttention)
    ]


def surround(t: Tape, layers: list[Layer], found: Surroundings, ids: Tensor, dtype: str) -> None:
    """Make what the layers need, in the order of the model's code."""
    masks(t, layers, found, ids, dtype)
    if found.kind.masks_first:
        positions(t, found, ids)
    angles(t, layers, found, ids, dtype)


def masks(t: Tape, layers: list[Layer], found: Surroundings, ids: Tensor, dtype: str) -> None:
    """Positions and masks."""
    mixers = {id(m): m for x in layers for m in x.mixers}.values()
    parts = _softmaxes(mixers)
    if not parts and found.kind.counts:
        raise unknown(f"{found.class_name} without attention")
    b, s = ids.shape
    if found.positions is None and found.kind.counts and not found.kind.masks_first:
        positions(t, found, ids)
    if found.kind.layer == "with alibi":
        found.ones = _alibi(t, found, parts[0].heads, b, s, dtype)
    windows = {m.window: m for m in parts}
    if found.kind.masks == "both":
        windows.setdefault(None, parts[0])
        if len(windows) == 1:
            raise unknown(f"{found.class_name} without a layer that slides")
    if found.kind.masks == "always both":
        windows = {None: parts[0], (max(windows, key=lambda w: w or 0) or 0): parts[0]}
    if t.ring[0] > 1:
        if found.packs and not found.caches:
            _packed(t, b, s)
            if t.ring[1] < t.ring[0] - 1:
                found.masks[None] = _mask_of_packed(t, b, s)
        return
    for window in windows if found.kind.masks_first else sorted(windows, key=lambda w: -1 if w is None else w):
        if found.packs and not found.caches and not found.request.padding:
            _packed(t, b, s)
        if found.request.attention == "flash_attention_2":
            if found.ones is not None:
                seen, any_hidden = t.new((b, s), "bool", None, MASK), t.new((), "bool", None, MASK)
                del seen, any_hidden
            continue
        given, padded = found.ones is not None or found.request.padding, found.request.padding
        found.masks[window] = _mask(t, window, found.eager(windows[window]), b, s, dtype, given, padded)


def angles(t: Tape, layers: list[Layer], found: Surroundings, ids: Tensor, dtype: str) -> None:
    """Of all layers' rotary positions."""
    b, s = ids.shape
    parts = _softmaxes(m for x in layers for m in x.mixers)
    by_type = found.kind.angles == "by layer type"
    for key in sorted({(m.rotary.dim, m.kind if by_type else "") for m in parts if m.rotary}):
        if found.kind.angles.startswith("in three"):
            found.rotary[key] = _angles_in_three(t, b, s, key[0], dtype, woven=found.kind.angles.endswith("woven"))
            continue
        if any(m.rotary and m.rotary.style == "complex" for m in parts):
            found.rotary[key] = _complex_angles(t, s, key[0])
            continue
        if found.kind.rotates == "halves":
            found.rotary[key] = _angles_of_halves(t, s, key[0] // 2, dtype)
            continue
        each = b if t.given else 1  # positions that are given are so for every sequence
        found.rotary[key] = _angles(t, s, key[0], "fp32" if found.kind.rotates in WIDE else dtype, each)


def positions(t: Tape, found: Surroundings, ids: Tensor) -> Tensor:
    """The tokens' places, counted."""
    s = ids.shape[1]
    found.positions = t.new((s,), "int64", None, POSITIONS)
    if found.kind.shifts:
        found.positions = t.new((s,), "int64", None, POSITIONS)
    return found.positions


def counted(t: Tape, found: Surroundings, ids: Tensor) -> Tensor:
    """The tokens' places, counted in the mask that is given, or in one of ones that the model makes up (OPT)."""
    dtype = "int64" if found.request.padding else "fp32"
    found.ones = None if found.request.padding else t.new(ids.shape, "fp32", None, MASK)
    total = t.new(ids.shape, dtype, None, POSITIONS)
    product = t.new(ids.shape, dtype, None, POSITIONS)
    before = t.new(ids.shape, dtype, None, POSITIONS)
    del product
    places = before if found.request.padding else t.new(ids.shape, "int64", None, POSITIONS)
    del total, before
    found.positions = places
    return places


def _packed(t: Tape, b: int, s: int) -> None:
    """Whether several sequences are packed into one is looked for in the positions."""
    before = t.new((b, 1), "int64", None, POSITIONS)
    joined = t.new((b, s + 1), "int64", None, POSITIONS)
    steps = t.new((b, s), "int64", None, POSITIONS)
    del joined
    starts = t.new((b, s), "bool", None, POSITIONS)
    packed = t.new((b, s), "int64", None, POSITIONS)
    del starts
    t.timeline.free(t.timeline.alloc(b, POSITIONS), t.timeline.alloc(1, POSITIONS))
    del before, steps, packed


def _mask_of_packed(t: Tape, b: int, s: int) -> Tensor:
    """What is made where positions jump, as if sequences were packed; ring attention has no use for it.

    Source: transformers 5.17, masking_utils.py `sdpa_mask`, `packed_sequence_mask_function`.
    """
    whose = t.new((b, s), "int64", None, POSITIONS)
    places = [t.new((n,), "int64", None, MASK) for n in (b, 1, s, s)]
    one = t.new((), "bool", None, MASK)
    before = t.new((1, 1, s, s), "bool", None, MASK)
    seen = t.new((1, 1, s, s), "bool", None, MASK)
    del one, before
    pair = t.new((b, 1, s, 1), "int64", None, MASK), t.new((b, 1, 1, s), "int64", None, MASK)
    alike = t.new((b, 1, s, s), "bool", None, MASK)
    del pair
    mask = t.new((b, 1, s, s), "bool", None, MASK)
    del whose, places, seen, alike
    return mask


def _alibi(t: Tape, found: Surroundings, heads: int, b: int, s: int, dtype: str) -> Tensor | None:
    """Distances in a mask (of ones, where none is given) times a slope for each head. Returns the mask it makes."""
    counted = "int64" if found.request.padding else "fp32"
    ones = None if found.request.padding else t.new((b, s), "fp32", None, MASK)
    power = 1 << (heads.bit_length() - 1)
    base, powers = t.new((), "fp32", None, MASK), t.new((power,), "int32", None, MASK)
    slopes = t.new((heads,), "fp32", None, MASK)
    places = t.new((b, s), counted, None, MASK)
    places = t.new((b, s), counted, None, MASK)
    places = t.new((b, s), counted, None, MASK)
    wide = t.new((b, heads, s), "fp32", None, MASK)
    found.alibi = wide if dtype == "fp32" else t.new((b * heads, 1, s), dtype, None, MASK)
    del base, powers, slopes, places, wide
    return ones


def _mask(
    t: Tape, window: int | None, eager: bool, b: int, s: int, dtype: str, given: bool, padded: bool
) -> Tensor | None:
    """Booleans for SDPA where a window is reached, an additive one of (b, 1, s, s) for eager attention; `given` where
    the model makes up a mask of ones itself, or is given one that hides tokens (`padded`)."""
    if not padded and not eager and (window is None or s < window):
        if given:  # whether it hides anything is looked for
            seen = t.new((b, s), "bool", None, MASK)
            _look(t)
            del seen
        return None
    ones = t.new((b, s), "bool", None, MASK) if given else None
    if padded and not eager and (window is None or s < window):
        _look(t)
        _look(t)
    rows, heads = t.new((b,), "int64", None, MASK), t.new((1,), "int64", None, MASK)
    count = t.new((s,), "int64", None, MASK)
    queries = t.new((s,), "int64", None, MASK)
    del count
    count = t.new((s,), "int64", None, MASK)
    keys = t.new((s,), "int64", None, MASK)
    del count
    square = (1, 1, s, s)
    within = None
    first = t.new((), "bool", None, MASK) if given else None
    if window is not None and (window <= s or eager or padded):
        one = t.new((), "bool", None, MASK)
        edge = t.new((s,), "int64", None, MASK)
        near = t.new(square, "bool", None, MASK)
        del edge
        within = t.new(square, "bool", None, MASK)
        del near, one
    seen = t.new(square, "bool", None, MASK)
    if within is not None or given:
        both = t.new(square, "bool", None, MASK)
        within = None
        seen = both
        if window is not None and given:
            seen = t.new(square, "bool", None, MASK)
        del both, first
    if given:
        row = t.new((b, 1, 1, s), "bool", None, MASK)
        seen = t.new((b, 1, s, s), "bool", None, MASK)
        del row
    del rows, heads, queries, keys
    if eager:
        number = t.new((), dtype, None, MASK)
        mask = t.new((b, 1, s, s), dtype, None, MASK)
        del number, seen, ones
        return mask
    return seen if padded else seen.as_((b, 1, s, s), (0, s * s, s, 1))


def _look(t: Tape) -> None:
    """Whether a mask hides anything."""
    t.timeline.free(t.timeline.alloc(8, MASK), t.timeline.alloc(1, MASK))


def _angles(t: Tape, s: int, dim: int, dtype: str, b: int = 1) -> tuple[Tensor, Tensor]:
    """In fp32 by a product of positions and frequencies, then in the model's dtype."""
    grad, t.grad = t.grad, False
    positions = t.new((b, 1, s), "fp32", None, ANGLES)
    t.multiplies()
    products = t.new((b, dim // 2, s), "fp32", None, ANGLES)
    both = t.new((b, s, dim), "fp32", None, ANGLES)
    cos = t.new((b, s, dim), "fp32", None, ANGLES)
    scaled_cos = t.new((b, s, dim), "fp32", None, ANGLES)
    del cos
    sin = t.new((b, s, dim), "fp32", None, ANGLES)
    scaled_sin = t.new((b, s, dim), "fp32", None, ANGLES)
    del sin
    shape, strides = (b, 1, s, dim), (s * dim, s * dim, dim, 1)
    if dtype == "fp32":
        found = scaled_cos.as_(shape, strides), scaled_sin.as_(shape, strides)
    else:
        low = t.new((b, s, dim), dtype, None, ANGLES), t.new((b, s, dim), dtype, None, ANGLES)
        found = low[0].as_(shape, strides), low[1].as_(shape, strides)
    del positions, products, both
    t.grad = grad
    return found


def _angles_of_halves(t: Tape, s: int, half: int, dtype: str) -> tuple[Tensor, Tensor]:
    """As `_angles`, of half a head: `GptOssRotaryEmbedding.forward`."""
    grad, t.grad = t.grad, False
    positions = t.new((1, 1, s), "fp32", None, ANGLES)
    t.multiplies()
    size, turned = (1, s, half), (s * half, 1, s)
    products = t.new(size, "fp32", turned, ANGLES)
    cos = t.new(size, "fp32", turned, ANGLES)
    cos = t.new(size, "fp32", turned, ANGLES)
    sin = t.new(size, "fp32", turned, ANGLES)
    sin = t.new(size, "fp32", turned, ANGLES)
    if dtype != "fp32":
        low = t.new(size, dtype, turned, ANGLES), t.new(size, dtype, turned, ANGLES)
        cos, sin = low
        del low
    del positions, products
    t.grad = grad
    shape, strides = (1, 1, s, half), (s * half, s * half, 1, s)
    return cos.as_(shape, strides), sin.as_(shape, strides)


def _angles_in_three(t: Tape, b: int, s: int, dim: int, dtype: str, woven: bool) -> tuple[Tensor, Tensor]:
    """Of places in time, height and width, for every sequence; put together in fp32.

    Source: transformers 5.17, Qwen2VLRotaryEmbedding.forward, Qwen3VLTextRotaryEmbedding.forward.
    """
    grad, t.grad = t.grad, False
    positions = t.new((3, b, 1, s), "fp32", None, ANGLES)
    t.multiplies()
    products = t.new((3, b, dim // 2, s), "fp32", None, ANGLES)
    cos = t.new((3, b, s, dim // 2), "fp32", None, ANGLES)
    cos = t.new((3, b, s, dim // 2), "fp32", None, ANGLES)
    sin = t.new((3, b, s, dim // 2), "fp32", None, ANGLES)
    sin = t.new((3, b, s, dim // 2), "fp32", None, ANGLES)
    sin = _together(t, b, s, dim, woven)
    cos = _together(t, b, s, dim, woven)
    shape, strides = (b, 1, s, dim), (s * dim, s * dim, dim, 1)
    if dtype != "fp32":
        low = t.new((b, s, dim), dtype, None, ANGLES), t.new((b, s, dim), dtype, None, ANGLES)
        cos, sin = low
        del low
    del positions, products
    t.grad = grad
    return cos.as_(shape, strides), sin.as_(shape, strides)


def _together(t: Tape, b: int, s: int, dim: int, woven: bool) -> Tensor:
    """Pieces of three, joined; then twice the half."""
    half = None if woven else t.new((b, s, dim // 2), "fp32", None, ANGLES)
    both = t.new((b, s, dim), "fp32", None, ANGLES)
    del half
    return both


def _complex_angles(t: Tape, s: int, dim: int) -> tuple[Tensor, Tensor]:
    """As complex numbers, written as pairs: `DeepseekV2RotaryEmbedding.forward`."""
    grad, t.grad = t.grad, False
    positions = t.new((1, 1, s), "fp32", None, ANGLES)
    t.multiplies()
    products = t.new((1, dim // 2, s), "fp32", None, ANGLES)
    ones = t.new((1, s, dim // 2), "fp32", None, ANGLES)
    turned = t.new((1, s, dim // 2, 2), "fp32", None, ANGLES)
    del ones
    scaled = t.new((1, s, dim // 2, 2), "fp32", None, ANGLES)
    del positions, products, turned
    t.grad = grad
    found = scaled.as_((1, 1, s, dim // 2, 2), (s * dim, s * dim, 2, 2 * s, 1))
    return found, found
