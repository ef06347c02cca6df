"""Llama and those that are built like it: a decoder of attention and feed-forward between norms.

What each type does differently is in `styles.py`. Source: transformers 5.17, models/*/modeling_*.py.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

from hfvram.errors import HfvramError, printable
from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families import blocks
from hfvram.model.families.common import dropout_of, head_sizes, rotary
from hfvram.model.families.decoder import around
from hfvram.model.families.defaults import opened
from hfvram.model.families.styles import STYLES, Style, flag, rope_layers, windows
from hfvram.model.layers import Attention, FeedForward, Layer, Mixer, MixtureOfExperts, Param, Rotary, norm

Feed = Callable[[int], FeedForward | MixtureOfExperts]
Attend = Callable[[int], Mixer]
"""The feed-forward, the mixer of a layer by its index."""


def read(config: Config, class_name: str | None) -> Architecture:
    config, class_name, prefix = opened(config, class_name)
    return decoder(config, class_name, stack(config, prefix))


def decoder(config: Config, class_name: str, text: Stack) -> Architecture:
    """A text model of one stack, with the head of its class."""
    style = style_of(config)
    return around(
        config,
        class_name,
        text,
        head_bias=flag(config, style.head_bias),
        final_norm=style.norm,
        logits_softcap=bool(config.number("final_logit_softcapping", default=0.0)),
    )


def style_of(config: Config) -> Style:
    """How the configuration's type differs from Llama. Raises `unknown_architecture` where it is no such decoder."""
    if (style := STYLES.get(config.model_type)) is None:
        message = f"the text model type {printable(config.model_type, 60)!r} is not known here"
        raise HfvramError("unknown_architecture", message)
    return style


def stack(config: Config, prefix: str, feed: Feed | None = None, attend: Attend | None = None) -> Stack:
    """The text stack under `prefix`; `feed` and `attend` build its feed-forwards and its attention where they are not
    the family's dense ones."""
    style = style_of(config)
    hidden, vocab = config.size("hidden_size"), config.size("vocab_size")
    layers = config.layers("num_hidden_layers")
    listed = rope_layers(config, layers) if style.rope_on == "listed" else []
    build = feed or (lambda i: feed_forward(config, style, hidden))

    @cache
    def one(mixer: Mixer, feed: FeedForward | MixtureOfExperts) -> Layer:
        names = style.norms[:1] if flag(config, style.parallel) else style.norms
        params = tuple(p for name in names for p in norm(name, hidden, style.norm_bias)) if style.norm_weight else ()
        return Layer(
            mixers=(mixer,),
            feed_forward=feed,
            norm=style.norm,
            norm_position=style.norm_position,
            keeps=style.keeps,
            parallel=flag(config, style.parallel),
            dropout=dropout_of(config),
            params=params,
        )

    slid = [] if attend else windows(config, style, layers)

    def attends(i: int) -> Mixer:
        rotates = listed[i] if listed else True
        if style.rope_on == "sliding":
            rotates = slid[i] is not None or not config.size("sliding_window", default=0, low=0)
        return attention(config, style, hidden, slid[i], rotates)

    build_mixer = attend or attends

    return Stack(
        name="text",
        prefix=f"{prefix}layers",
        hidden_size=hidden,
        before=(Param(f"{prefix}embed_tokens.weight", (vocab, hidden), "embedding"),),
        layers=tuple(one(build_mixer(i), build(i)) for i in range(layers)),
        after=norm(f"{prefix}{style.final_norm}", hidden, style.norm_bias) if style.norm_weight else (),
    )


def attention(config: Config, style: Style, hidden: int, window: int | None, rotates: bool) -> Attention:
    heads, kv_heads, head_dim = head_sizes(config, hidden)
    partial = rotary(config, head_dim, style.rotary_factor)
    qk_norm = style.qk_norm if flag(config, style.qk_norm_if) else None
    sinks = config.model_type == "gpt_oss"
    facts: dict[str, Any] = {
        "kind": "sliding_attention" if window else "full_attention",
        "window": window,
        "causal": not config.flag("use_bidirectional_attention"),
        "rotary": Rotary(dim=partial.dim, style=style.rope, sliced=style.sliced) if rotates else None,
        "qk_norm": "full" if qk_norm == "full" else "head" if qk_norm else None,
        "clips": bool(config.number("clip_qkv", default=0.0)),
        "softcap": style.softcap and bool(config.number("attn_logit_softcapping", default=0.0)),
        "bias": flag(config, style.bias),
        "out_bias": flag(config, style.out_bias),
    }
    extra = qk_norms(style, qk_norm, heads, kv_heads, head_dim)
    if sinks:
        facts |= {"sinks": True, "implementations": ("eager", "flash_attention_2")}
    if style.fused_qkv:
        names = ("qkv_proj", style.out)
        return blocks.fused_attention(
            "self_attn", hidden, heads, head_dim, kv_heads, projections=names, extra=extra, **facts
        )
    projections = ("q_proj", "k_proj", "v_proj", style.out)
    part = blocks.attention(
        "self_attn", hidden, heads, head_dim, kv_heads, projections=projections, extra=extra, **facts
    )
    return replace(part, params=(Param("self_attn.sinks", (heads,), "other"), *part.params)) if sinks else part


def qk_norms(style: Style, over: str | None, heads: int, kv_heads: int, head_dim: int) -> tuple[Param, ...]:
    """The weights of the norms of queries and keys."""
    if over is None or not style.norm_weight:
        return ()
    found: tuple[Param, ...] = ()
    for name, count in zip(style.qk_norm_names, (heads, kv_heads), strict=True):
        name = f"self_attn.{name}"
        if over == "list":
            found += tuple(p for i in range(count) for p in norm(f"{name}.norms.{i}", head_dim))
        elif over == "each":
            found += (Param(f"{name}.weight", (count, head_dim), "norm"),)
        else:
            found += norm(name, head_dim if over == "head" else count * head_dim, style.norm_bias)
    return found


def feed_forward(config: Config, style: Style, hidden: int) -> FeedForward:
    """The family's dense feed-forward."""
    width = config.size("intermediate_size")
    activation = config.text("hidden_activation", "hidden_act", default="silu")
    bias = flag(config, style.mlp_bias)
    if style.mlp == "gated":
        return blocks.gated_mlp("mlp", hidden, width, activation, bias)
    if style.mlp == "fused":
        return blocks.fused_gated_mlp("mlp", hidden, width, activation)
    up, down = style.mlp_names
    return blocks.mlp(f"mlp.{up}", f"mlp.{down}", hidden, width, activation, bias)
