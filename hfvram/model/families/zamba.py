"""Zamba and Zamba2: Mamba layers, and before some of them a transformer block whose weights several layers share.

Source: transformers 5.17, models/{zamba, zamba2}/modeling_*.py and configuration_*.py.
"""

from dataclasses import replace

from hfvram.errors import HfvramError
from hfvram.model.architecture import Architecture
from hfvram.model.config import Config
from hfvram.model.families.blocks import attention, convolution, fused_gated_mlp, gated_mlp, others
from hfvram.model.families.decoder import decoder, hybrid_kinds
from hfvram.model.families.defaults import known
from hfvram.model.families.recurrent import dt_rank, mamba2
from hfvram.model.layers import Attention, FeedForward, Layer, Mamba1, Mamba2, Param, Rotary, linear, norm


def read(config: Config, class_name: str | None) -> Architecture:
    """Every hybrid layer runs a transformer block and keeps a cache of its own.

    Only the first of those that share a block owns its parameters, in Zamba2 together with the adapters of them all.
    """
    config = known(config)
    second = config.model_type == "zamba2"
    hidden = config.size("hidden_size")
    kinds = hybrid_kinds(config, pattern(config), ("layers_block_type", "layer_types"), ("linear_attention", "hybrid"))
    blocks = config.size("num_mem_blocks") if second else 1
    hybrids = kinds.count("hybrid")
    shared = "shared_transformer" if second else "shared_transf"

    def mixer(name: str) -> Mamba1 | Mamba2:
        return state_space_2(config, name, hidden) if second else state_space(config, name, hidden)

    def hybrid(number: int) -> Layer:
        """The layer that is the `number`-th to run a shared block."""
        softmax = self_attention(config, f"{shared}.self_attn", hidden)
        feed_forward = dense(config, f"{shared}.feed_forward", hidden)
        norms = norm(f"{shared}.input_layernorm", softmax.hidden_size) + norm(f"{shared}.pre_ff_layernorm", hidden)
        if number >= blocks:
            softmax, feed_forward, norms = replace(softmax, params=()), replace(feed_forward, params=()), ()
        elif second:
            users = range(number, hybrids, blocks)
            softmax = replace(softmax, params=softmax.params + attention_adapters(config, softmax, shared, users))
            adapters = feed_forward_adapters(config, feed_forward, shared, users)
            feed_forward = replace(feed_forward, params=feed_forward.params + adapters)
        return Layer(
            mixers=(softmax, mixer("mamba_decoder.mamba")),
            feed_forward=feed_forward,
            params=norms + linear("linear", hidden, hidden) + norm("mamba_decoder.input_layernorm", hidden),
        )

    plain = Layer(mixers=(mixer("mamba"),), params=norm("input_layernorm", hidden))
    followers = hybrid(blocks)
    layers: list[Layer] = []
    seen = 0
    for kind in kinds:
        if kind == "hybrid":
            layers.append(hybrid(seen) if seen < blocks else followers)
            seen += 1
        else:
            layers.append(plain)
    return decoder(config, class_name, layers, final="final_layernorm")


def pattern(config: Config) -> list[str]:
    """The layers where no key lists them."""
    mamba, hybrid = "linear_attention", "hybrid"
    if config.model_type == "zamba2":
        return [mamba] + ([mamba] * 5 + [hybrid]) * 7 + [mamba] * 4 + [hybrid] + [mamba] * 3 + [hybrid] + [mamba] * 2
    every, offset = config.size("attn_layer_period"), config.layers("attn_layer_offset")
    rest = range(config.layers("num_hidden_layers") - 3)
    return [mamba, mamba, hybrid] + [hybrid if i % every == offset else mamba for i in rest]


