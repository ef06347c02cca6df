"""Kin of the GPT line: OPT, BLOOM, Falcon, MPT.

Source: transformers 5.17, models/{opt, bloom, falcon, mpt}/modeling_*.py.
"""

from dataclasses import replace

from hfvram.model.architecture import Architecture
from hfvram.model.config import Config
from hfvram.model.families import blocks
from hfvram.model.families.common import rotary
from hfvram.model.families.defaults import known
from hfvram.model.families.gpt import EAGER, Build, Decoder, heads_of, layer, positions_of, two_norms, whole
from hfvram.model.layers import Param, linear, norm


def read(config: Config, class_name: str | None) -> Architecture:
    return whole(known(config), class_name, DECODERS)


def opt(config: Config, hidden: int) -> Decoder:
    """Learned positions, two of them reserved; OPT-350m norms after, and projects its narrower embedding."""
    bias, affine = config.flag("enable_bias", default=True), config.flag("layer_norm_elementwise_affine", default=True)
    first = config.flag("do_layer_norm_before", default=True)
    narrow = config.size("word_embed_proj_dim", default=hidden)
    attention = blocks.attention(
        "self_attn",
        hidden,
        **heads_of(config, hidden),
        bias=bias,
        projections=("q_proj", "k_proj", "v_proj", "out_proj"),
    )
    feed = blocks.mlp(
        "fc1", "fc2", hidden, config.size("ffn_dim"), config.text("activation_function", default="relu"), bias
    )
    feed = replace(feed, inline=True)
    norms = two_norms("self_attn_layer_norm", "final_layer_norm", hidden) if affine else ()
    block = replace(layer(attention, feed, norms), norm_position="pre" if first else "post")
    before = blocks.embedding("decoder.embed_tokens", config.size("vocab_size"), narrow) + blocks.embedding(
        "decoder.embed_positions", positions_of(config) + 2, hidden
    )
    if narrow != hidden:
        before += linear("decoder.project_out", hidden, narrow) + linear("decoder.project_in", narrow, hidden)
    last = first and affine and not config.flag("_remove_final_layer_norm")
    after = norm("decoder.final_layer_norm", hidden, True) if last else ()
    layers = config.layers("num_hidden_layers")
    return Decoder((block,) * layers, before, after, "decoder.layers", head_width=narrow, token_head="score")


def bloom(config: Config, hidden: int) -> Decoder:
    """Positions are a bias (ALiBi); a norm follows the embedding."""
    attention = blocks.fused_attention(
        "self_attention",
        hidden,
        **heads_of(config, hidden),
        bias=True,
        projections=("query_key_value", "dense"),
        position_bias=True,
        named_scores=2,
        flattened=True,
        **EAGER,
    )
    feed = blocks.mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", hidden, 4 * hidden, "gelu_bloom")
    feed = replace(feed, adds_residual=True)
    block = layer(
        attention,
        feed,
        two_norms("input_layernorm", "post_attention_layernorm", hidden),
        returns_weights=True,
    )
    before = blocks.embedding("word_embeddings", config.size("vocab_size"), hidden) + norm(
        "word_embeddings_layernorm", hidden, True
    )
    return Decoder((block,) * config.layers("num_hidden_layers"), before, norm("ln_f", hidden, True))


def falcon(config: Config, hidden: int) -> Decoder:
    """Falcon-7B shares one key and value head; the new decoder (40B, 180B) has groups, and a norm for each branch."""
    sizes, bias = heads_of(config, hidden), config.flag("bias")
    new, parallel = config.flag("new_decoder_architecture"), config.flag("parallel_attn", default=True)
    alibi = config.flag("alibi")
    if new:
        kv_heads = config.size("num_kv_heads", default=sizes["heads"])
    else:
        kv_heads = 1 if config.flag("multi_query", default=True) else sizes["heads"]
    attention = blocks.fused_attention(
        "self_attention",
        hidden,
        **sizes,
        kv_heads=kv_heads,
        bias=bias,
        projections=("query_key_value", "dense"),
        rotary=None if alibi else rotary(config, sizes["head_dim"]),
        position_bias=alibi,
        groups="expanded" if new else "broadcast",
        always_masked=True,
    )
    width = config.size("ffn_hidden_size", default=4 * hidden)
    feed = blocks.mlp(
        "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", hidden, width, config.text("activation", default="gelu"), bias
    )
    norms = config.size("num_ln_in_parallel_attn", default=2 if new else 1)
    if not parallel:
        params = two_norms("post_attention_layernorm", "input_layernorm", hidden)
    else:
        params = two_norms("ln_attn", "ln_mlp", hidden) if norms == 2 else norm("input_layernorm", hidden, True)
    block = layer(
        replace(attention, params=_own_linear(attention.params)),
        replace(feed, params=_own_linear(feed.params)),
        params,
        parallel=parallel or new,
        returns_weights=True,
    )
    block = replace(block, norms_first=parallel and norms == 2)
    before = blocks.embedding("word_embeddings", config.size("vocab_size"), hidden)
    return Decoder((block,) * config.layers("num_hidden_layers"), before, norm("ln_f", hidden, True))


def _own_linear(params: tuple[Param, ...]) -> tuple[Param, ...]:
    """Falcon's layers are a subclass of `nn.Linear`."""
    return tuple(replace(p, kind="linear_subclass") if p.kind == "linear" else p for p in params)


def mpt(config: Config, hidden: int) -> Decoder:
    """ALiBi, and no bias anywhere."""
    attention = blocks.fused_attention(
        "attn",
        hidden,
        **heads_of(config, hidden),
        projections=("Wqkv", "out_proj"),
        position_bias=True,
        scores="fp32 bias",
        named_scores=1,
        **EAGER,
    )
    feed = blocks.mlp("ffn.up_proj", "ffn.down_proj", hidden, 4 * hidden, "gelu", bias=False)
    feed = replace(feed, adds_residual=True)
    block = layer(attention, feed, two_norms("norm_1", "norm_2", hidden, bias=False), keeps=True, returns_weights=True)
    before = blocks.embedding("wte", config.size("vocab_size"), hidden)
    return Decoder((block,) * config.layers("num_hidden_layers"), before, norm("norm_f", hidden), module="blocks")


DECODERS: dict[str, Build] = {"opt": opt, "bloom": bloom, "falcon": falcon, "mpt": mpt}
