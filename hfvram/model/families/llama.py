"""Llama and those that are built like it: RMSNorm, rotary positions, grouped queries, a gated feed-forward.

Source: transformers 5.17, models/{llama, mistral, qwen2, qwen3}/modeling_*.py and configuration_*.py.
"""

from functools import cache

from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families.common import (
    architecture_class,
    causal_head,
    dtype_of,
    head_sizes,
    layer_kinds,
    max_positions,
    rotary,
)
from hfvram.model.layers import Attention, FeedForward, Layer, Param, linear, norm

CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def read(config: Config, class_name: str | None) -> Architecture:
    kind = config.model_type
    hidden, vocab = config.size("hidden_size"), config.size("vocab_size")
    class_name = architecture_class(config, class_name, f"{CLASSES[kind]}ForCausalLM")
    head, tied, prefix = causal_head(config, class_name, hidden, vocab)

    @cache
    def layer(window: int | None) -> Layer:
        return Layer(
            mixers=(attention(config, hidden, window),),
            feed_forward=feed_forward(config, hidden),
            params=norm("input_layernorm", hidden) + norm("post_attention_layernorm", hidden),
        )

    stack = Stack(
        name="text",
        prefix=f"{prefix}layers",
        hidden_size=hidden,
        before=(Param(f"{prefix}embed_tokens.weight", (vocab, hidden), "embedding"),),
        layers=tuple(layer(window) for window in windows(config)),
        after=norm(f"{prefix}norm", hidden),
    )
    return Architecture(
        model_type=kind,
        class_name=class_name,
        task="causal",
        stacks=(stack,),
        main="text",
        vocab_size=vocab,
        hidden_size=hidden,
        max_positions=max_positions(config),
        dtype=dtype_of(config),
        head=head,
        tied_head=tied,
    )


def windows(config: Config) -> list[int | None]:
    """The sliding window of each layer, None for full attention.

    Mistral's `sliding_window` holds for every layer though no pattern names it; Qwen's only with `use_sliding_window`,
    and from layer `max_window_layers` on.
    """
    layers = config.layers("num_hidden_layers")
    window = config.size("sliding_window", default=0, low=0) or None
    if config.model_type.startswith("qwen") and not config.flag("use_sliding_window"):
        window = None
    if kinds := layer_kinds(config, layers):
        return [window if kind == "sliding_attention" else None for kind in kinds]
    if config.model_type == "mistral":
        return [window] * layers
    if config.model_type.startswith("qwen"):
        first = config.layers("max_window_layers", default=28)
        return [window if i >= first else None for i in range(layers)]
    return [None] * layers


def attention(config: Config, hidden: int, window: int | None) -> Attention:
    heads, kv_heads, head_dim = head_sizes(config, hidden)
    qkv_bias = config.model_type == "qwen2" or config.flag("attention_bias")
    out_bias = config.model_type != "qwen2" and config.flag("attention_bias")
    qk_norm = config.model_type == "qwen3"
    return Attention(
        kind="sliding_attention" if window else "full_attention",
        hidden_size=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=head_dim,
        window=window,
        rotary=rotary(config, head_dim),
        qk_norm="head" if qk_norm else None,
        params=linear("self_attn.q_proj", hidden, heads * head_dim, qkv_bias)
        + linear("self_attn.k_proj", hidden, kv_heads * head_dim, qkv_bias)
        + linear("self_attn.v_proj", hidden, kv_heads * head_dim, qkv_bias)
        + linear("self_attn.o_proj", heads * head_dim, hidden, out_bias)
        + (norm("self_attn.q_norm", head_dim) + norm("self_attn.k_norm", head_dim) if qk_norm else ()),
    )


def feed_forward(config: Config, hidden: int) -> FeedForward:
    width, bias = config.size("intermediate_size"), config.flag("mlp_bias")
    return FeedForward(
        hidden_size=hidden,
        intermediate_size=width,
        gated=True,
        activation=config.text("hidden_act", default="silu"),
        params=linear("mlp.gate_proj", hidden, width, bias)
        + linear("mlp.up_proj", hidden, width, bias)
        + linear("mlp.down_proj", width, hidden, bias),
    )
