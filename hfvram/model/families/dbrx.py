"""DBRX: fused projections, LayerNorm without bias, experts in flat tensors.

Source: transformers 5.17, models/dbrx/{modeling, configuration}_dbrx.py.
"""

from hfvram.model.architecture import Architecture
from hfvram.model.config import Config
from hfvram.model.families import blocks
from hfvram.model.families.decoder import decoder
from hfvram.model.families.defaults import known, section
from hfvram.model.layers import Layer, MixtureOfExperts, Param, Rotary, linear, norm


def read(config: Config, class_name: str | None) -> Architecture:
    config = known(config)
    layers = (layer(config, config.size("hidden_size")),) * config.layers("num_hidden_layers")
    return decoder(config, class_name, layers, module="blocks", embed="wte", final="norm_f", final_norm="layer")


def layer(config: Config, hidden: int) -> Layer:
    heads = config.size("num_attention_heads")
    head_dim = config.divided("d_model", hidden, heads)
    attention = blocks.fused_attention(
        "norm_attn_norm.attn",
        hidden,
        heads,
        head_dim,
        section(config, "attn_config").size("kv_n_heads"),
        projections=("Wqkv", "out_proj"),
        rotary=Rotary(dim=head_dim),
    )
    return Layer(
        mixers=(attention,),
        feed_forward=mixture(section(config, "ffn_config"), hidden),
        norm="layer",
        params=norm("norm_attn_norm.norm_1", hidden) + norm("norm_attn_norm.norm_2", hidden),
    )


def mixture(config: Config, hidden: int) -> MixtureOfExperts:
    """The experts of a layer lie under each other in three matrices, and run one after the other."""
    count, width = config.size("moe_num_experts"), config.size("ffn_hidden_size")
    activation = config.section("ffn_act_fn") or Config({})
    return MixtureOfExperts(
        hidden_size=hidden,
        experts=count,
        top_k=config.size("moe_top_k", high=count),
        intermediate_size=width,
        activation=activation.text("name", default="silu"),
        routing_fp32=False,
        fused=False,
        params=linear("ffn.router.layer", hidden, count)
        + tuple(Param(f"ffn.experts.mlp.{name}", (count * width, hidden), "experts") for name in ("w1", "v1", "w2")),
    )
