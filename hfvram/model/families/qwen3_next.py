"""Qwen3-Next and Qwen3.5: gated delta nets, gated attention every fourth layer, and Qwen3.5's vision tower.

Source: transformers 5.17, models/{qwen3_next, qwen3_5, qwen3_5_moe}/modeling_*.py and configuration_*.py.
"""

from dataclasses import replace
from functools import cache

from hfvram.errors import HfvramError, printable
from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families.blocks import attention, convolution, embedding, fused_experts, gated_mlp, others
from hfvram.model.families.common import dtype_of, head_sizes, rotary
from hfvram.model.families.decoder import around, hybrid_kinds
from hfvram.model.families.defaults import class_of, known, prefix_of, section
from hfvram.model.families.multimodal import wrapper
from hfvram.model.families.qwen_vl import vision_3
from hfvram.model.layers import Attention, FeedForward, GatedDeltaNet, Layer, MixtureOfExperts, Param, linear, norm

WHOLE = {"qwen3_5": "Qwen3_5ForConditionalGeneration", "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration"}
"""Types whose configuration nests a text and a vision model, and the class of both together."""


def read(config: Config, class_name: str | None) -> Architecture:
    """The text model alone, or, in `…ForConditionalGeneration` and the bare multimodal model, after a vision tower."""
    config = known(config)
    nested = config.model_type in WHOLE
    if nested and class_name is None and not config.strings("architectures"):
        class_name = WHOLE[config.model_type]
    class_name = class_of(config, class_name)
    prefix = prefix_of(config, class_name)
    text = section(config, "text_config") if nested else config
    whole = nested and not class_name.endswith(("TextModel", "ForCausalLM"))
    if class_name.endswith("ForConditionalGeneration") and not nested:
        raise HfvramError(
            "unknown_architecture",
            f"{printable(class_name, 60)} needs a text_config and a vision_config, which {config.model_type} has not",
        )
    if not whole:
        alone = stack(text, prefix)
        return around(text, class_name, alone, model_type=config.model_type, dtype=dtype_of(config))
    tower = vision(section(config, "vision_config"), f"{prefix}visual.")
    return wrapper(config, class_name, text, (tower, stack(text, f"{prefix}language_model.")))


def stack(config: Config, prefix: str) -> Stack:
    """The text stack under `prefix`."""
    hidden = config.size("hidden_size")

    @cache
    def layer(kind: str, routes: bool) -> Layer:
        return Layer(
            mixers=(gated_attention(config, hidden) if kind == "full_attention" else delta_net(config, hidden),),
            feed_forward=experts(config, hidden) if routes else dense(config, hidden),
            params=norm("input_layernorm", hidden) + norm("post_attention_layernorm", hidden),
        )

    layers = config.layers("num_hidden_layers")
    every = config.size("full_attention_interval", default=4)
    pattern = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    kinds = hybrid_kinds(config, pattern)
    routes = routed(config, layers)
    return Stack(
        name="text",
        prefix=f"{prefix}layers",
        hidden_size=hidden,
        before=embedding(f"{prefix}embed_tokens", config.size("vocab_size"), hidden),
        layers=tuple(layer(kind, i in routes) for i, kind in enumerate(kinds)),
        after=norm(f"{prefix}norm", hidden),
    )


def routed(config: Config, layers: int) -> set[int]:
    """The layers with experts: all of a `…_moe`; in Qwen3-Next by `decoder_sparse_step` and `mlp_only_layers`."""
    if config.model_type != "qwen3_next":
        return set(range(layers)) if "moe" in config.model_type else set()
    if not config.size("num_experts", low=0):
        return set()
    step, dense_only = config.size("decoder_sparse_step"), config.items("mlp_only_layers") or []
    return {i for i in range(layers) if (i + 1) % step == 0 and i not in dense_only}


def gated_attention(config: Config, hidden: int) -> Attention:
    """Grouped-query attention whose queries bring a gate of their own width for the output."""
    heads, kv_heads, head_dim = head_sizes(config, hidden)
    bias = config.flag("attention_bias")
    plain = attention(
        "self_attn",
        hidden,
        heads,
        head_dim,
        kv_heads,
        bias=bias,
        rotary=rotary(config, head_dim, 0.25),
        qk_norm="head",
        output_gate=True,
        extra=norm("self_attn.q_norm", head_dim) + norm("self_attn.k_norm", head_dim),
    )
    doubled = linear("self_attn.q_proj", hidden, 2 * heads * head_dim, bias)
    return replace(plain, params=doubled + plain.params[len(doubled) :])


def delta_net(config: Config, hidden: int) -> GatedDeltaNet:
    """Qwen3-Next makes queries, keys, values and gate in one projection, Qwen3.5 the gate and β, α in others."""
    key_heads, value_heads = config.size("linear_num_key_heads"), config.size("linear_num_value_heads")
    key_dim, value_dim = config.size("linear_key_head_dim"), config.size("linear_value_head_dim")
    config.divided("linear_num_value_heads", value_heads, key_heads)
    keys, values, kernel = key_heads * key_dim, value_heads * value_dim, config.size("linear_conv_kernel_dim")
    widths = {"qkvz": 2 * keys + 2 * values, "ba": 2 * value_heads}
    if config.model_type != "qwen3_next":
        widths = {"qkv": 2 * keys + values, "z": values, "b": value_heads, "a": value_heads}
    apart = config.model_type != "qwen3_next"
    projections = [linear(f"linear_attn.in_proj_{name}", hidden, width) for name, width in widths.items()]
    return GatedDeltaNet(
        hidden_size=hidden,
        key_heads=key_heads,
        value_heads=value_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        d_conv=kernel,
        fused_projection=config.model_type == "qwen3_next",
        params=others("linear_attn", {"dt_bias": (value_heads,), "A_log": (value_heads,)})
        + convolution("linear_attn.conv1d", 2 * keys + values, 1, kernel, bias=False)
        + (() if apart else tuple(p for projection in projections for p in projection))
        + norm("linear_attn.norm", value_dim)
        + linear("linear_attn.out_proj", values, hidden)
        + (tuple(p for projection in projections for p in projection) if apart else ()),
    )


def dense(config: Config, hidden: int) -> FeedForward:
    return gated_mlp("mlp", hidden, config.size("intermediate_size"), config.text("hidden_act", default="silu"))


def experts(config: Config, hidden: int) -> MixtureOfExperts:
    """Routed experts and one shared expert with a gate."""
    count, width = config.size("num_experts"), config.size("moe_intermediate_size")
    shared, activation = config.size("shared_expert_intermediate_size"), config.text("hidden_act", default="silu")
    return MixtureOfExperts(
        hidden_size=hidden,
        experts=count,
        top_k=config.size("num_experts_per_tok"),
        intermediate_size=width,
        shared_intermediate_size=shared,
        activation=activation,
        routing_fp32=False,
        normalized=config.model_type != "qwen3_next" or config.flag("norm_topk_prob"),
        params=(
            Param("mlp.gate.weight", (count, hidden), "other"),
            *fused_experts("mlp.experts", count, hidden, width),
            *gated_mlp("mlp.shared_expert", hidden, shared, activation).params,
            *linear("mlp.shared_expert_gate", hidden, 1),
        ),
    )


def vision(config: Config, prefix: str) -> Stack:
    """Qwen3-VL's tower without its DeepStack."""
    values = {key: value for key, value in config.values.items() if key != "deepstack_visual_indexes"}
    return vision_3(Config(values, config.defaults, config.aliases), prefix)
