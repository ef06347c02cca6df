"""Decoders whose feed-forwards are mixtures of experts: Mixtral, Qwen-MoE, OLMoE, Phi-MoE, Granite-MoE, gpt-oss, …

The experts of a layer are fused 3-D tensors in transformers 5.17 whatever the checkpoint has. What stands around them
is in `styles.py`. Source: transformers 5.17, models/*/modeling_*.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families import blocks, llama
from hfvram.model.families.defaults import opened
from hfvram.model.families.styles import STYLES, flag
from hfvram.model.layers import FeedForward, MixtureOfExperts, Param, ParamKind, linear

COUNT = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_k")


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """How a family lays out its mixture of experts; Mixtral's values are the defaults."""

    module: str = "mlp"
    router: str = "gate"
    router_kind: ParamKind = "other"
    router_fp32: bool = False
    routing_fp32: bool = True
    width: str = "intermediate_size"
    shared: str = ""
    """Name of the shared experts' module, "" where there are none."""
    shared_width: Callable[[Config], int] = lambda config: 0
    normalizes: bool = False
    """The chosen experts' weights are divided by their sum, whatever the configuration says."""
    experts_first: bool = False
    """The experts stand before the router."""
    sparse: Callable[[Config, int], bool] = lambda config, index: True
    """Whether the feed-forward of this layer is a mixture."""


def first_dense(config: Config, index: int, first: int | None = None) -> bool:
    """DeepSeek's and GLM's rule: `mlp_layer_types`, else all but the first `first_k_dense_replace` layers."""
    kinds = config.strings("mlp_layer_types")
    if kinds is not None and index < len(kinds):
        return kinds[index] == "sparse"
    return index >= (config.layers("first_k_dense_replace", default=0) if first is None else first)


def _qwen(config: Config, index: int) -> bool:
    step = config.size("decoder_sparse_step", default=1)
    return index not in (config.items("mlp_only_layers") or []) and (index + 1) % step == 0


def _ernie(config: Config, index: int) -> bool:
    last = config.size("moe_layer_end_index", default=-1, low=-1)
    first = config.layers("moe_layer_start_index", default=0)
    every = config.size("moe_layer_interval", default=1)
    return (index + 1) % every == 0 and first <= index and (last == -1 or index <= last)


def shared_experts(config: Config) -> int:
    """Width of DeepSeek's and GLM's shared experts together."""
    return config.size("moe_intermediate_size") * config.size(
        "n_shared_experts", "moe_num_shared_experts", default=0, low=0, high=4096
    )


DEEPSEEK = Experts(
    width="moe_intermediate_size",
    router_fp32=True,
    routing_fp32=True,
    shared="shared_experts",
    shared_width=shared_experts,
    experts_first=True,
    sparse=first_dense,
)
EXPERTS: dict[str, Experts] = {
    "mixtral": Experts(routing_fp32=True),
    "minimax_m2": Experts(routing_fp32=True),
    "olmoe": Experts(routing_fp32=False),
    "qwen3_moe": Experts(routing_fp32=False, width="moe_intermediate_size", experts_first=True, sparse=_qwen),
    "qwen3_vl_moe_text": Experts(
        routing_fp32=False, width="moe_intermediate_size", normalizes=True, experts_first=True, sparse=_qwen
    ),
    "qwen2_moe": Experts(
        routing_fp32=False,
        width="moe_intermediate_size",
        shared="shared_expert",
        shared_width=lambda config: config.size("shared_expert_intermediate_size"),
        sparse=_qwen,
    ),
    "phimoe": Experts(routing_fp32=False, router="router", router_kind="linear_subclass"),
    "granitemoe": Experts(routing_fp32=False, module="block_sparse_moe", router="router"),
    "granitemoeshared": Experts(
        routing_fp32=False,
        module="block_sparse_moe",
        router="router",
        shared="shared_mlp",
        shared_width=lambda config: config.size("shared_intermediate_size", default=0, low=0),
    ),
    "gpt_oss": Experts(routing_fp32=False, router="router"),
    "glm4_moe": DEEPSEEK,
    "glm4v_moe_text": DEEPSEEK,
    "glm4_moe_lite": replace(DEEPSEEK, sparse=lambda config, index: first_dense(config, index, first=1)),
    "glm_moe_dsa": DEEPSEEK,
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "deepseek_v32": DEEPSEEK,
    "deepseek_v4": replace(DEEPSEEK, router_fp32=False, routing_fp32=False, sparse=lambda config, index: True),
    "ernie4_5_moe": Experts(
        width="moe_intermediate_size",
        router_fp32=True,
        shared="shared_experts",
        shared_width=shared_experts,
        sparse=_ernie,
    ),
}


