"""The GPT line before Llama: GPT-2, GPT-BigCode, GPT-Neo, GPT-J, CodeGen, GPT-NeoX (and, in `bloom.py`, its kin).

LayerNorm, a feed-forward without a gate, positions that are learned, rotated or a bias, projections often fused.
Source: transformers 5.17, models/*/modeling_*.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from hfvram.errors import HfvramError
from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families import blocks
from hfvram.model.families.common import dropout_of, rotary
from hfvram.model.families.decoder import around
from hfvram.model.families.defaults import class_of, known, prefix_of
from hfvram.model.layers import FeedForward, Layer, Param, Rotary, norm

EAGER: dict[str, Any] = {"implementations": ("eager",)}
EAGER_OR_FLASH: dict[str, Any] = {"implementations": ("eager", "flash_attention_2")}


class Decoder(NamedTuple):
    """A decoder's layers, and what stands before and after them, names relative to the base model."""

    layers: tuple[Layer, ...]
    before: tuple[Param, ...]
    after: tuple[Param, ...]
    module: str = "h"
    head_bias: bool = False
    head_width: int | None = None
    token_head: str = "classifier"


Build = Callable[[Config, int], Decoder]


def read(config: Config, class_name: str | None) -> Architecture:
    return whole(known(config), class_name, DECODERS)


def whole(config: Config, class_name: str | None, decoders: Mapping[str, Build]) -> Architecture:
    """The model around the decoder that its type builds."""
    class_name = class_of(config, class_name)
    prefix, hidden = prefix_of(config, class_name), config.size("n_embed", "hidden_size")
    decoder = decoders[config.model_type](config, hidden)
    dropout = dropout_of(config)
    dropping = {id(x): replace(x, dropout=dropout) for x in decoder.layers}
    stack = Stack(
        name="text",
        prefix=f"{prefix}{decoder.module}",
        hidden_size=hidden,
        before=tuple(replace(p, name=prefix + p.name) for p in decoder.before),
        layers=tuple(dropping[id(x)] for x in decoder.layers),
        after=tuple(replace(p, name=prefix + p.name) for p in decoder.after),
    )
    return around(
        config,
        class_name,
        stack,
        head_width=decoder.head_width,
        head_bias=decoder.head_bias,
        token_head=decoder.token_head,
        final_norm="layer",
    )


def heads_of(config: Config, hidden: int) -> dict[str, Any]:
    """Attention heads and their size: hidden ÷ heads, whatever else the configuration may say."""
    heads = config.size("num_attention_heads")
    return {"heads": heads, "head_dim": config.divided("hidden_size", hidden, heads)}


def positions_of(config: Config) -> int:
    return config.size("max_position_embeddings", high=1 << 24)


def inner(config: Config, hidden: int) -> int:
    """Width of the feed-forward: 4·hidden unless the configuration gives another."""
    return config.size("n_inner", "intermediate_size", default=4 * hidden)


def layer(
    attention: Any,
    feed: FeedForward,
    params: tuple[Param, ...],
    parallel: bool = False,
    keeps: bool = False,
    returns_weights: bool = False,
) -> Layer:
    """A layer with LayerNorms; `keeps` where its code holds the attention's output through the feed-forward."""
    return Layer(
        mixers=(attention,),
        feed_forward=feed,
        norm="layer",
        parallel=parallel,
        params=params,
        keeps="mixed" if keeps else None,
        returns_weights=returns_weights,
    )


def two_norms(first: str, second: str, hidden: int, bias: bool = True) -> tuple[Param, ...]:
    return norm(first, hidden, bias) + norm(second, hidden, bias)


def gpt2(config: Config, hidden: int) -> Decoder:
    """GPT-2 and GPT-BigCode; GPT-2's projections are `Conv1D`, whose weights lie the other way round."""
    width, activation = inner(config, hidden), config.text("activation_function", default="gelu_new")
    kv_heads = None
    before = blocks.embedding("wte", config.size("vocab_size"), hidden) + blocks.embedding(
        "wpe", positions_of(config), hidden
    )
    if config.model_type == "gpt_bigcode":
        kv_heads = 1 if config.flag("multi_query", default=True) else None
        before += (Param("bias", (positions_of(config),) * 2, "buffer", "bool"),)
    attention = blocks.fused_attention(
        "attn",
        hidden,
        **heads_of(config, hidden),
        kv_heads=kv_heads,
        bias=True,
        projections=("c_attn", "c_proj"),
        scores="own dtype",
    )
    feed = blocks.mlp("mlp.c_fc", "mlp.c_proj", hidden, width, activation)
    if config.model_type == "gpt2":
        attention = replace(attention, params=_transposed(attention.params))
        feed = replace(feed, params=_transposed(feed.params))
    if config.flag("add_cross_attention"):
        raise HfvramError("unknown_architecture", f"{config.model_type} with cross attention is not known")
    block = layer(attention, feed, two_norms("ln_1", "ln_2", hidden), keeps=True)
    return Decoder((block,) * config.layers("num_hidden_layers"), before, norm("ln_f", hidden, True))


