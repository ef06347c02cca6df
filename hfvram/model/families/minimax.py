"""MiniMax-01: lightning attention with softmax attention between, a mixture of experts in every layer.

Source: transformers 5.17, models/minimax/modeling_minimax.py and configuration_minimax.py.
"""

from functools import cache

from hfvram.model.architecture import Architecture
from hfvram.model.config import Config
from hfvram.model.families.blocks import attention, fused_experts, others
from hfvram.model.families.common import head_sizes, rotary
from hfvram.model.families.decoder import decoder, hybrid_kinds
from hfvram.model.families.defaults import known
from hfvram.model.layers import Attention, Layer, LightningAttention, MixtureOfExperts, Param, linear, norm


def read(config: Config, class_name: str | None) -> Architecture:
    config = known(config)
    hidden = config.size("hidden_size")

    @cache
    def layer(kind: str) -> Layer:
        return Layer(
            mixers=(softmax(config, hidden) if kind == "full_attention" else lightning(config, hidden),),
            feed_forward=experts(config, hidden),
            params=norm("input_layernorm", hidden) + norm("post_attention_layernorm", hidden),
        )

    pattern = ["linear_attention" if i % 2 else "full_attention" for i in range(config.layers("num_hidden_layers"))]
    kinds = hybrid_kinds(config, pattern)
    return decoder(config, class_name, map(layer, kinds))


def softmax(config: Config, hidden: int) -> Attention:
    heads, kv_heads, head_dim = head_sizes(config, hidden)
    window = config.size("sliding_window", default=0, low=0) or None
    return attention(
        "self_attn",
        hidden,
        heads,
        head_dim,
        kv_heads,
        kind="sliding_attention" if window else "full_attention",
        window=window,
        rotary=rotary(config, head_dim),
    )


def lightning(config: Config, hidden: int) -> LightningAttention:
    """Linear attention in blocks of `block_size`, with buffers of each head's decay within a block."""
    heads, _, head_dim = head_sizes(config, hidden)
    wide, block = heads * head_dim, config.size("block_size")
    decays = {
        "slope_rate": (heads, 1, 1),
        "query_decay": (heads, block, 1),
        "key_decay": (heads, block, 1),
        "diagonal_decay": (1, heads, block, block),
    }
    return LightningAttention(
        hidden_size=hidden,
        heads=heads,
        head_dim=head_dim,
        block_size=block,
        params=norm("self_attn.norm", wide)
        + linear("self_attn.qkv_proj", hidden, 3 * wide)
        + linear("self_attn.out_proj", wide, hidden)
        + linear("self_attn.output_gate", hidden, wide)
        + others("self_attn", decays, "buffer"),
    )


def experts(config: Config, hidden: int) -> MixtureOfExperts:
    count, width = config.size("num_local_experts"), config.size("intermediate_size")
    return MixtureOfExperts(
        hidden_size=hidden,
        experts=count,
        top_k=config.size("num_experts_per_tok"),
        intermediate_size=width,
        activation=config.text("hidden_act", default="silu"),
        params=(
            Param("mlp.gate.weight", (count, hidden), "other"),
            *fused_experts("mlp.experts", count, hidden, width),
        ),
    )