def read(config: Config, class_name: str | None) -> Architecture:
    config, class_name, prefix = opened(config, class_name)
    return llama.decoder(config, class_name, stack(config, prefix))


def stack(config: Config, prefix: str, attend: llama.Attend | None = None) -> Stack:
    """The text stack under `prefix`; `attend` builds its attention where it is not the family's style."""
    hidden = config.size("hidden_size")
    layout, style = EXPERTS[config.model_type], STYLES[config.model_type]
    mixture = mixture_of_experts(config, layout, hidden)

    def feed(index: int) -> FeedForward | MixtureOfExperts:
        return mixture if layout.sparse(config, index) else llama.feed_forward(config, style, hidden)

    return llama.stack(config, prefix, feed, attend)


def mixture_of_experts(config: Config, layout: Experts, hidden: int) -> MixtureOfExperts:
    """The mixture of one layer, its parameters named relative to the layer."""
    count = config.size(*COUNT)
    width, shared = config.size(layout.width), layout.shared_width(config)
    experts, router = f"{layout.module}.experts", f"{layout.module}.{layout.router}"
    params: tuple[Param, ...] = (Param(f"{router}.weight", (count, hidden), layout.router_kind),)
    if config.model_type == "gpt_oss":
        params += (
            Param(f"{router}.bias", (count,), "bias"),
            Param(f"{experts}.gate_up_proj", (count, hidden, 2 * width), "experts"),
            Param(f"{experts}.gate_up_proj_bias", (count, 2 * width), "experts"),
            Param(f"{experts}.down_proj", (count, width, hidden), "experts"),
            Param(f"{experts}.down_proj_bias", (count, hidden), "experts"),
        )
    else:
        if config.model_type == "ernie4_5_moe":
            params += (Param(f"{router}.moe_statics.e_score_correction_bias", (1, count), "other"),)
        fused = blocks.fused_experts(experts, count, hidden, width)
        params = fused + params if layout.experts_first else params + fused
    if shared:
        params += _shared(config, layout, hidden, shared)
    return MixtureOfExperts(
        hidden_size=hidden,
        experts=count,
        top_k=config.size(*CHOSEN, default=1, high=count),
        intermediate_size=width,
        shared_intermediate_size=shared,
        activation=config.text("hidden_activation", "hidden_act", default="silu"),
        router_fp32=layout.router_fp32,
        routing_fp32=layout.routing_fp32,
        expert_bias=config.model_type == "gpt_oss",
        normalized=layout.normalizes or config.flag("norm_topk_prob"),
        group_limited=config.get("topk_method") == "group_limited_greedy",
        groups=config.size("n_group", default=1),
        groups_chosen=config.size("topk_group", default=1),
        auxiliary=config.flag("output_router_logits"),
        jitter=bool(config.number("router_jitter_noise", "input_jitter_noise", default=0.0)),
        params=params,
    )


def _shared(config: Config, layout: Experts, hidden: int, width: int) -> tuple[Param, ...]:
    """The experts that every token passes, and Qwen2's gate on them."""
    if layout.shared == "shared_mlp":
        return linear("shared_mlp.input_linear", hidden, 2 * width) + linear("shared_mlp.output_linear", width, hidden)
    name = f"{layout.module}.{layout.shared}"
    bias = flag(config, STYLES[config.model_type].mlp_bias) if config.model_type in STYLES else False
    gate = linear(f"{layout.module}.shared_expert_gate", hidden, 1) if layout.shared == "shared_expert" else ()
    return blocks.gated_mlp(name, hidden, width, bias=bias).params + gate