def self_attention(config: Config, name: str, hidden: int) -> Attention:
    """Attention over the hidden state and the embedding side by side: 2 · hidden wide in, hidden wide out."""
    heads = config.size("num_attention_heads")
    wide, head_dim = 2 * hidden, config.divided("2 × hidden_size", 2 * hidden, heads)
    if config.model_type == "zamba":
        wide = config.size("attention_hidden_size", default=wide)
        head_dim = config.size("attention_head_dim", default=head_dim)
    turns = Rotary(dim=head_dim) if config.model_type == "zamba2" and config.flag("use_mem_rope") else None
    kv_heads = config.size("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise HfvramError("bad_config", f"config.json: {heads} attention heads can't share {kv_heads} KV heads")
    return attention(name, wide, heads, head_dim, kv_heads, out=hidden, rotary=turns)


def dense(config: Config, name: str, hidden: int) -> FeedForward:
    activation = config.text("hidden_act", default="gelu")
    width = config.size("intermediate_size", default=4 * hidden)
    if config.model_type == "zamba":
        return gated_mlp(name, hidden, width, activation)
    return fused_gated_mlp(name, hidden, width, activation, bias=config.flag("add_bias_linear"))


def attention_adapters(config: Config, softmax: Attention, shared: str, users: range) -> tuple[Param, ...]:
    """Low-rank adapters of queries, keys and values, a pair of layers for each user of the block."""
    if not config.flag("use_shared_attention_adapter"):
        return ()
    wide, rank = softmax.hidden_size, config.size("adapter_rank")
    lists = (f"{shared}.self_attn.linear_{name}_adapter_list" for name in "qkv")
    return sum((pair(f"{name}.{i}", wide, rank, wide) for name in lists for i in users), ())


def feed_forward_adapters(config: Config, dense: FeedForward, shared: str, users: range) -> tuple[Param, ...]:
    """Low-rank adapters of the feed-forward's first projection."""
    name, rank = f"{shared}.feed_forward.gate_up_proj_adapter_list", config.size("adapter_rank")
    return sum((pair(f"{name}.{i}", dense.hidden_size, rank, 2 * dense.intermediate_size) for i in users), ())


def pair(name: str, inputs: int, rank: int, outputs: int) -> tuple[Param, ...]:
    return linear(f"{name}.0", inputs, rank) + linear(f"{name}.1", rank, outputs)


def state_space(config: Config, name: str, hidden: int) -> Mamba1:
    """Zamba's Mamba, with Δ, B and C made head by head: bare tensors where Mamba has layers."""
    heads, state, kernel = config.size("n_mamba_heads"), config.size("mamba_d_state"), config.size("mamba_d_conv")
    inner, rank = config.size("mamba_expand") * hidden, dt_rank(config, "mamba_dt_rank", hidden)
    head_dim, bias = config.divided("Mamba's inner width", inner, heads), config.flag("mamba_proj_bias")
    tensors = {
        "x_proj_weight": (heads, rank + 2 * state, head_dim),
        "dt_proj_weight": (heads, head_dim, rank),
        "dt_proj_bias": (heads, head_dim),
        "D": (heads, head_dim),
    }
    decay = Param(f"{name}.A_log", (heads, head_dim, state), "other", "fp32")
    return Mamba1(
        hidden_size=hidden,
        d_inner=inner,
        d_state=state,
        d_conv=kernel,
        dt_rank=rank,
        heads=heads,
        params=(
            *others(name, tensors),
            decay,
            *convolution(f"{name}.conv1d", inner, 1, kernel, bias=config.flag("mamba_conv_bias")),
            *linear(f"{name}.in_proj", hidden, 2 * inner, bias),
            *linear(f"{name}.out_proj", inner, hidden, bias),
        ),
    )


def state_space_2(config: Config, name: str, hidden: int) -> Mamba2:
    heads, inner = config.size("n_mamba_heads"), config.size("mamba_expand") * hidden
    return mamba2(
        name,
        hidden,
        heads,
        config.divided("Mamba's inner width", inner, heads),
        config.size("mamba_d_state"),
        config.size("mamba_ngroups"),
        config.size("mamba_d_conv"),
        config.size("chunk_size"),
        bias=config.flag("add_bias_linear"),
        conv_bias=True,
    )
