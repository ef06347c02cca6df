"""Layers that keep several copies of the residual and mix them (DeepSeek-V4's hyper-connections), without gradients.

b sequences of s tokens, n streams of h, e bytes of an element. The small matrices that mix them are left out.
Source: transformers 5.17, models/deepseek_v4/modeling_deepseek_v4.py `DeepseekV4HyperConnection`, `DeepseekV4HyperHead`
and `DeepseekV4DecoderLayer`; checked event by event on the meta device.
"""

from hfvram.memory.blocks import HIDDEN, normalize
from hfvram.memory.forward import Forward
from hfvram.memory.mixers import feed, mix
from hfvram.memory.timeline import Tag, Timeline
from hfvram.model.layers import FeedForward, Layer, MixtureOfExperts

HYPER = "transformers 5.17: DeepseekV4HyperConnection.forward"
STREAMS = Tag("residual streams", "activations", "b·s·n·h·e", HYPER)
WIDE = Tag("residual streams in fp32", "activations", "b·s·n·h·4", HYPER)


def streams_layer(t: Timeline, f: Forward, layer: Layer, width: int, cache: list[int]) -> int:
    """Each part reads one collapsed stream, and its output goes to all of them, mixed anew. Returns their handle."""
    kept: list[int] = []
    streams: int | None = None
    collapsed: int | None = None
    for part in (*layer.mixers, layer.feed_forward):
        if part is None:
            continue
        before = collapsed
        collapsed = collapse(t, f, width, layer.streams)
        if before is not None:
            t.free(before)
        normed = normalize(t, f, width, layer.norm)
        if isinstance(part, FeedForward | MixtureOfExperts):
            kept.append(feed(t, f, part))
        else:
            out, weights = mix(t, f, part, cache)
            kept += [out, *weights]
        t.free(normed)
        nbytes = f.bytes(width * layer.streams)
        spread, mixed = t.alloc(nbytes, STREAMS), t.alloc(nbytes, STREAMS)
        total = t.alloc(nbytes, STREAMS)
        t.free(spread, mixed)
        if streams is not None:
            t.free(streams)
        streams = total
    t.free(*kept, *([] if collapsed is None else [collapsed]))
    return t.alloc(f.bytes(width * layer.streams), STREAMS) if streams is None else streams


def collapse(t: Timeline, f: Forward, width: int, streams: int) -> int:
    """All streams to one: normalized in fp32 for the weights, then weighted in fp32. Returns its handle."""
    wide = f.fp32_bytes(width * streams)
    copied = t.alloc(wide, WIDE)
    t.moment(WIDE, wide)
    flat = t.alloc(wide, WIDE)
    t.free(copied)
    weighted, total = t.alloc(wide, WIDE), t.alloc(f.fp32_bytes(width), WIDE)
    t.free(weighted)
    out = t.alloc(f.bytes(width), HIDDEN)
    t.free(total, flat)
    return out
