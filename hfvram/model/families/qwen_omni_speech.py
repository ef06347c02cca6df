"""Qwen2.5-Omni's way from speech codes to sound: a diffusion transformer and a BigVGAN vocoder, both in fp32.

Source: transformers 5.17, models/qwen2_5_omni/modeling_qwen2_5_omni.py (Qwen2_5OmniToken2WavModel).
"""

from dataclasses import replace

from hfvram.errors import HfvramError
from hfvram.model.architecture import Stack
from hfvram.model.config import Config
from hfvram.model.families.blocks import attention, convolution, embedding, mlp
from hfvram.model.families.defaults import section
from hfvram.model.families.encoder import ENCODER
from hfvram.model.layers import Layer, Param, Rotary, linear

TIME_WIDTH = 256


def speech(config: Config, prefix: str) -> Stack:
    """The diffusion transformer's layers, with the vocoder after them."""
    dit = diffusion(section(config, "dit_config"), f"{prefix}code2wav_dit_model.")
    vocoder = bigvgan(section(config, "bigvgan_config"), f"{prefix}code2wav_bigvgan_model.")
    return replace(dit, after=in_fp32(dit.after + vocoder))


def in_fp32(params: tuple[Param, ...]) -> tuple[Param, ...]:
    return tuple(replace(p, dtype="fp32") for p in params)


def sizes(config: Config, name: str, count: int | None = None) -> list[int]:
    """A list of sizes, of this length where one is given."""
    values = config.items(name) or []
    if count is not None and len(values) != count:
        raise HfvramError("bad_config", f"config.json: {name} has {len(values)} entries, not {count}")
    return [Config({name: value}).size(name) for value in values]


def diffusion(config: Config, prefix: str) -> Stack:
    hidden, heads, head_dim = config.size("hidden_size"), config.size("num_attention_heads"), config.size("head_dim")
    mel = config.size("mel_dim")
    inputs = mel + config.size("enc_dim") + config.size("enc_emb_dim") + config.size("emb_dim")
    mixer = attention(
        "attn",
        hidden,
        heads,
        head_dim,
        bias=True,
        projections=("to_q", "to_k", "to_v", "to_out.0"),
        rotary=Rotary(dim=head_dim),
        implementations=("sdpa",),
        **ENCODER,
    )
    feed = mlp("ff.ff.0", "ff.ff.3", hidden, hidden * config.size("ff_mult"), "gelu_pytorch_tanh")
    layer = Layer(
        mixers=(replace(mixer, params=in_fp32(mixer.params)),),
        feed_forward=replace(feed, params=in_fp32(feed.params)),
        norm="layer",
        params=in_fp32(linear("attn_norm.linear", hidden, 6 * hidden, True)),
    )
    return Stack(
        name="speech",
        prefix=f"{prefix}transformer_blocks",
        hidden_size=hidden,
        before=in_fp32(
            linear(f"{prefix}time_embed.time_mlp.0", TIME_WIDTH, hidden, True)
            + linear(f"{prefix}time_embed.time_mlp.2", hidden, hidden, True)
            + embedding(f"{prefix}text_embed.codec_embed", config.size("num_embeds") + 1, config.size("emb_dim"))
            + linear(f"{prefix}input_embed.proj", inputs, hidden, True)
            + speaker(config, f"{prefix}input_embed.spk_encoder", mel)
        ),
        layers=(layer,) * config.layers("num_hidden_layers"),
        after=linear(f"{prefix}norm_out.linear", hidden, 2 * hidden, True)
        + linear(f"{prefix}proj_out", hidden, mel, True),
    )


def speaker(config: Config, name: str, mel: int) -> tuple[Param, ...]:
    """ECAPA-TDNN: the speaker's voice in one vector."""
    channels = sizes(config, "enc_channels")
    kernels = sizes(config, "enc_kernel_sizes", len(channels))
    if len(channels) < 2:
        raise HfvramError("bad_config", "config.json: enc_channels has fewer than two entries")
    scale = config.size("enc_res2net_scale", default=2)
    squeezed, attended, last = config.size("enc_se_channels"), config.size("enc_attention_channels"), channels[-1]
    params = convolution(f"{name}.blocks.0.conv", channels[0], mel, kernels[0])
    for i in range(1, len(channels) - 1):
        block, before, here = f"{name}.blocks.{i}", channels[i - 1], channels[i]
        part = here // scale
        params += convolution(f"{block}.tdnn1.conv", here, before, 1)
        for j in range(scale - 1):
            params += convolution(f"{block}.res2net_block.blocks.{j}.conv", part, part, kernels[i])
        params += convolution(f"{block}.tdnn2.conv", here, here, 1)
        params += convolution(f"{block}.se_block.conv1", squeezed, here, 1)
        params += convolution(f"{block}.se_block.conv2", here, squeezed, 1)
    return (
        *params,
        *convolution(f"{name}.mfa.conv", last, last, kernels[-1]),
        *convolution(f"{name}.asp.tdnn.conv", attended, 3 * last, 1),
        *convolution(f"{name}.asp.conv", last, attended, 1),
        *convolution(f"{name}.fc", config.size("enc_dim"), 2 * last, 1),
    )


def bigvgan(config: Config, prefix: str) -> tuple[Param, ...]:
    """Upsampling convolutions, three residual blocks after each, snake activations."""
    width, kernels = config.size("upsample_initial_channel"), sizes(config, "upsample_kernel_sizes")
    rates = sizes(config, "upsample_rates", len(kernels))
    block_kernels = sizes(config, "resblock_kernel_sizes")
    dilations = len(config.items("resblock_dilation_sizes") or block_kernels)
    params = convolution(f"{prefix}conv_pre", width, config.size("mel_dim"), 7)
    for i, kernel in enumerate(kernels):
        # A transposed convolution's weight is (inputs, outputs, kernel).
        params += (
            Param(f"{prefix}ups.{i}.0.weight", (width >> i, width >> (i + 1), kernel), "conv"),
            Param(f"{prefix}ups.{i}.0.bias", (width >> (i + 1),), "bias"),
        )
    block = 0
    for i in range(len(rates)):
        channels = width >> (i + 1)
        for kernel in block_kernels[:dilations]:
            name = f"{prefix}resblocks.{block}"
            for convs in ("convs1", "convs2"):
                for j in range(3):
                    params += convolution(f"{name}.{convs}.{j}", channels, channels, kernel)
            for j in range(6):
                params += snake(f"{name}.activations.{j}", channels)
            block += 1
    narrow = width >> len(rates)
    return (
        *params,
        *snake(f"{prefix}activation_post", narrow),
        *convolution(f"{prefix}conv_post", 1, narrow, 7, bias=False),
    )


def snake(name: str, channels: int) -> tuple[Param, ...]:
    return (Param(f"{name}.act.alpha", (channels,), "other"), Param(f"{name}.act.beta", (channels,), "other"))
