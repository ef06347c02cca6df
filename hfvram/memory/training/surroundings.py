"""What a model makes once for all of its layers: positions' angles and masks. None of it needs a gradient."""

from dataclasses import dataclass, field

from hfvram.memory.timeline import Tag
from hfvram.memory.training.blocks import unknown
from hfvram.memory.training.tape import Tape
from hfvram.memory.training.tensors import Tensor
from hfvram.model.layers import Attention, Layer

ROPE = "transformers 5.17: LlamaRotaryEmbedding.forward"
ANGLES = Tag("rotary angles", "activations", "s·d·e", ROPE)
MASK = Tag("attention mask", "activations", "b·s·t", "transformers 5.17: masking_utils.py")


@dataclass(slots=True)
class Surroundings:
    """Angles by rotary size, masks by window (None for none); `attention` is what was asked for."""

    class_name: str
    attention: str
    batch: int
    tokens: int
    rotary: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    positions: Tensor | None = None
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def angles(self, part: Attention) -> tuple[Tensor, Tensor]:
        """Cosines and sines for this layer's heads, (1, 1, s, d)."""
        assert part.rotary is not None
        return self.rotary[part.rotary.dim]


def surround(t: Tape, layers: list[Layer], found: Surroundings, dtype: str) -> None:
    """Make what the layers need, in the order of the model's code."""
    mixers = {id(m): m for x in layers for m in x.mixers}.values()
    parts = [m for m in mixers if isinstance(m, Attention)]
    if len(parts) != len(mixers):
        raise unknown(f"a mixer of {found.class_name}")
    for dim in sorted({m.rotary.dim for m in parts if m.rotary}):
        found.rotary[dim] = _angles(t, found.tokens, dim, dtype)


def _angles(t: Tape, s: int, dim: int, dtype: str) -> tuple[Tensor, Tensor]:
    """In fp32 by a product of positions and frequencies, then in the model's dtype."""
    grad, t.grad = t.grad, False
    positions = t.new((1, 1, s), "fp32", None, ANGLES)
    t.multiplies()
    products = t.new((1, dim // 2, s), "fp32", None, ANGLES)
    both = t.new((1, s, dim), "fp32", None, ANGLES)
    cos = t.new((1, s, dim), "fp32", None, ANGLES)
    scaled_cos = t.new((1, s, dim), "fp32", None, ANGLES)
    del cos
    sin = t.new((1, s, dim), "fp32", None, ANGLES)
    scaled_sin = t.new((1, s, dim), "fp32", None, ANGLES)
    del sin
    shape, strides = (1, 1, s, dim), (s * dim, s * dim, dim, 1)
    if dtype == "fp32":
        found = scaled_cos.as_(shape, strides), scaled_sin.as_(shape, strides)
    else:
        low = t.new((1, s, dim), dtype, None, ANGLES), t.new((1, s, dim), dtype, None, ANGLES)
        found = low[0].as_(shape, strides), low[1].as_(shape, strides)
    del positions, products, both
    t.grad = grad
    return found
