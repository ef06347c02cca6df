"""Jamba: Mamba layers, attention every `attn_layer_period`, a mixture of experts every `expert_layer_period`.

Source: transformers 5.17, models/jamba/modeling_jamba.py and configuration_jamba.py.
"""

from functools import cache

from hfvram.errors import HfvramError
from hfvram.model.architecture import Architecture
from hfvram.model.config import Config
from hfvram.model.families.blocks import attention, fused_experts, gated_mlp
from hfvram.model.families.common import head_sizes
from hfvram.model.families.decoder import decoder
from hfvram.model.families.defaults import known
from hfvram.model.families.recurrent import dt_rank, mamba1
from hfvram.model.layers import Attention, FeedForward, Layer, Mamba1, MixtureOfExperts, linear, norm


def read(config: Config, class_name: str | None) -> Architecture:
    config = known(config)
    hidden = config.size("hidden_size")

    @cache
    def layer(attends: bool, routes: bool) -> Layer:
        return Layer(
            mixers=(softmax(config, hidden) if attends else state_space(config, hidden),),
            feed_forward=mixture(config, hidden) if routes else dense(config, hidden),
            params=norm("input_layernorm", hidden) + norm("pre_ff_layernorm", hidden),
        )

    attends, routes = period(config, "attn_layer"), period(config, "expert_layer")
    several = config.size("num_experts") > 1
    layers = (
        layer(i % attends[0] == attends[1], several and i % routes[0] == routes[1])
        for i in range(config.layers("num_hidden_layers"))
    )
    return decoder(config, class_name, layers, final="final_layernorm")


def period(config: Config, name: str) -> tuple[int, int]:
    """Every how many layers there is one of this kind, and which of them it is."""
    every, offset = config.size(f"{name}_period"), config.layers(f"{name}_offset")
    if offset >= every:
        raise HfvramError(
            "bad_config", f"config.json: {name}_offset {offset} is not smaller than {name}_period {every}"
        )
    return every, offset


def softmax(config: Config, hidden: int) -> Attention:
    """Grouped-query attention without positions: the Mamba layers know the order."""
    heads, kv_heads, head_dim = head_sizes(config, hidden)
    return attention("self_attn", hidden, heads, head_dim, kv_heads)


def state_space(config: Config, hidden: int) -> Mamba1:
    return mamba1(
        "mamba",
        hidden,
        config.size("mamba_expand") * hidden,
        config.size("mamba_d_state"),
        config.size("mamba_d_conv"),
        dt_rank(config, "mamba_dt_rank", hidden),
        bias=config.flag("mamba_proj_bias"),
        conv_bias=config.flag("mamba_conv_bias"),
        norms="weighted",
    )


def dense(config: Config, hidden: int) -> FeedForward:
    return gated_mlp(
        "feed_forward", hidden, config.size("intermediate_size"), config.text("hidden_act", default="silu")
    )


def mixture(config: Config, hidden: int) -> MixtureOfExperts:
    count, width = config.size("num_experts"), config.size("intermediate_size")
    return MixtureOfExperts(
        hidden_size=hidden,
        experts=count,
        top_k=config.size("num_experts_per_tok"),
        intermediate_size=width,
        activation=config.text("hidden_act", default="silu"),
        routing_fp32=False,
        auxiliary=config.flag("output_router_logits"),
        params=linear("feed_forward.router", hidden, count)
        + fused_experts("feed_forward.experts", count, hidden, width),
    )