def _transposed(params: tuple[Param, ...]) -> tuple[Param, ...]:
    return tuple(replace(p, shape=p.shape[::-1]) for p in params)


def gpt_neo(config: Config, hidden: int) -> Decoder:
    """Layers take turns with full and local attention; each keeps a causal mask of all positions."""
    layers, positions = config.layers("num_layers"), positions_of(config)
    kinds = _attention_types(config, layers)
    feed = blocks.mlp(
        "mlp.c_fc", "mlp.c_proj", hidden, inner(config, hidden), config.text("activation_function", default="gelu_new")
    )
    mask = Param("attn.attention.bias", (1, 1, positions, positions), "buffer", "bool")
    attention = blocks.attention(
        "attn.attention",
        hidden,
        **heads_of(config, hidden),
        out_bias=True,
        projections=("q_proj", "k_proj", "v_proj", "out_proj"),
        extra=(mask,),
        scores="fp32",
        **EAGER_OR_FLASH,
    )
    # A local layer hides what lies outside its window by its mask; its cache still holds everything.
    block = layer(attention, feed, two_norms("ln_1", "ln_2", hidden), keeps=True, returns_weights=True)
    before = blocks.embedding("wte", config.size("vocab_size"), hidden) + blocks.embedding("wpe", positions, hidden)
    return Decoder((block,) * len(kinds), before, norm("ln_f", hidden, True))


def _attention_types(config: Config, layers: int) -> list[str]:
    """`[[["global", "local"], 12]]` written out; of two known words, as many as there are layers."""
    kinds: list[str] = []
    for item in config.items("attention_types") or [[["global", "local"], 12]]:
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], list) and isinstance(item[1], int)):
            raise HfvramError("bad_config", "config.json: attention_types is not a list of [kinds, count]")
        kinds += [str(kind) for kind in item[0]] * min(max(item[1], 0), 4096)
    if len(kinds) != layers:
        raise HfvramError("bad_config", f"config.json: attention_types describes {len(kinds)} layers of {layers}")
    if strange := set(kinds) - {"global", "local"}:
        raise HfvramError("unknown_architecture", f"layer kind {min(strange)!r} of gpt_neo is not known")
    return kinds


def gptj(config: Config, hidden: int) -> Decoder:
    """GPT-J and CodeGen: attention and feed-forward side by side, rotary positions as a table in every layer."""
    sizes = heads_of(config, hidden)
    rotary_dim = config.size("rotary_dim", default=hidden, low=0) or hidden
    table = Param("attn.embed_positions", (positions_of(config), rotary_dim), "buffer", "fp32")
    # The whole width is the rotary table's where `rotary_dim` is null, but each head turns its own size.
    turned = Rotary(dim=min(rotary_dim, sizes["head_dim"]), style="interleaved", sliced=True)
    style: dict[str, Any] = {"rotary": turned, "extra": (table,), "scores": "fp32"}
    if config.model_type == "gptj":
        attention = blocks.attention(
            "attn",
            hidden,
            **sizes,
            projections=("q_proj", "k_proj", "v_proj", "out_proj"),
            **style,
            **EAGER_OR_FLASH,
        )
    else:
        fused = ("qkv_proj", "out_proj")
        attention = blocks.fused_attention("attn", hidden, **sizes, projections=fused, **style, **EAGER)
    feed = blocks.mlp(
        "mlp.fc_in", "mlp.fc_out", hidden, inner(config, hidden), config.text("activation_function", default="gelu_new")
    )
    block = layer(attention, feed, norm("ln_1", hidden, True), parallel=True, returns_weights=True)
    before = blocks.embedding("wte", config.size("vocab_size"), hidden)
    layers = config.layers("num_hidden_layers")
    return Decoder((block,) * layers, before, norm("ln_f", hidden, True), head_bias=True)


def gpt_neox(config: Config, hidden: int) -> Decoder:
    sizes, bias = heads_of(config, hidden), config.flag("attention_bias", default=True)
    attention = blocks.fused_attention(
        "attention",
        hidden,
        **sizes,
        bias=bias,
        projections=("query_key_value", "dense"),
        rotary=rotary(config, sizes["head_dim"], 0.25),
    )
    activation = config.text("hidden_act", default="gelu")
    feed = blocks.mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", hidden, inner(config, hidden), activation)
    block = layer(
        attention,
        feed,
        two_norms("input_layernorm", "post_attention_layernorm", hidden),
        parallel=config.flag("use_parallel_residual", default=True),
    )
    before = blocks.embedding("embed_in", config.size("vocab_size"), hidden)
    after = norm("final_layer_norm", hidden, True)
    return Decoder((block,) * config.layers("num_hidden_layers"), before, after, module="layers")


DECODERS: dict[str, Build] = {
    "gpt2": gpt2,
    "gpt_bigcode": gpt2,
    "gpt_neo": gpt_neo,
    "gptj": gptj,
    "codegen": gptj,
    "gpt_neox": gpt_neox,
}
