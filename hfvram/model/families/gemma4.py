"""Gemma 4: layers that share an earlier layer's keys and values, wider heads in full attention, inputs for each layer,
experts beside a dense feed-forward, and towers for images and sound.

Source: transformers 5.17, models/gemma4/{modeling, configuration}_gemma4.py.
"""

from dataclasses import replace

from hfvram.errors import HfvramError
from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families import blocks, gemma4_towers, llama
from hfvram.model.families.common import layer_kinds
from hfvram.model.families.defaults import opened, section
from hfvram.model.families.multimodal import text_stack, wrapper
from hfvram.model.layers import Attention, FeedForward, Layer, MixtureOfExperts, Param, Rotary, linear, norm


def read(config: Config, class_name: str | None) -> Architecture:
    config, class_name, prefix = opened(config, class_name)
    if config.model_type == "gemma4_text":
        return llama.decoder(config, class_name, stack(config, prefix))
    text = section(config, "text_config")
    hidden = text.size("hidden_size")
    stacks: tuple[Stack, ...] = (text_stack(text, f"{prefix}language_model."),)
    projectors: tuple[Param, ...] = ()
    if config.section("vision_config") is not None:
        vision = section(config, "vision_config")
        stacks = (gemma4_towers.vision(vision, f"{prefix}vision_tower."), *stacks)
        projectors += linear(f"{prefix}embed_vision.embedding_projection", vision.size("hidden_size"), hidden)
    if config.section("audio_config") is not None:
        audio = section(config, "audio_config")
        stacks = (*stacks, gemma4_towers.audio(audio, f"{prefix}audio_tower."))
        projectors += linear(f"{prefix}embed_audio.embedding_projection", audio.size("output_proj_dims"), hidden)
    return wrapper(config, class_name, text, (*stacks, Stack("projector", (), before=projectors)))


def stack(config: Config, prefix: str) -> Stack:
    """The text stack under `prefix`."""
    hidden, layers = config.size("hidden_size"), config.layers("num_hidden_layers")
    kinds = layer_kinds(config, layers, ("full_attention", "sliding_attention"))
    if kinds is None:
        kinds = ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(layers)]
    if kinds:
        kinds[-1] = "full_attention"
    shared = config.layers("num_kv_shared_layers", default=0)
    if shared > layers:
        raise HfvramError("bad_config", f"config.json: {shared} of {layers} layers share keys and values")
    first_shared = layers - shared
    per_layer = config.size("hidden_size_per_layer_input", default=0, low=0)
    extra = layer_extras(config, hidden, per_layer)

    def attend(i: int) -> Attention:
        return attention(config, hidden, kinds[i] == "sliding_attention", shares=i >= first_shared)

    def feed(i: int) -> FeedForward | MixtureOfExperts:
        wide = config.flag("use_double_wide_mlp") and i >= first_shared > 0
        return feed_forward(config, hidden, config.size("intermediate_size") * (2 if wide else 1))

    text = llama.stack(config, prefix, feed, attend)
    grown: dict[Layer, Layer] = {layer: replace(layer, params=layer.params + extra) for layer in set(text.layers)}
    after = text.after
    if per_layer:
        rows = config.size("vocab_size_per_layer_input")
        after += (
            *blocks.embedding(f"{prefix}embed_tokens_per_layer", rows, layers * per_layer),
            *linear(f"{prefix}per_layer_model_projection", hidden, layers * per_layer),
            *norm(f"{prefix}per_layer_projection_norm", per_layer),
        )
    return replace(text, layers=tuple(grown[layer] for layer in text.layers), after=after)


def layer_extras(config: Config, hidden: int, per_layer: int) -> tuple[Param, ...]:
    """What a layer has beyond attention, feed-forward and their four norms."""
    params: tuple[Param, ...] = ()
    if per_layer:
        params += (
            *linear("per_layer_input_gate", hidden, per_layer),
            *linear("per_layer_projection", per_layer, hidden),
            *norm("post_per_layer_input_norm", hidden),
        )
    if config.flag("enable_moe_block"):
        names = ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2")
        params += tuple(p for name in names for p in norm(name, hidden))
    return params


def attention(config: Config, hidden: int, sliding: bool, shares: bool) -> Attention:
    """Full attention has heads of another size and, with `attention_k_eq_v`, keys that are the values as well."""
    heads, kv_heads = config.size("num_attention_heads"), config.size("num_key_value_heads")
    head_dim, bias = config.size("head_dim"), config.flag("attention_bias")
    same = config.flag("attention_k_eq_v") and not sliding
    if not sliding:
        head_dim = config.size("global_head_dim", default=512)
        kv_heads = config.size("num_global_key_value_heads", default=kv_heads) if same else kv_heads
    window = config.size("sliding_window") if sliding else None
    causal = config.get("use_bidirectional_attention") != "all"
    if window and not causal:
        window = window // 2 + 1
    params = linear("self_attn.q_proj", hidden, heads * head_dim, bias) + norm("self_attn.q_norm", head_dim)
    if not shares:
        params += norm("self_attn.k_norm", head_dim) + linear("self_attn.k_proj", hidden, kv_heads * head_dim, bias)
        params += () if same else linear("self_attn.v_proj", hidden, kv_heads * head_dim, bias)
    return Attention(
        kind="sliding_attention" if sliding else "full_attention",
        hidden_size=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=head_dim,
        window=window,
        causal=causal,
        rotary=Rotary(dim=head_dim),
        qk_norm="head",
        cached=not shares,
        params=params + linear("self_attn.o_proj", heads * head_dim, hidden, bias),
    )


def feed_forward(config: Config, hidden: int, width: int) -> FeedForward | MixtureOfExperts:
    """A dense feed-forward, and with `enable_moe_block` experts beside it, which then is their shared one."""
    activation = config.text("hidden_activation", "hidden_act", default="gelu_pytorch_tanh")
    dense = blocks.gated_mlp("mlp", hidden, width, activation)
    if not config.flag("enable_moe_block"):
        return dense
    count = config.size("num_experts")
    routed = config.size("moe_intermediate_size")
    return MixtureOfExperts(
        hidden_size=hidden,
        experts=count,
        top_k=config.size("top_k_experts", high=count),
        intermediate_size=routed,
        shared_intermediate_size=width,
        activation=activation,
        params=(
            *dense.params,
            Param("router.scale", (hidden,), "other"),
            Param("router.per_expert_scale", (count,), "other"),
            *linear("router.proj", hidden, count),
            *blocks.fused_experts("experts", count, hidden, routed),
        ),
    )
