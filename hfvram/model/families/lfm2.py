"""LFM2 and its mixture of experts: gated short convolutions with grouped-query attention between them.

Source: transformers 5.17, models/{lfm2, lfm2_moe}/modeling_*.py and configuration_*.py.
"""

from functools import cache

from hfvram.model.architecture import Architecture
from hfvram.model.config import Config
from hfvram.model.families.blocks import attention, convolution, fused_experts, gated_mlp
from hfvram.model.families.common import head_sizes, rotary
from hfvram.model.families.decoder import decoder, hybrid_kinds
from hfvram.model.families.defaults import known
from hfvram.model.layers import Attention, FeedForward, Layer, MixtureOfExperts, Param, ShortConv, linear, norm


def read(config: Config, class_name: str | None) -> Architecture:
    """Listed by `layer_types`, or attention in the layers of `full_attn_idxs` (in all of them without that key)."""
    config = known(config)
    hidden, layers = config.size("hidden_size"), config.layers("num_hidden_layers")
    listed = config.items("full_attn_idxs")
    attends = range(layers) if listed is None else listed
    pattern = ["full_attention" if i in attends else "conv" for i in range(layers)]
    kinds = hybrid_kinds(config, pattern)
    first_routed = config.layers("num_dense_layers") if config.model_type == "lfm2_moe" else layers

    @cache
    def layer(kind: str, routes: bool) -> Layer:
        return Layer(
            mixers=(softmax(config, hidden) if kind == "full_attention" else short_convolution(config, hidden),),
            feed_forward=experts(config, hidden) if routes else dense(config, hidden),
            params=norm("operator_norm", hidden) + norm("ffn_norm", hidden),
        )

    # Configurations of LFM2 call the tie `tie_embedding`.
    values = {**config.values, "tie_word_embeddings": config.flag("tie_embedding", "tie_word_embeddings", default=True)}
    config = Config(values, config.defaults, config.aliases)
    text = (layer(kind, i >= first_routed) for i, kind in enumerate(kinds))
    return decoder(config, class_name, text, final="embedding_norm")


def softmax(config: Config, hidden: int) -> Attention:
    heads, kv_heads, head_dim = head_sizes(config, hidden)
    return attention(
        "self_attn",
        hidden,
        heads,
        head_dim,
        kv_heads,
        projections=("q_proj", "k_proj", "v_proj", "out_proj"),
        rotary=rotary(config, head_dim),
        qk_norm="head",
        extra=norm("self_attn.q_layernorm", head_dim) + norm("self_attn.k_layernorm", head_dim),
    )


def short_convolution(config: Config, hidden: int) -> ShortConv:
    """A convolution over a few tokens between two gates, which one projection makes together."""
    kernel, bias = config.size("conv_L_cache"), config.flag("conv_bias")
    return ShortConv(
        hidden_size=hidden,
        d_conv=kernel,
        params=convolution("conv.conv", hidden, 1, kernel, bias=bias)
        + linear("conv.in_proj", hidden, 3 * hidden, bias)
        + linear("conv.out_proj", hidden, hidden, bias),
    )


def dense(config: Config, hidden: int) -> FeedForward:
    return gated_mlp("feed_forward", hidden, width(config), projections=("w1", "w3", "w2"))


def width(config: Config) -> int:
    """Of the feed-forward: in LFM2 two thirds of what is given, times a factor, rounded up to a multiple."""
    given = config.size("block_ff_dim", "intermediate_size")
    if config.model_type == "lfm2_moe" or not config.flag("block_auto_adjust_ff_dim"):
        return config.size("intermediate_size") if config.model_type == "lfm2_moe" else given
    factor, multiple = config.number("block_ffn_dim_multiplier", default=1.0), config.size("block_multiple_of")
    scaled = -(-int(factor * int(2 * given / 3)) // multiple) * multiple
    return Config({"block_ffn_dim_multiplier": scaled}).size("block_ffn_dim_multiplier")


def experts(config: Config, hidden: int) -> MixtureOfExperts:
    count, each = config.size("num_experts"), config.size("moe_intermediate_size")
    return MixtureOfExperts(
        hidden_size=hidden,
        experts=count,
        top_k=config.size("num_experts_per_tok"),
        intermediate_size=each,
        routing_fp32=False,
        normalized=config.flag("norm_topk_prob"),
        choice_bias=config.flag("use_expert_bias"),
        params=(
            *fused_experts("feed_forward.experts", count, hidden, each),
            Param("feed_forward.gate.weight", (count, hidden), "other"),
        ),
    )
