"""Speech encoders over the waveform: wav2vec 2.0 and HuBERT.

Source: transformers 5.17, models/{wav2vec2, hubert}/modeling_*.py and configuration_*.py.
"""

from hfvram.errors import HfvramError, printable
from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families.blocks import convolution, mlp
from hfvram.model.families.common import class_and_end, num_labels
from hfvram.model.families.defaults import known
from hfvram.model.families.encoder import encoder, encoder_layer, self_attention
from hfvram.model.layers import Layer, Param, linear, norm

FAMILIES = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert"}
CLASSES = ("Model", "ForCTC", "ForSequenceClassification")


def read(config: Config, class_name: str | None) -> Architecture:
    config = known(config)
    kind = config.model_type
    class_name, end = class_and_end(config, class_name, FAMILIES[kind], CLASSES)
    if config.flag("add_adapter") or config.flag("conv_pos_batch_norm"):
        raise HfvramError("unknown_architecture", f"{kind} with add_adapter or conv_pos_batch_norm is not known")
    prefix, hidden = "" if end == "Model" else f"{kind}.", config.size("hidden_size")
    masks = config.number("mask_time_prob", default=0.05) > 0 or config.number("mask_feature_prob", default=0.0) > 0
    mask = (Param(f"{prefix}masked_spec_embed", (hidden,), "other"),) if masks else ()
    stack = Stack(
        name="speech",
        prefix=f"{prefix}encoder.layers",
        hidden_size=hidden,
        before=mask + features(config, prefix, hidden) + positions(config, f"{prefix}encoder", hidden),
        layers=(layer(config, hidden),) * config.layers("num_hidden_layers"),
    )
    top = heads(config, end, hidden)
    return encoder(config, class_name, stack, top, final_norm="layer" if stable(config) else None, max_positions=None)


def stable(config: Config) -> bool:
    """Norms stand before each part (the large models), not after."""
    return config.flag("do_stable_layer_norm")


def features(config: Config, prefix: str, hidden: int) -> tuple[Param, ...]:
    """Convolutions that make frames of the waveform, and their projection."""
    widths, kernels = sizes(config, "conv_dim"), sizes(config, "conv_kernel")
    if len(widths) != len(kernels) or not widths:
        raise HfvramError("bad_config", "config.json: conv_dim and conv_kernel are not of one length")
    how = config.text("feat_extract_norm", default="group")
    if how not in ("group", "layer"):
        raise HfvramError("unknown_architecture", f"feat_extract_norm {printable(how, 40)!r} is not known")
    params: tuple[Param, ...] = ()
    for i, (width, kernel) in enumerate(zip(widths, kernels, strict=True)):
        name = f"{prefix}feature_extractor.conv_layers.{i}"
        params += convolution(f"{name}.conv", width, widths[i - 1] if i else 1, kernel, bias=config.flag("conv_bias"))
        if how == "layer" or i == 0:
            params += norm(f"{name}.layer_norm", width, bias=True)
    last, name = widths[-1], f"{prefix}feature_projection"
    normed = config.model_type != "hubert" or config.flag("feat_proj_layer_norm", default=True)
    return (
        params
        + (norm(f"{name}.layer_norm", last, bias=True) if normed else ())
        + linear(f"{name}.projection", last, hidden, bias=True)
    )


def sizes(config: Config, name: str) -> list[int]:
    return [Config({name: value}).size(name) for value in config.items(name) or ()]


def positions(config: Config, name: str, hidden: int) -> tuple[Param, ...]:
    """A grouped convolution, its weight normalized along the kernel, stands for positions."""
    kernel, groups = config.size("num_conv_pos_embeddings"), config.size("num_conv_pos_embedding_groups")
    channels, conv = config.divided("hidden_size", hidden, groups), f"{name}.pos_conv_embed.conv"
    return (
        Param(f"{conv}.bias", (hidden,), "bias"),
        Param(f"{conv}.parametrizations.weight.original0", (1, 1, kernel), "other"),
        Param(f"{conv}.parametrizations.weight.original1", (hidden, channels, kernel), "other"),
        *norm(f"{name}.layer_norm", hidden, bias=True),
    )


def layer(config: Config, hidden: int) -> Layer:
    before = stable(config)
    adapter = config.size("adapter_attn_dim", default=0, low=0) if before else 0
    name, activation = "adapter_layer", config.text("hidden_act", default="gelu")
    extra = (
        norm(f"{name}.norm", hidden, bias=True)
        + linear(f"{name}.linear_1", hidden, adapter, bias=True)
        + linear(f"{name}.linear_2", adapter, hidden, bias=True)
    )
    return encoder_layer(
        self_attention(config, "attention", hidden, ("q_proj", "k_proj", "v_proj", "out_proj")),
        mlp(
            "feed_forward.intermediate_dense",
            "feed_forward.output_dense",
            hidden,
            config.size("intermediate_size"),
            activation,
        ),
        "layer_norm",
        "final_layer_norm",
        position="pre" if before else "post",
        extra=extra if adapter else (),
    )


def heads(config: Config, end: str, hidden: int) -> tuple[Param, ...]:
    """Characters of speech, or classes of a recording."""
    if end == "ForCTC":
        return linear("lm_head", hidden, config.size("vocab_size"), bias=True, kind="head")
    if end == "Model":
        return ()
    width, layers = config.size("classifier_proj_size"), config.layers("num_hidden_layers") + 1
    weights = (Param("layer_weights", (layers,), "other"),) if config.flag("use_weighted_layer_sum") else ()
    return (
        weights
        + linear("projector", hidden, width, bias=True)
        + linear("classifier", width, num_labels(config), bias=True, kind="head")
    )
