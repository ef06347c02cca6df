"""Nemotron-H: every layer is one thing, a Mamba-2 mixer (M), attention (*), a feed-forward (-) or experts (E).

Source: transformers 5.17, models/nemotron_h/modeling_nemotron_h.py and configuration_nemotron_h.py.
"""

from functools import cache

from hfvram.errors import HfvramError, printable
from hfvram.model.architecture import Architecture
from hfvram.model.config import MAX_LAYERS, Config
from hfvram.model.families.blocks import attention, fused_experts, mlp
from hfvram.model.families.common import head_sizes
from hfvram.model.families.decoder import decoder, hybrid_kinds
from hfvram.model.families.defaults import known
from hfvram.model.families.recurrent import mamba2
from hfvram.model.layers import Attention, FeedForward, Layer, Mamba2, MixtureOfExperts, Param, linear, norm

LETTERS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}


def read(config: Config, class_name: str | None) -> Architecture:
    config = known(config)
    hidden = config.size("hidden_size")

    @cache
    def layer(kind: str) -> Layer:
        params = norm("norm", hidden)
        if kind == "linear_attention":
            return Layer(mixers=(state_space(config, hidden),), params=params)
        if kind == "full_attention":
            return Layer(mixers=(self_attention(config, hidden),), params=params)
        return Layer(feed_forward=dense(config, hidden) if kind == "mlp" else experts(config, hidden), params=params)

    return decoder(config, class_name, map(layer, kinds(config)), embed="embeddings", final="norm_f")


def kinds(config: Config) -> list[str]:
    """`layers_block_type` where it is listed, else the letters of `hybrid_override_pattern`.

    Their number is the model's depth: `num_hidden_layers` is not read.
    """
    pattern = config.text("hybrid_override_pattern", default="")[: MAX_LAYERS + 1]
    for letter in pattern:
        if letter not in LETTERS:
            where = f"layer kind {printable(letter, 4)!r} in hybrid_override_pattern"
            raise HfvramError("unknown_architecture", f"{where} of nemotron_h is not known")
    if len(pattern) > MAX_LAYERS:
        raise HfvramError("bad_config", f"config.json: hybrid_override_pattern has more than {MAX_LAYERS} layers")
    default = [LETTERS[letter] for letter in pattern or "ME*-"]
    return hybrid_kinds(config, default, ("layers_block_type", "layer_types"), LETTERS.values(), exact=False)


def state_space(config: Config, hidden: int) -> Mamba2:
    return mamba2(
        "mixer",
        hidden,
        config.size("mamba_num_heads"),
        config.size("mamba_head_dim"),
        config.size("ssm_state_size"),
        config.size("mamba_n_groups", "n_groups"),
        config.size("mamba_d_conv", "conv_kernel"),
        config.size("mamba_chunk_size", "chunk_size"),
        bias=config.flag("use_bias"),
        conv_bias=config.flag("mamba_conv_bias", "use_conv_bias"),
    )


def self_attention(config: Config, hidden: int) -> Attention:
    """Grouped-query attention without positions: the Mamba layers know the order."""
    heads, kv_heads, head_dim = head_sizes(config, hidden)
    return attention("mixer", hidden, heads, head_dim, kv_heads)


def dense(config: Config, hidden: int) -> FeedForward:
    width, activation = config.size("intermediate_size"), config.text("mlp_hidden_act", default="relu2")
    return mlp("mixer.up_proj", "mixer.down_proj", hidden, width, activation, config.flag("mlp_bias"))


def experts(config: Config, hidden: int) -> MixtureOfExperts:
    """Routed experts without gates, in the width `moe_latent_size` where that is given, and a shared feed-forward."""
    count, width = config.size("n_routed_experts"), config.size("moe_intermediate_size")
    latent, shared = config.size("moe_latent_size", default=0), config.size("moe_shared_expert_intermediate_size")
    bias, name = config.flag("mlp_bias"), "mixer.shared_experts"
    around = linear("mixer.fc1_latent_proj", hidden, latent, bias) + linear(
        "mixer.fc2_latent_proj", latent, hidden, bias
    )
    return MixtureOfExperts(
        hidden_size=hidden,
        experts=count,
        top_k=config.size("num_experts_per_tok"),
        intermediate_size=width,
        shared_intermediate_size=shared,
        gated=False,
        activation=config.text("mlp_hidden_act", default="relu2"),
        latent_size=latent,
        router_fp32=True,
        params=fused_experts("mixer.experts", count, latent or hidden, width, gated=False)
        + (Param("mixer.gate.weight", (count, hidden), "other"),)
        + linear(f"{name}.up_proj", hidden, shared, bias)
        + linear(f"{name}.down_proj", shared, hidden, bias)
        + (around if latent else ()),
    )
