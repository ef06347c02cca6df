"""llama.cpp's compute buffer: what the graph of one ubatch holds at once beside weights and cache.

ggml's allocator reuses tensors as soon as nothing reads them, so that the widest layer decides; the exact order is not
followed here. Builds differ: the server's of 2026 computes logits for few tokens, older ones for all of the ubatch.
Calibrated on what logs print (27B with 32,768 cells: 154 MiB at a ubatch of 512, 38.5 at 128; older builds: 258.5 MiB
for Llama 3 8B, 70.5 for Llama 2 7B, 300.75 for Qwen3 1.7B), within 15 %; of models with many experts and latent
attention buffers several times as large are known.

Source: llama.cpp b10635, src/llama-context.cpp (sched_reserve), ggml/src/ggml-alloc.c.
"""

from hfvram.memory.serving.llama_cache import Cells
from hfvram.model.architecture import Architecture
from hfvram.model.layers import Attention, GatedDeltaNet, LatentAttention, Layer, Mamba1, Mamba2, MixtureOfExperts

FP32 = 4
RESIDUALS = 4
"""Hidden states that live beside the widest part: the stream, its norm, input and output. Calibrated."""


def layer_width(layer: Layer) -> int:
    """Elements a token of the widest part of a layer: gate and up, or what attention or a state space projects."""
    widths = [0]
    for mixer in layer.mixers:
        match mixer:
            case Attention():
                keys = mixer.kv_heads * (mixer.head_dim + mixer.value_dim)
                widths.append(2 * mixer.heads * mixer.head_dim + keys)
            case LatentAttention():
                wide = mixer.kv_lora_rank + mixer.qk_rope_head_dim
                widths.append(mixer.heads * (2 * wide + mixer.head_dim))
            case GatedDeltaNet():
                widths.append(2 * mixer.conv_dim + 4 * mixer.value_heads * mixer.value_dim)
            case Mamba2():
                widths.append(2 * mixer.conv_dim + 2 * mixer.d_inner)
            case Mamba1():
                widths.append(5 * mixer.d_inner)
            case _:
                pass
    feed = layer.feed_forward
    if isinstance(feed, MixtureOfExperts):
        routed = feed.top_k * (2 * feed.intermediate_size + (feed.latent_size or feed.hidden_size))
        widths.append(routed + 2 * feed.shared_intermediate_size + 2 * feed.experts)
    elif feed:
        widths.append((2 if feed.gated else 1) * feed.intermediate_size)
    return max(widths)


def mask_bytes(a: Architecture, cells: Cells) -> int:
    """One fp16 mask of cells × ubatch for the layers that see all, one for those with a window."""
    mixers = [m for layer in a.text.layers for m in layer.mixers if isinstance(m, (Attention, LatentAttention))]
    windows = {m.window for m in mixers if isinstance(m, Attention) and m.window and m.kind != "full_attention"}
    full = any(isinstance(m, LatentAttention) or m.kind == "full_attention" for m in mixers)
    each = [cells.full] * full + [cells.window(w) for w in windows]
    return 2 * tokens(cells) * sum(each)


def tokens(cells: Cells) -> int:
    """Tokens of an ubatch."""
    return min(cells.ubatch, cells.full)


def compute_bytes(a: Architecture, cells: Cells, attention: bool = False) -> tuple[int, int, int]:
    """The least, the likely and the most that the buffer has: 4·ubatch·(4h + the widest layer) and the masks.

    `attention` is without flash attention: scores of heads · cells · ubatch in fp32. The most has the logits of all
    tokens, 4·ubatch·(V + h), where those are more.
    """
    batch = tokens(cells)
    layers = {id(x): x for x in a.text.layers}.values()
    wide = FP32 * batch * (RESIDUALS * a.hidden_size + max(map(layer_width, layers), default=0))
    masks = mask_bytes(a, cells)
    if attention:
        heads = max((m.heads for x in layers for m in x.mixers if isinstance(m, Attention)), default=0)
        wide += FP32 * batch * cells.full * heads
        masks *= 2
    logits = FP32 * batch * (a.vocab_size + a.hidden_size) if a.generates else 0
    return masks + wide // 2, masks + wide, masks + max(wide * 3 // 2, logits)
