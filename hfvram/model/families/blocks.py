"""Blocks that many families build alike, under names of their own: attention, feed-forward, experts, convolutions."""

from collections.abc import Mapping
from typing import Any

from hfvram.model.layers import Activation, Attention, FeedForward, Param, ParamKind, linear


def attention(
    name: str,
    hidden: int,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    *,
    bias: bool = False,
    out_bias: bool | None = None,
    k_bias: bool | None = None,
    projections: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    memory: int | None = None,
    out: int | None = None,
    extra: tuple[Param, ...] = (),
    **style: Any,
) -> Attention:
    """Attention with one projection each for queries, keys, values and output, in this order.

    `memory` is the width of what keys and values are made from (an encoder's, in cross attention), `out` the width of
    the output, both `hidden` unless given; `extra` are parameters after the projections; `style` goes to `Attention`.
    """
    kv_heads = kv_heads or heads
    query, key, value, output = projections
    wide, kv_wide = heads * head_dim, kv_heads * head_dim
    source = memory or hidden
    return Attention(
        hidden_size=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=head_dim,
        params=linear(f"{name}.{query}", hidden, wide, bias)
        + linear(f"{name}.{key}", source, kv_wide, bias if k_bias is None else k_bias)
        + linear(f"{name}.{value}", source, kv_wide, bias)
        + linear(f"{name}.{output}", wide, out or hidden, bias if out_bias is None else out_bias)
        + extra,
        **style,
    )


def fused_attention(
    name: str,
    hidden: int,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    *,
    bias: bool = False,
    out_bias: bool | None = None,
    projections: tuple[str, str] = ("qkv_proj", "o_proj"),
    extra: tuple[Param, ...] = (),
    **style: Any,
) -> Attention:
    """Attention with one projection for queries, keys and values together, and one for the output."""
    kv_heads = kv_heads or heads
    qkv, output = projections
    return Attention(
        hidden_size=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=head_dim,
        fused_qkv=True,
        params=linear(f"{name}.{qkv}", hidden, (heads + 2 * kv_heads) * head_dim, bias)
        + linear(f"{name}.{output}", heads * head_dim, hidden, bias if out_bias is None else out_bias)
        + extra,
        **style,
    )


def gated_mlp(
    name: str,
    hidden: int,
    width: int,
    activation: Activation = "silu",
    bias: bool = False,
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> FeedForward:
    """down(act(gate(x)) · up(x)), under Llama's names unless others are given."""
    gate, up, down = projections
    return FeedForward(
        hidden_size=hidden,
        intermediate_size=width,
        gated=True,
        activation=activation,
        params=linear(f"{name}.{gate}", hidden, width, bias)
        + linear(f"{name}.{up}", hidden, width, bias)
        + linear(f"{name}.{down}", width, hidden, bias),
    )


def fused_gated_mlp(
    name: str,
    hidden: int,
    width: int,
    activation: Activation = "silu",
    projections: tuple[str, str] = ("gate_up_proj", "down_proj"),
    bias: bool = False,
) -> FeedForward:
    """down(act(gate(x)) · up(x)) with gate and up in one projection (Phi-3)."""
    return FeedForward(
        hidden_size=hidden,
        intermediate_size=width,
        gated=True,
        activation=activation,
        fused_gate_up=True,
        params=linear(f"{name}.{projections[0]}", hidden, 2 * width, bias)
        + linear(f"{name}.{projections[1]}", width, hidden, bias),
    )


def mlp(up: str, down: str, hidden: int, width: int, activation: Activation, bias: bool = True) -> FeedForward:
    """down(act(up(x))), the two layers by their full names."""
    return FeedForward(
        hidden_size=hidden,
        intermediate_size=width,
        gated=False,
        activation=activation,
        params=linear(up, hidden, width, bias) + linear(down, width, hidden, bias),
    )


def fused_experts(name: str, experts: int, hidden: int, width: int, gated: bool = True) -> tuple[Param, ...]:
    """The two 3-D tensors that hold all experts of a layer: gate and up in one, and down."""
    first = Param(f"{name}.gate_up_proj", (experts, 2 * width, hidden), "experts")
    if not gated:
        first = Param(f"{name}.up_proj", (experts, width, hidden), "experts")
    return (first, Param(f"{name}.down_proj", (experts, hidden, width), "experts"))


def convolution(name: str, outputs: int, inputs: int, *kernel: int, bias: bool = True) -> tuple[Param, ...]:
    """`nn.Conv1d` to `nn.Conv3d`: a weight (outputs, inputs ÷ groups, *kernel) and, with `bias`, a bias."""
    weight = Param(f"{name}.weight", (outputs, inputs, *kernel), "conv")
    return (weight, Param(f"{name}.bias", (outputs,), "bias")) if bias else (weight,)


def embedding(name: str, rows: int, width: int) -> tuple[Param, ...]:
    """`nn.Embedding`: a weight (rows, width)."""
    return (Param(f"{name}.weight", (rows, width), "embedding"),)


def others(name: str, shapes: Mapping[str, tuple[int, ...]], kind: ParamKind = "other") -> tuple[Param, ...]:
    """Bare parameters of the module `name`: A_log, D, dt_bias and their like."""
    return tuple(Param(f"{name}.{key}" if name else key, shape, kind) for key, shape in shapes.items())
