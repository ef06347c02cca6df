"""Llama 4: chunked attention with rotary positions beside full attention without, mixtures of experts in between.

Source: transformers 5.17, models/llama4/{modeling, configuration}_llama4.py.
"""

from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families import blocks, llama
from hfvram.model.families.common import head_sizes, layer_kinds
from hfvram.model.families.defaults import class_of, known, section
from hfvram.model.families.encoder import ENCODER, encoder_layer
from hfvram.model.families.multimodal import text_stack, wrapper
from hfvram.model.families.styles import rope_layers
from hfvram.model.families.vision import image_size
from hfvram.model.layers import Attention, FeedForward, MixtureOfExperts, Param, Rotary, linear, norm


def read(config: Config, class_name: str | None) -> Architecture:
    config = known(config)
    class_name = class_of(config, class_name)
    if config.model_type == "llama4_text":
        return llama.decoder(config, class_name, stack(config, "" if class_name.endswith("TextModel") else "model."))
    text, vision = section(config, "text_config"), section(config, "vision_config")
    projector = linear("multi_modal_projector.linear_1", vision.size("vision_output_dim"), text.size("hidden_size"))
    stacks = (
        tower(vision, "vision_model."),
        Stack("projector", (), before=projector),
        text_stack(text, "language_model.model."),
    )
    return wrapper(config, class_name, text, stacks, head="language_model.", may_tie=False)


def stack(config: Config, prefix: str) -> Stack:
    """The text stack under `prefix`."""
    hidden, layers = config.size("hidden_size"), config.layers("num_hidden_layers")
    rotates = rope_layers(config, layers)
    kinds = layer_kinds(config, layers, ("full_attention", "chunked_attention"))
    chunk = config.size("attention_chunk_size")
    step = config.size("interleave_moe_layer_step", default=1)
    listed = config.items("moe_layers")
    experts, dense = mixture(config, hidden), feed_forward(config, hidden)

    def attend(i: int) -> Attention:
        chunked = kinds[i] == "chunked_attention" if kinds else rotates[i]
        return attention(config, hidden, chunk if chunked else None, rotates[i])

    def feed(i: int) -> FeedForward | MixtureOfExperts:
        return experts if (i in listed if listed is not None else (i + 1) % step == 0) else dense

    return llama.stack(config, prefix, feed, attend)


def attention(config: Config, hidden: int, chunk: int | None, rotates: bool) -> Attention:
    heads, kv_heads, head_dim = head_sizes(config, hidden)
    return blocks.attention(
        "self_attn",
        hidden,
        heads,
        head_dim,
        kv_heads,
        bias=config.flag("attention_bias"),
        kind="chunked_attention" if chunk else "full_attention",
        window=chunk,
        scores="own dtype",
        rotary=Rotary(dim=head_dim, style="complex") if rotates else None,
        qk_norm="head" if rotates and config.flag("use_qk_norm", default=True) else None,
        implementations=("sdpa", "eager"),
    )


def feed_forward(config: Config, hidden: int) -> FeedForward:
    return blocks.gated_mlp(
        "feed_forward", hidden, config.size("intermediate_size_mlp"), config.text("hidden_act", default="silu")
    )


def mixture(config: Config, hidden: int) -> MixtureOfExperts:
    """Experts that lie the other way round than Mixtral's, and one shared; each computes every token."""
    count, width = config.size("num_local_experts"), config.size("intermediate_size")
    return MixtureOfExperts(
        hidden_size=hidden,
        experts=count,
        top_k=config.size("num_experts_per_tok", high=count),
        intermediate_size=width,
        shared_intermediate_size=width,
        activation=config.text("hidden_act", default="silu"),
        every_token=True,
        routing_fp32=False,
        params=(
            Param("feed_forward.experts.gate_up_proj", (count, hidden, 2 * width), "experts"),
            Param("feed_forward.experts.down_proj", (count, width, hidden), "experts"),
            *linear("feed_forward.router", hidden, count, kind="linear_subclass"),
            *blocks.gated_mlp("feed_forward.shared_expert", hidden, width).params,
        ),
    )


def tower(config: Config, prefix: str) -> Stack:
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    patch = image_size(config, "patch_size")
    head_dim = config.divided("hidden_size", hidden, heads)
    tokens = (image_size(config, "image_size") // patch) ** 2 + 1
    attention = blocks.attention(
        "self_attn", hidden, heads, head_dim, bias=True, rotary=Rotary(dim=head_dim, style="complex"), **ENCODER
    )
    feed = blocks.mlp("mlp.fc1", "mlp.fc2", hidden, config.size("intermediate_size"), "gelu")
    adapter, wide = f"{prefix}vision_adapter.mlp", config.size("projector_output_dim")
    return Stack(
        name="vision",
        prefix=f"{prefix}model.layers",
        hidden_size=hidden,
        before=(
            Param(f"{prefix}class_embedding", (hidden,), "other"),
            Param(f"{prefix}positional_embedding_vlm", (tokens, hidden), "other"),
            *linear(f"{prefix}patch_embedding.linear", config.size("num_channels") * patch * patch, hidden),
            Param(f"{prefix}rotary_embedding.freqs_ci", (tokens, 1, head_dim // 2), "buffer", "complex64"),
            *norm(f"{prefix}layernorm_pre", hidden, True),
            *norm(f"{prefix}layernorm_post", hidden, True),
        ),
        layers=(encoder_layer(attention, feed, "input_layernorm", "post_attention_layernorm"),)
        * config.layers("num_hidden_layers"),
        after=linear(f"{adapter}.fc1", config.size("intermediate_size"), config.size("projector_input_dim"))
        + linear(f"{adapter}.fc2", wide, wide),
    )
