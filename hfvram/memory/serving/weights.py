"""Weights as they stand on one rank of a serving engine, in the order in which they are built.

Source: vLLM 0.19.0, model_executor/layers/linear.py, layers/quantization/*.py, models/*.py.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from hfvram.errors import HfvramError
from hfvram.memory.bitsandbytes import BLOCK
from hfvram.memory.forward import ELEMENT_BYTES
from hfvram.memory.serving.fusing import sharded, vocabulary
from hfvram.memory.timeline import Standing, Tag
from hfvram.memory.weights import PACKED, SCALES, STORED, param_bytes, scheme_of
from hfvram.model.architecture import Architecture, Stack
from hfvram.model.layers import Param
from hfvram.model.packing import Scheme, by_method, is_known, packed_bytes, plain
from hfvram.model.patterns import chosen
from hfvram.model.rope import RopeTable

Draft = tuple[Architecture, tuple[RopeTable, ...], str]
"""A draft model, its rotary tables, and what its weights are packed by."""
ROPE = Tag("rotary tables", "buffers", "", "vLLM 0.19.0: rotary_embedding/base.py, cos_sin_cache", "exact")


@dataclass(frozen=True, slots=True)
class Stage:
    """The layers `first` to before `last` of the main stack, of `layers`: what one rank of a pipeline holds."""

    first: int
    last: int
    layers: int

    @property
    def embeds(self) -> bool:
        return self.first == 0

    @property
    def heads(self) -> bool:
        return self.last == self.layers


def stages(layers: int, pp: int) -> list[Stage]:
    """The stages of a pipeline; layers left over go to the stages before the last, from there backwards.

    >>> [s.last - s.first for s in stages(30, 4)]
    [7, 8, 8, 7]

    Source: vLLM 0.19.0, distributed/utils.py, get_pp_indices.
    """
    if pp > layers:
        raise HfvramError("usage", f"--pp {pp} is more than the model's {layers} layers")
    sizes = [layers // pp] * pp
    for i in range(2, layers % pp + 2):
        sizes[-i] += 1
    starts = [sum(sizes[:i]) for i in range(pp)]
    return [Stage(start, start + size, layers) for start, size in zip(starts, sizes, strict=True)]


@lru_cache(maxsize=64)
def standing(
    a: Architecture,
    dtype: str,
    quant: str,
    tp: int,
    stage: Stage,
    rope: tuple[RopeTable, ...],
    pp: int = 1,
    ep: int = 1,
) -> Standing:
    """Every tensor that stands on a rank of this stage before the pool is made."""
    left_alone = chosen(a.unquantized) if quant == a.quantization and a.unquantized else None
    scheme = scheme_of(a, quant)
    if quant == "fp8" != a.quantization:  # made while loading: one scale a tensor (quantization/fp8.py)
        scheme = replace(scheme, block=None)
    if a.stored_sizes and quant == a.quantization and not is_known(scheme) and tp == pp == 1:
        return Standing(tuple((n, STORED) for n in a.stored_sizes))
    tables = [(t.positions * t.dim * (4 if t.fp32 else ELEMENT_BYTES[dtype]), ROPE) for t in rope]
    tensors: list[tuple[int, Tag]] = []

    def add(params: Iterable[Param]) -> None:
        for p in params:
            method = "none" if left_alone and left_alone(p.name) else scheme.of(p.name, p.kind)
            tensors.extend(parts(p, dtype, method, by_method(scheme, method)))

    for stack in a.stacks:
        main = stack.name == a.main
        if not main and not stage.embeds:
            continue
        if stage.embeds or not main or (a.tied_head and pp > 1 and stage.heads):
            add(vocabulary(stack.before, a.vocab_size, tp, projectors=not main))
        for i, layer in enumerate(stack.layers):
            if i in stack.repeated or (main and not stage.first <= i < stage.last):
                continue
            add(_named(stack, i, sharded(layer, tp, quant, ep)))
            if main and tables:
                tensors += tables
                tables = []
        if stage.heads or not main:
            add(vocabulary(stack.after, a.vocab_size, tp, projectors=not main))
    if stage.heads:
        add(vocabulary(a.head, a.vocab_size, tp))
    return Standing(tuple(tensors))


@lru_cache(maxsize=64)
def with_draft(target: Standing, draft: Draft | None, dtype: str, tp: int, ep: int = 1) -> Standing:
    """The tensors of a model, and after them those of the draft that speculates for it, sharded alike."""
    if draft is None:
        return target
    a, rope, quant = draft
    count = len(a.text.layers)
    return Standing(target.tensors + standing(a, dtype, quant, tp, Stage(0, count, count), rope, ep=ep).tensors)


def parts(p: Param, dtype: str, quant: str, scheme: Scheme | None = None) -> tuple[tuple[int, Tag], ...]:
    """The tensors that a parameter becomes: packed words, scales and what goes with them each for itself.

    Unlike transformers, engines keep MXFP4 packed, and turn bitsandbytes' scales of scales back into fp32 scales.
    Source: vLLM 0.19.0, quantization/mxfp4.py; model_loader/bitsandbytes_loader.py (dequantize_dq).
    """
    if quant in ("nf4", "fp4") and p.kind == "experts" and len(p.shape) > 2:
        return ((-(-p.numel // 2), PACKED), (-(-p.numel // BLOCK) * 4, SCALES))
    if quant == "mxfp4" and (sizes := packed_bytes(scheme or plain(quant), p)):
        return ((sizes[0], PACKED), *((n, SCALES) for n in sizes[1:]))
    return param_bytes(p, dtype, quant, False, scheme)


def _named(stack: Stack, i: int, params: Iterable[Param]) -> Iterator[Param]:
    return (replace(p, name=f"{stack.prefix}.{i}.{p.name}") for p in params)
