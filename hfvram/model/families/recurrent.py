"""Mixers with a state instead of a cache, as Mamba, Mamba-2 and the hybrids made with them build them.

Source: transformers 5.17, models/{mamba, mamba2, jamba, bamba, qwen3_next}/modeling_*.py.
"""

from typing import Literal

from hfvram.errors import HfvramError
from hfvram.model.config import Config
from hfvram.model.families.blocks import convolution, others
from hfvram.model.layers import Mamba1, Mamba2, linear, norm


def dt_rank(config: Config, name: str, hidden: int) -> int:
    """Rank of Δ's projection: as given, else ⌈hidden ÷ 16⌉."""
    return -(-hidden // 16) if config.get(name) in (None, "auto") else config.size(name)


def mamba1(
    name: str,
    hidden: int,
    inner: int,
    state: int,
    kernel: int,
    rank: int,
    *,
    bias: bool,
    conv_bias: bool,
    norms: Literal["weighted", "bare"] | None = None,
    mask_of_ones: bool = False,
) -> Mamba1:
    """A Mamba mixer. `norms` of Δ, B and C have weights in Jamba and none in Falcon-Mamba."""
    weights = (
        norm(f"{name}.dt_layernorm", rank) + norm(f"{name}.b_layernorm", state) + norm(f"{name}.c_layernorm", state)
    )
    return Mamba1(
        hidden_size=hidden,
        d_inner=inner,
        d_state=state,
        d_conv=kernel,
        dt_rank=rank,
        inner_norms=norms is not None,
        mask_of_ones=mask_of_ones,
        params=others(name, {"A_log": (inner, state), "D": (inner,)})
        + convolution(f"{name}.conv1d", inner, 1, kernel, bias=conv_bias)
        + linear(f"{name}.in_proj", hidden, 2 * inner, bias)
        + linear(f"{name}.x_proj", inner, rank + 2 * state)
        + linear(f"{name}.dt_proj", rank, inner, bias=True)
        + linear(f"{name}.out_proj", inner, hidden, bias)
        + (weights if norms == "weighted" else ()),
    )


def mamba2(
    name: str,
    hidden: int,
    heads: int,
    head_dim: int,
    state: int,
    groups: int,
    kernel: int,
    chunk: int,
    *,
    bias: bool,
    conv_bias: bool,
    out_bias: bool | None = None,
    gated_norm: bool = True,
    multipliers: bool = False,
) -> Mamba2:
    """A Mamba-2 mixer: one projection makes gate, x, B, C and Δ. `groups` must divide the heads."""
    inner = heads * head_dim
    channels = inner + 2 * groups * state
    if heads % groups:
        raise HfvramError("bad_config", f"config.json: {heads} Mamba-2 heads can't be split into {groups} groups")
    return Mamba2(
        hidden_size=hidden,
        heads=heads,
        head_dim=head_dim,
        d_state=state,
        groups=groups,
        d_conv=kernel,
        chunk_size=chunk,
        gated_norm=gated_norm,
        multipliers=multipliers,
        params=others(name, {"dt_bias": (heads,), "A_log": (heads,), "D": (heads,)})
        + convolution(f"{name}.conv1d", channels, 1, kernel, bias=conv_bias)
        + linear(f"{name}.in_proj", hidden, inner + channels + heads, bias)
        + (norm(f"{name}.norm", inner) if gated_norm else ())
        + linear(f"{name}.out_proj", inner, hidden, bias if out_bias is None else out_bias),
    )


def mamba2_of(config: Config, name: str, hidden: int, inner: int | None = None) -> Mamba2:
    """The Mamba-2 mixer of configurations with Bamba's keys (`mamba_n_heads`, `mamba_d_state`…) and defaults.

    `inner` is the width of all heads where it isn't `mamba_expand` · hidden. Raises `bad_config` where heads and head
    size don't come to that width, as transformers does.
    """
    heads = config.size("mamba_n_heads")
    inner = inner or config.size("mamba_expand") * hidden
    head_dim = config.divided("Mamba's inner width", inner, heads)
    if config.get("mamba_d_head") not in (None, "auto", head_dim):
        raise HfvramError("bad_config", f"config.json: mamba_d_head is not {inner} ÷ {heads} heads")
    bias = config.flag("mamba_proj_bias")
    return mamba2(
        name,
        hidden,
        heads,
        head_dim,
        config.size("mamba_d_state"),
        config.size("mamba_n_groups"),
        config.size("mamba_d_conv"),
        config.size("mamba_chunk_size"),
        bias=bias,
        conv_bias=config.flag("mamba_conv_bias"),
        out_bias=config.flag("projectors_bias") if config.model_type == "falcon_h1" else bias,
        gated_norm=config.model_type != "falcon_h1" or config.flag("mamba_rms_norm"),
        multipliers=config.model_type == "falcon_h1",
    )
