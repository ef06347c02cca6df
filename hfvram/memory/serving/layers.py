"""Which cache a layer has, on one of `tp` ranks."""

from hfvram.errors import HfvramError
from hfvram.memory.serving.specs import ChunkCache, FullCache, LatentCache, StateCache, TokenCache, WindowCache
from hfvram.model.layers import (
    Attention,
    CompressedAttention,
    GatedDeltaNet,
    LatentAttention,
    Layer,
    LightningAttention,
    Mamba1,
    Mamba2,
    Mixer,
    ShortConv,
)

SPARSE_FP8_BYTES = 656
"""A token's latent vector as `fp8_ds_mla`: 512 of fp8, 4 scales, 64 of bf16 (v1/kv_cache_interface.py)."""


def kv_heads(heads: int, tp: int) -> int:
    """KV heads of one rank: replicated where there are fewer than ranks (config/model.py, get_num_kv_heads)."""
    return max(1, heads // tp)


def split(count: int, tp: int, what: str) -> int:
    """A rank's share of what must divide. Raises `usage`."""
    if count % tp:
        raise HfvramError("usage", f"--tp {tp} does not divide the {count:,} {what}")
    return count // tp


def attention_cache(mixer: Attention | LatentAttention, element_bytes: int, tp: int, windowed: bool) -> TokenCache:
    """The cache of an attention layer; `windowed` is False where the engine keeps all tokens whatever the window."""
    if isinstance(mixer, LatentAttention):
        wide = (mixer.kv_lora_rank + mixer.qk_rope_head_dim) * element_bytes
        if mixer.index_top_k:
            wide = SPARSE_FP8_BYTES if element_bytes == 1 else wide
            index = mixer.index_head_dim + 4 * -(-mixer.index_head_dim // 128) if mixer.index_heads else 0
            return LatentCache(wide + index)
        return LatentCache(wide)
    sizes = (kv_heads(mixer.kv_heads, tp), mixer.head_dim, mixer.value_dim, element_bytes)
    if windowed and mixer.kind == "sliding_attention" and mixer.window:
        return WindowCache(*sizes, window=mixer.window)
    if windowed and mixer.kind == "chunked_attention" and mixer.window:
        return ChunkCache(*sizes, chunk=mixer.window)
    return FullCache(*sizes)


def state_cache(mixer: Mixer, tp: int, conv_e: int, state_e: int, block: int) -> StateCache:
    """The state of a recurrent layer: d_conv − 1 columns, and the state itself. Raises `usage` for other kinds.

    A Mamba-2 with fewer groups than ranks has each rank's group replicated. Source: vLLM 0.19.0,
    model_executor/layers/mamba/mamba_utils.py; SGLang 0.5.23, configs/mamba_utils.py.
    """
    match mixer:
        case Mamba1():
            inner = split(mixer.d_inner, tp, "channels of Mamba")
            conv, state = inner * (mixer.d_conv - 1), inner * mixer.d_state
        case Mamba2():
            groups = mixer.groups if mixer.groups % tp == 0 else tp
            width = split(mixer.d_inner + 2 * groups * mixer.d_state, tp, "channels of Mamba-2")
            conv = width * (mixer.d_conv - 1)
            state = split(mixer.heads, tp, "heads of Mamba-2") * mixer.head_dim * mixer.d_state
        case GatedDeltaNet():
            conv = split(mixer.conv_dim, tp, "channels of linear attention") * (mixer.d_conv - 1)
            state = split(mixer.value_heads, tp, "heads of linear attention") * mixer.value_dim * mixer.key_dim
        case LightningAttention():
            conv, state = 0, split(mixer.heads, tp, "heads of linear attention") * mixer.head_dim**2
        case ShortConv():
            conv, state = split(mixer.hidden_size, tp, "channels of the convolution") * (mixer.d_conv - 1), 0
        case _:
            kind = "compressed attention (DeepSeek-V4)" if isinstance(mixer, CompressedAttention) else mixer.kind
            raise HfvramError("usage", f"no serving engine here knows the cache of {kind} layers")
    return StateCache(conv * conv_e, state * state_e, block)


def attending(layer: Layer, shared: bool = False) -> list[Attention | LatentAttention]:
    """The mixers of a layer that keep keys and values of their own, or with `shared` those that read others', too."""
    found = [m for m in layer.mixers if isinstance(m, (Attention, LatentAttention))]
    return [m for m in found if shared or isinstance(m, LatentAttention) or m.cached]


def recurrent(layer: Layer) -> list[Mixer]:
    """The mixers of a layer that keep a state."""
    return [m for m in layer.mixers if not isinstance(m, (Attention, LatentAttention))]
