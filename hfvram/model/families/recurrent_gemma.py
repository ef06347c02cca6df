"""RecurrentGemma (Griffin): two layers with a real-gated linear recurrent unit, then one with a sliding window.

Source: transformers 5.17, models/recurrent_gemma/modeling_recurrent_gemma.py and configuration_recurrent_gemma.py.
"""

from functools import cache

from hfvram.errors import HfvramError, printable
from hfvram.model.architecture import Architecture
from hfvram.model.config import Config
from hfvram.model.families.blocks import attention, convolution, gated_mlp, others
from hfvram.model.families.common import rotary
from hfvram.model.families.decoder import decoder
from hfvram.model.families.defaults import known
from hfvram.model.layers import RGLRU, Attention, Layer, linear, norm


def read(config: Config, class_name: str | None) -> Architecture:
    config = known(config)
    hidden, activation = config.size("hidden_size"), config.text("hidden_activation", default="gelu_pytorch_tanh")

    @cache
    def layer(kind: str) -> Layer:
        return Layer(
            mixers=(windowed(config, hidden) if kind == "attention" else recurrent(config, hidden),),
            feed_forward=gated_mlp("mlp_block", hidden, config.size("intermediate_size") // 2, activation, bias=True),
            params=norm("temporal_pre_norm", hidden) + norm("channel_pre_norm", hidden),
        )

    return decoder(config, class_name, map(layer, kinds(config)), final="final_norm", logits_softcap=True)


def kinds(config: Config) -> list[str]:
    """`block_types`, over and over to the model's depth."""
    pattern = config.strings("block_types", "_block_types") or ["recurrent", "recurrent", "attention"]
    for kind in pattern:
        if kind not in ("recurrent", "attention"):
            where = f"layer kind {printable(kind, 40)!r} of recurrent_gemma"
            raise HfvramError("unknown_architecture", f"{where} is not known")
    return [pattern[i % len(pattern)] for i in range(config.layers("num_hidden_layers"))]


def windowed(config: Config, hidden: int) -> Attention:
    heads = config.size("num_attention_heads")
    head_dim = config.divided("hidden_size", hidden, heads)
    kv_heads = config.size("num_key_value_heads", default=heads)
    bias = config.flag("attention_bias")
    return attention(
        "temporal_block",
        hidden,
        heads,
        head_dim,
        kv_heads,
        bias=bias,
        out_bias=True,
        kind="sliding_attention",
        window=config.size("attention_window_size"),
        rotary=rotary(config, head_dim, 0.5),
    )


def recurrent(config: Config, hidden: int) -> RGLRU:
    """Two branches of `lru_width`: a convolution and the recurrence on one, an activation on the other."""
    width, heads = config.size("lru_width", default=hidden), config.size("num_attention_heads")
    block, kernel, name = config.divided("lru_width", width, heads), config.size("conv1d_width"), "temporal_block"
    gates = {
        "recurrent_param": (width,),
        "input_gate_weight": (heads, block, block),
        "input_gate_bias": (heads, block),
        "recurrent_gate_weight": (heads, block, block),
        "recurrent_gate_bias": (heads, block),
    }
    return RGLRU(
        hidden_size=hidden,
        width=width,
        heads=heads,
        d_conv=kernel,
        params=linear(f"{name}.linear_y", hidden, width, bias=True)
        + linear(f"{name}.linear_x", hidden, width, bias=True)
        + linear(f"{name}.linear_out", width, hidden, bias=True)
        + convolution(f"{name}.conv_1d", width, 1, kernel)
        + others(f"{name}.rg_lru", gates),
    )
