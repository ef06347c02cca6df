"""Gemma 4's towers: a vision encoder of patches, and a conformer for sound.

Source: transformers 5.17, models/gemma4/modeling_gemma4.py.
"""

from dataclasses import replace

from hfvram.errors import HfvramError
from hfvram.model.architecture import Stack
from hfvram.model.config import Config
from hfvram.model.families import blocks
from hfvram.model.families.encoder import ENCODER
from hfvram.model.layers import Layer, Param, Rotary, linear, norm

SANDWICH = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def vision(config: Config, prefix: str) -> Stack:
    hidden, heads, head_dim = config.size("hidden_size"), config.size("num_attention_heads"), config.size("head_dim")
    attention = blocks.attention(
        "self_attn",
        hidden,
        heads,
        head_dim,
        config.size("num_key_value_heads"),
        projections=("q_proj.linear", "k_proj.linear", "v_proj.linear", "o_proj.linear"),
        extra=norm("self_attn.q_norm", head_dim) + norm("self_attn.k_norm", head_dim),
        rotary=Rotary(dim=head_dim),
        qk_norm="head",
        **ENCODER,
    )
    feed = blocks.gated_mlp(
        "mlp",
        hidden,
        config.size("intermediate_size"),
        config.text("hidden_activation", default="gelu_pytorch_tanh"),
        projections=("gate_proj.linear", "up_proj.linear", "down_proj.linear"),
    )
    layer = Layer(
        mixers=(attention,),
        feed_forward=feed,
        norm_position="both",
        params=tuple(p for name in SANDWICH for p in norm(name, hidden)),
    )
    return Stack(
        name="vision",
        prefix=f"{prefix}encoder.layers",
        hidden_size=hidden,
        before=(
            Param(
                f"{prefix}patch_embedder.position_embedding_table",
                (2, config.size("position_embedding_size"), hidden),
                "other",
            ),
            *linear(f"{prefix}patch_embedder.input_proj", 3 * config.size("patch_size") ** 2, hidden),
        ),
        layers=(layer,) * config.layers("num_hidden_layers"),
    )


def audio(config: Config, prefix: str) -> Stack:
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    head_dim = config.divided("hidden_size", hidden, heads)
    channels = config.items("subsampling_conv_channels") or [128, 32]
    if len(channels) != 2:
        raise HfvramError("bad_config", "config.json: subsampling_conv_channels is not a pair")
    first, second = (Config({"channels": c}).size("channels") for c in channels)
    attention = blocks.attention(
        "self_attn",
        hidden,
        heads,
        head_dim,
        projections=("q_proj.linear", "k_proj.linear", "v_proj.linear", "post.linear"),
        extra=(
            *linear("self_attn.relative_k_proj", hidden, hidden),
            Param("self_attn.per_dim_scale", (head_dim,), "other"),
        ),
        softcap=True,
        implementations=("eager",),
        **ENCODER,
    )
    half = blocks.mlp(
        "feed_forward1.ffw_layer_1.linear",
        "feed_forward1.ffw_layer_2.linear",
        hidden,
        4 * hidden,
        config.text("hidden_act", default="silu"),
        bias=False,
    )
    other = tuple(replace(p, name=p.name.replace("feed_forward1", "feed_forward2")) for p in half.params)
    norms = (
        *("feed_forward1.pre_layer_norm", "feed_forward1.post_layer_norm"),
        *("feed_forward2.pre_layer_norm", "feed_forward2.post_layer_norm"),
        *("lconv1d.pre_layer_norm", "lconv1d.conv_norm", "norm_pre_attn", "norm_post_attn", "norm_out"),
    )
    layer = Layer(
        mixers=(attention,),
        feed_forward=half,
        norm_position="both",
        params=(
            *other,
            *linear("lconv1d.linear_start.linear", hidden, 2 * hidden),
            *linear("lconv1d.linear_end.linear", hidden, hidden),
            *blocks.convolution("lconv1d.depthwise_conv1d", hidden, 1, config.size("conv_kernel_size"), bias=False),
            *(p for name in norms for p in norm(name, hidden)),
        ),
    )
    subsample = f"{prefix}subsample_conv_projection"
    return Stack(
        name="audio",
        prefix=f"{prefix}layers",
        hidden_size=hidden,
        before=(
            *blocks.convolution(f"{subsample}.layer0.conv", first, 1, 3, 3, bias=False),
            *norm(f"{subsample}.layer0.norm", first),
            *blocks.convolution(f"{subsample}.layer1.conv", second, first, 3, 3, bias=False),
            *norm(f"{subsample}.layer1.norm", second),
            *linear(f"{subsample}.input_proj_linear", first // 4 * second, hidden),
        ),
        layers=(layer,) * config.layers("num_hidden_layers"),
        after=linear(f"{prefix}output_proj", hidden, config.size("output_proj_dims"), True),
    )
