"""DeepSeek-V4: compressed attention, hyper-connections, experts that the first layers choose by the token's number.

Source: transformers 5.17, models/deepseek_v4/{modeling, configuration}_deepseek_v4.py.
"""

from dataclasses import replace
from functools import cache
from typing import Literal

from hfvram.errors import HfvramError, printable
from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families import llama, moe
from hfvram.model.families.common import layer_kinds
from hfvram.model.families.defaults import opened
from hfvram.model.layers import CompressedAttention, Layer, MixtureOfExperts, Param, linear, norm

Kind = Literal["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
KINDS: dict[str, Kind] = {
    "sliding_attention": "sliding_attention",
    "compressed_sparse_attention": "compressed_sparse_attention",
    "heavily_compressed_attention": "heavily_compressed_attention",
}
RATIOS = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}


def read(config: Config, class_name: str | None) -> Architecture:
    config, class_name, prefix = opened(config, class_name)
    return llama.decoder(config, class_name, stack(config, prefix))


def stack(config: Config, prefix: str) -> Stack:
    """The text stack under `prefix`."""
    hidden, streams = config.size("hidden_size"), config.size("hc_mult", default=4, high=64)
    kinds = attention_kinds(config)
    hashed = hash_layers(config, len(kinds))
    mixture = moe.mixture_of_experts(config, moe.EXPERTS["deepseek_v4"], hidden)
    table = Param("mlp.gate.tid2eid", (config.size("vocab_size"), mixture.top_k), "buffer", "int64")

    @cache
    def layer(kind: Kind, hash_moe: bool) -> Layer:
        feed: MixtureOfExperts = replace(mixture, params=(*mixture.params, table)) if hash_moe else mixture
        norms = norm("input_layernorm", hidden) + norm("post_attention_layernorm", hidden)
        connections = (hyper_connection(name, hidden, streams) for name in ("attn_hc", "ffn_hc"))
        return Layer(
            mixers=(attention(config, hidden, kind),),
            feed_forward=feed,
            streams=streams,
            params=sum(connections, norms),
        )

    text = llama.stack(config, prefix, lambda i: mixture, lambda i: attention(config, hidden, kinds[i]))
    head = tuple(
        Param(f"{prefix}hc_head.{name}", shape, "other")
        for name, shape in (("hc_fn", (streams, streams * hidden)), ("hc_base", (streams,)), ("hc_scale", (1,)))
    )
    layers = tuple(layer(kind, hash_moe) for kind, hash_moe in zip(kinds, hashed, strict=True))
    return replace(text, layers=layers, after=text.after + head)


def attention_kinds(config: Config) -> list[Kind]:
    """The kind of every layer: `layer_types`, else the older `compress_ratios`, else the family's alternation."""
    layers = config.layers("num_hidden_layers")
    named = layer_kinds(config, layers, tuple(KINDS))
    ratios = config.items("compress_ratios")
    if named is None and ratios is not None:
        if strange := [r for r in ratios if isinstance(r, (list, dict)) or r not in RATIOS]:
            raise HfvramError("bad_config", f"config.json: compress_ratios has {printable(str(strange[0]), 40)}")
        if len(ratios) < layers:
            raise HfvramError("bad_config", f"config.json: compress_ratios names {len(ratios)} layers of {layers}")
        named = [RATIOS[r] for r in ratios[:layers]]
    if named is None:
        first = ["heavily_compressed_attention"] * min(layers, 2)
        rest = ("heavily_compressed_attention", "compressed_sparse_attention")
        named = first + [rest[i % 2] for i in range(max(layers - 2, 0))]
    return [KINDS[kind] for kind in named]


