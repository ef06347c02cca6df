"""Hybrids with Mamba-2 under Bamba's keys: Bamba, Granite 4, and Falcon-H1 with both mixers side by side in each layer.

Source: transformers 5.17, models/{bamba, granitemoehybrid, falcon_h1}/modeling_*.py and configuration_*.py.
"""

from functools import cache

from hfvram.model.architecture import Architecture
from hfvram.model.config import Config
from hfvram.model.families.blocks import attention, fused_experts, fused_gated_mlp, gated_mlp
from hfvram.model.families.common import head_sizes, rotary
from hfvram.model.families.decoder import decoder, hybrid_kinds
from hfvram.model.families.defaults import known
from hfvram.model.families.recurrent import mamba2_of
from hfvram.model.layers import Attention, FeedForward, Layer, Mamba2, MixtureOfExperts, Param, Rotary, norm

NORMS = {"granitemoehybrid": "post_attention_layernorm", "bamba": "pre_ff_layernorm", "falcon_h1": "pre_ff_layernorm"}


def read(config: Config, class_name: str | None) -> Architecture:
    config = known(config)
    hidden = config.size("hidden_size")
    feed_forward = granite_feed_forward if config.model_type == "granitemoehybrid" else dense

    @cache
    def layer(kind: str) -> Layer:
        state = () if kind == "full_attention" else (state_space(config, hidden),)
        softmax = () if kind == "linear_attention" else (self_attention(config, hidden),)
        return Layer(
            mixers=state + softmax,
            feed_forward=feed_forward(config, hidden),
            params=norm("input_layernorm", hidden) + norm(NORMS[config.model_type], hidden),
        )

    final = "norm" if config.model_type == "granitemoehybrid" else "final_layernorm"
    return decoder(config, class_name, map(layer, kinds(config)), final=final, z_loss=z_loss(config))


def z_loss(config: Config) -> bool:
    """Whether Bamba's loss has a second part."""
    return config.model_type == "bamba" and config.number("z_loss_coefficient", default=0.0) > 0


def kinds(config: Config) -> list[str]:
    """`layer_types` in Granite, `attn_layer_indices` in Bamba, `hybrid` (both mixers) throughout in Falcon-H1."""
    layers = config.layers("num_hidden_layers")
    if config.model_type == "falcon_h1":
        return ["hybrid"] * layers
    if config.model_type == "bamba":
        softmax = config.items("attn_layer_indices") or []
        return ["full_attention" if i in softmax else "linear_attention" for i in range(layers)]
    return hybrid_kinds(config, ["linear_attention"] * layers, ("layer_types", "layers_block_type"))


def state_space(config: Config, hidden: int) -> Mamba2:
    """Falcon-H1 gives the state space's width as `mamba_d_ssm`."""
    inner = config.size("mamba_d_ssm", default=0) if config.model_type == "falcon_h1" else 0
    return mamba2_of(config, "mamba", hidden, inner or None)


def self_attention(config: Config, hidden: int) -> Attention:
    heads, kv_heads, head_dim = head_sizes(config, hidden)
    return attention(
        "self_attn",
        hidden,
        heads,
        head_dim,
        kv_heads,
        bias=config.flag("attention_bias"),
        rotary=positions(config, head_dim),
    )


def positions(config: Config, head_dim: int) -> Rotary | None:
    """Granite has rotary positions only where `position_embedding_type` says so; Bamba rotates half of each head."""
    if config.model_type == "granitemoehybrid" and config.text("position_embedding_type", default="") != "rope":
        return None
    return rotary(config, head_dim, 0.5 if config.model_type == "bamba" else 1.0)


def dense(config: Config, hidden: int) -> FeedForward:
    width, activation = config.size("intermediate_size"), config.text("hidden_act", default="silu")
    return gated_mlp("feed_forward", hidden, width, activation, config.flag("mlp_bias"))


def granite_feed_forward(config: Config, hidden: int) -> FeedForward | MixtureOfExperts:
    """A shared feed-forward that every token passes, and with `num_local_experts` routed ones beside it."""
    count, shared = config.size("num_local_experts", default=0, low=0), config.size("shared_intermediate_size")
    activation = config.text("hidden_act", default="silu")
    common = fused_gated_mlp("shared_mlp", hidden, shared, activation, ("input_linear", "output_linear"))
    if not count:
        return common
    width = config.size("intermediate_size")
    router = (Param("block_sparse_moe.router.weight", (count, hidden), "other"),)
    return MixtureOfExperts(
        hidden_size=hidden,
        experts=count,
        top_k=config.size("num_experts_per_tok"),
        intermediate_size=width,
        shared_intermediate_size=shared,
        activation=activation,
        routing_fp32=False,
        auxiliary=config.flag("output_router_logits"),
        params=router + fused_experts("block_sparse_moe.experts", count, hidden, width) + common.params,
    )
