"""OLMo Hybrid: gated delta nets, and softmax attention in every fourth layer.

Source: transformers 5.17, models/olmo_hybrid/modeling_olmo_hybrid.py and configuration_olmo_hybrid.py.
"""

from functools import cache

from hfvram.errors import HfvramError
from hfvram.model.architecture import Architecture
from hfvram.model.config import Config
from hfvram.model.families.blocks import attention, convolution, gated_mlp, others
from hfvram.model.families.common import head_sizes, rotary
from hfvram.model.families.decoder import decoder, hybrid_kinds
from hfvram.model.families.defaults import known
from hfvram.model.layers import Attention, GatedDeltaNet, Layer, Param, Rotary, linear, norm


def read(config: Config, class_name: str | None) -> Architecture:
    """Attention layers are normalized after each part, as in OLMo 2, delta nets before."""
    config = known(config)
    hidden, layers = config.size("hidden_size"), config.layers("num_hidden_layers")
    pattern = ["linear_attention" if (i + 1) % 4 else "full_attention" for i in range(layers)]
    if layers and "full_attention" not in pattern:
        pattern[-1] = "full_attention"
    kinds = hybrid_kinds(config, pattern)
    if len(set(kinds)) != 2:
        raise HfvramError("bad_config", "config.json: olmo_hybrid needs layers of both kinds in layer_types")
    feed = gated_mlp("mlp", hidden, config.size("intermediate_size"), config.text("hidden_act", default="silu"))

    @cache
    def layer(kind: str) -> Layer:
        if kind == "full_attention":
            names, mixer = ("post_attention_layernorm", "post_feedforward_layernorm"), softmax(config, hidden)
            norms = norm(names[0], hidden) + norm(names[1], hidden)
            return Layer(mixers=(mixer,), feed_forward=feed, norm_position="post", params=norms)
        norms = norm("input_layernorm", hidden) + norm("post_attention_layernorm", hidden)
        return Layer(mixers=(delta_net(config, hidden),), feed_forward=feed, params=norms)

    return decoder(config, class_name, map(layer, kinds))


def softmax(config: Config, hidden: int) -> Attention:
    heads, kv_heads, head_dim = head_sizes(config, hidden)
    return attention(
        "self_attn",
        hidden,
        heads,
        head_dim,
        kv_heads,
        bias=config.flag("attention_bias"),
        rotary=positions(config, head_dim),
        qk_norm="full",
        extra=norm("self_attn.q_norm", heads * head_dim) + norm("self_attn.k_norm", kv_heads * head_dim),
    )


def positions(config: Config, head_dim: int) -> Rotary | None:
    """None where the configuration says that there is no base (`rope_theta: null` in `rope_parameters`)."""
    given = config.section("rope_parameters", "rope_scaling")
    none = given is not None and "rope_theta" in given.values and given.get("rope_theta") is None
    return None if none else rotary(config, head_dim)


def delta_net(config: Config, hidden: int) -> GatedDeltaNet:
    """A projection each for queries, keys, values, gate, β and α."""
    heads = config.size("num_attention_heads")
    key_heads = config.size("linear_num_key_heads", default=heads)
    value_heads = config.size("linear_num_value_heads", default=heads)
    key_dim = config.size("linear_key_head_dim", default=int(0.75 * hidden / key_heads))
    value_dim = config.size("linear_value_head_dim", default=2 * key_dim)
    keys, values, kernel = key_heads * key_dim, value_heads * value_dim, config.size("linear_conv_kernel_dim")
    widths = {"q": keys, "k": keys, "v": values, "a": value_heads, "b": value_heads, "g": values}
    projections = [linear(f"linear_attn.{name}_proj", hidden, width) for name, width in widths.items()]
    return GatedDeltaNet(
        hidden_size=hidden,
        key_heads=key_heads,
        value_heads=value_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        d_conv=kernel,
        fused_projection=False,
        params=(
            Param("linear_attn.A_log", (value_heads,), "other", "fp32"),
            *others("linear_attn", {"dt_bias": (value_heads,)}),
            *(p for projection in projections for p in projection),
            *linear("linear_attn.o_proj", values, hidden),
            *convolution("linear_attn.conv1d", 2 * keys + values, 1, kernel, bias=False),
            *norm("linear_attn.o_norm", value_dim),
        ),
    )