def hash_layers(config: Config, layers: int) -> list[bool]:
    """The layers whose experts are looked up by the token instead of routed."""
    kinds = config.strings("mlp_layer_types")
    if kinds is None:
        first = config.layers("num_hash_layers", default=3)
        return [i < first for i in range(layers)]
    if len(kinds) < layers:
        raise HfvramError("bad_config", f"config.json: mlp_layer_types names {len(kinds)} layers of {layers}")
    if strange := set(kinds) - {"hash_moe", "moe"}:
        what = printable(min(strange), 40)
        raise HfvramError("unknown_architecture", f"layer kind {what!r} of deepseek_v4 is not known")
    return [kind == "hash_moe" for kind in kinds[:layers]]


def hyper_connection(name: str, hidden: int, streams: int) -> tuple[Param, ...]:
    """The mixing of the residual streams before and after one part of a layer."""
    mix = (2 + streams) * streams
    shapes = (("fn", (mix, streams * hidden)), ("base", (mix,)), ("scale", (3,)))
    return tuple(Param(f"{name}.{key}", shape, "other") for key, shape in shapes)


def compression_rate(config: Config, kind: Kind) -> int:
    rates = config.section("compress_rates") or Config({})
    if kind == "compressed_sparse_attention":
        return config.size("compress_rate_csa", default=rates.size(kind, default=4))
    return config.size("compress_rate_hca", default=rates.size(kind, default=128))


def attention(config: Config, hidden: int, kind: Kind) -> CompressedAttention:
    heads, dim, rank = config.size("num_attention_heads"), config.size("head_dim"), config.size("q_lora_rank")
    groups, out_rank = config.size("o_groups"), config.size("o_lora_rank")
    index_heads, index_dim = config.size("index_n_heads"), config.size("index_head_dim")
    params = (
        Param("self_attn.sinks", (heads,), "other"),
        *linear("self_attn.q_a_proj", hidden, rank),
        *norm("self_attn.q_a_norm", rank),
        *linear("self_attn.q_b_proj", rank, heads * dim),
        *linear("self_attn.kv_proj", hidden, dim),
        *norm("self_attn.kv_norm", dim),
        *linear(
            "self_attn.o_a_proj",
            config.divided("num_attention_heads x head_dim", heads * dim, groups),
            groups * out_rank,
            kind="linear_subclass",
        ),
        *linear("self_attn.o_b_proj", groups * out_rank, hidden),
    )
    rate, sparse = 0, kind == "compressed_sparse_attention"
    if kind != "sliding_attention":
        rate = compression_rate(config, kind)
        params += compressor("self_attn.compressor", hidden, dim, rate, 2 if sparse else 1)
    if sparse:
        indexer = "self_attn.compressor.indexer"
        params += compressor(indexer, hidden, index_dim, rate, 2)
        params += linear(f"{indexer}.q_b_proj", rank, index_heads * index_dim)
        params += linear(f"{indexer}.scorer.weights_proj", hidden, index_heads)
    rotary_dim = config.size("qk_rope_head_dim", default=0, low=0)
    factor = config.number("partial_rotary_factor", default=rotary_dim / dim or 0.125)
    return CompressedAttention(
        kind=kind,
        hidden_size=hidden,
        heads=heads,
        head_dim=dim,
        rotary_dim=int(dim * factor),
        q_lora_rank=rank,
        output_groups=groups,
        output_lora_rank=out_rank,
        window=config.size("sliding_window"),
        rate=rate,
        index_heads=index_heads if sparse else 0,
        index_head_dim=index_dim if sparse else 0,
        index_top_k=config.size("index_topk") if sparse else 0,
        params=params,
    )


def compressor(name: str, hidden: int, dim: int, rate: int, series: int) -> tuple[Param, ...]:
    """What turns `rate` tokens into one entry: two overlapping series of them in sparse layers, one in the others."""
    return (
        Param(f"{name}.position_bias", (rate, series * dim), "other"),
        *linear(f"{name}.kv_proj", hidden, series * dim),
        *linear(f"{name}.gate_proj", hidden, series * dim),
        *norm(f"{name}.kv_norm", dim),
    )
