"""Vision towers that several models take whole: CLIP's, SigLIP's, Pixtral's.

Source: transformers 5.17, models/{clip, siglip, pixtral}/modeling_*.py.
"""

from collections.abc import Callable

from hfvram.errors import HfvramError, printable
from hfvram.model.architecture import Stack
from hfvram.model.config import Config
from hfvram.model.families import blocks
from hfvram.model.families.encoder import ENCODER, encoder_layer, self_attention
from hfvram.model.layers import Layer, Param, Rotary, linear, norm


def tower(config: Config, prefix: str) -> Stack:
    """The tower of this configuration, its tensors named under `prefix`."""
    if (build := TOWERS.get(config.model_type)) is None:
        raise HfvramError("unknown_architecture", f"vision tower {printable(config.model_type, 40)!r} is not known")
    return build(config, prefix)


def image_size(config: Config, *names: str) -> int:
    """A size that may be given as one number or as a pair of equal ones."""
    value = config.get(*names)
    return Config({names[0]: value[0] if isinstance(value, (list, tuple)) and value else value}).size(names[0])


def clip_like(config: Config) -> Layer:
    """A layer of CLIP's and SigLIP's towers."""
    hidden = config.size("hidden_size")
    attention = self_attention(config, "self_attn", hidden, ("q_proj", "k_proj", "v_proj", "out_proj"))
    feed = blocks.mlp(
        "mlp.fc1", "mlp.fc2", hidden, config.size("intermediate_size"), config.text("hidden_act", default="gelu")
    )
    return encoder_layer(attention, feed, "layer_norm1", "layer_norm2")


def clip(config: Config, prefix: str) -> Stack:
    hidden, patch = config.size("hidden_size"), image_size(config, "patch_size")
    patches = (image_size(config, "image_size") // patch) ** 2
    embeddings = f"{prefix}embeddings"
    return Stack(
        name="vision",
        prefix=f"{prefix}encoder.layers",
        hidden_size=hidden,
        before=(
            Param(f"{embeddings}.class_embedding", (hidden,), "other"),
            *blocks.convolution(
                f"{embeddings}.patch_embedding", hidden, config.size("num_channels"), patch, patch, bias=False
            ),
            *blocks.embedding(f"{embeddings}.position_embedding", patches + 1, hidden),
            *norm(f"{prefix}pre_layrnorm", hidden, True),
        ),
        layers=(clip_like(config),) * config.layers("num_hidden_layers"),
        tokens=patches + 1,
        pixels=config.size("num_channels") * image_size(config, "image_size") ** 2,
        after=norm(f"{prefix}post_layernorm", hidden, True),
    )


def siglip(config: Config, prefix: str) -> Stack:
    hidden, patch = config.size("hidden_size"), image_size(config, "patch_size")
    patches = (image_size(config, "image_size") // patch) ** 2
    embeddings = f"{prefix}embeddings"
    after = norm(f"{prefix}post_layernorm", hidden, True)
    if config.flag("vision_use_head", default=True):
        after += pooling_head(f"{prefix}head", hidden, config.size("intermediate_size"))
    return Stack(
        name="vision",
        prefix=f"{prefix}encoder.layers",
        hidden_size=hidden,
        before=blocks.convolution(f"{embeddings}.patch_embedding", hidden, config.size("num_channels"), patch, patch)
        + blocks.embedding(f"{embeddings}.position_embedding", patches, hidden),
        layers=(clip_like(config),) * config.layers("num_hidden_layers"),
        tokens=patches,
        pixels=config.size("num_channels") * image_size(config, "image_size") ** 2,
        after=after,
    )


def pooling_head(name: str, hidden: int, width: int) -> tuple[Param, ...]:
    """SigLIP's attention pooling, by `nn.MultiheadAttention`."""
    return (
        Param(f"{name}.probe", (1, 1, hidden), "other"),
        Param(f"{name}.attention.in_proj_weight", (3 * hidden, hidden), "other"),
        Param(f"{name}.attention.in_proj_bias", (3 * hidden,), "bias"),
        *linear(f"{name}.attention.out_proj", hidden, hidden, True, "linear_subclass"),
        *norm(f"{name}.layernorm", hidden, True),
        *linear(f"{name}.mlp.fc1", hidden, width, True),
        *linear(f"{name}.mlp.fc2", width, hidden, True),
    )


def pixtral(config: Config, prefix: str) -> Stack:
    hidden, patch = config.size("hidden_size"), image_size(config, "patch_size")
    heads = config.size("num_attention_heads")
    head_dim = config.divided("hidden_size", hidden, heads)
    attention = blocks.attention("attention", hidden, heads, head_dim, rotary=Rotary(dim=head_dim), **ENCODER)
    feed = blocks.gated_mlp(
        "feed_forward", hidden, config.size("intermediate_size"), config.text("hidden_act", default="gelu")
    )
    return Stack(
        name="vision",
        prefix=f"{prefix}transformer.layers",
        hidden_size=hidden,
        before=blocks.convolution(f"{prefix}patch_conv", hidden, config.size("num_channels"), patch, patch, bias=False)
        + norm(f"{prefix}ln_pre", hidden),
        layers=(encoder_layer(attention, feed, "attention_norm", "ffn_norm", bias=False),)
        * config.layers("num_hidden_layers"),
    )


TOWERS: dict[str, Callable[[Config, str], Stack]] = {
    "clip_vision_model": clip,
    "siglip_vision_model": siglip,
    "pixtral": pixtral,
}
