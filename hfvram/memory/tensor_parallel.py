"""Tensor parallelism by formula: one rank's part of a model is a model itself, of fewer heads and narrower layers.

transformers splits by each type's `base_model_tp_plan`: products of columns, then of rows, the head's logits gathered;
a type without a plan is split as Megatron-LM does it, whose embedding, logits and loss are parts of the vocabulary.
Every part but the last of an uneven vocabulary is alike; ranks never differ in heads or widths.

Source: transformers 5.17, models/*/configuration_*.py, distributed/tensor_parallel.py; Megatron-LM (arXiv 1909.08053),
megatron/core/tensor_parallel/layers.py, cross_entropy.py.
"""

from dataclasses import replace
from functools import lru_cache
from math import gcd
from typing import Any, Final

from hfvram.errors import HfvramError
from hfvram.memory.mesh import mesh_of
from hfvram.model.architecture import Architecture
from hfvram.model.layers import Attention, FeedForward, Layer, Mixer, MixtureOfExperts, Param, Split
from hfvram.request import Request

COLUMNS: Final = (
    *("q_proj", "k_proj", "v_proj", "query_key_value", "c_attn"),
    *("gate_proj", "up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h"),
)
ROWS: Final = ("o_proj", "out_proj", "dense", "down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h")
FUSED: Final = ("qkv_proj", "gate_up_proj")
"""Products that the code slices: gathered, and the product after them takes its part of what it is given."""
GATHERED: Final = ("olmo2", "olmo3", "olmoe")
"""Types whose queries, keys and values are gathered, since a norm reads all of them."""
PLANNED: Final = (
    *("llama", "mistral", "qwen2", "qwen3", "starcoder2", "arcee", "cwm", "granite", "phi3", "seed_oss", "gpt_neox"),
    *("gemma", "gemma2", "gemma3_text", "smollm3", "ministral", "ministral3", "nanochat", "olmo", *GATHERED, "exaone4"),
    *("helium", "ernie4_5", "glm", "glm4", "phi", "cohere", "cohere2"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe"),
)
"""Types whose plan was held against transformers' own code."""
WHOLE_EXPERTS: Final = ("qwen2_moe",)
"""Types whose plan leaves mixtures of experts, shared ones too, to every rank."""
NO_PLAN: Final = ("gpt2", "gpt_bigcode", "bloom", "opt", "nemotron", "stablelm")
"""Types for which transformers has no plan."""
TRANSPOSED: Final = ("gpt2",)
"""Types whose linear layers are `Conv1D`."""


@lru_cache(maxsize=256)
def part_of(architecture: Architecture, tp: int) -> Architecture:
    """What one of `tp` ranks holds. Raises `usage` where heads or widths can't be split evenly, or by no known plan."""
    if tp == 1:
        return architecture
    check(architecture, tp)
    stack = architecture.text
    made: dict[int, Layer] = {}
    layers = []
    for layer in stack.layers:
        if id(layer) not in made:
            made[id(layer)] = _layer(layer, architecture.model_type, tp)
        layers.append(made[id(layer)])
    megatron = architecture.model_type in NO_PLAN
    before = stack.before
    if megatron or not architecture.head:  # a tied head's table is split as the head
        before = (_rows_of_vocabulary(before[0], tp), *before[1:])
    local = replace(stack, layers=tuple(layers), before=before)
    head = tuple(_head(p, Split("columns" if megatron else "columns, gathered", tp)) for p in architecture.head)
    vocabulary = -(-architecture.vocab_size // tp) if megatron else architecture.vocab_size
    return replace(architecture, stacks=(local,), head=head, vocab_size=vocabulary)


def check(architecture: Architecture, tp: int) -> None:
    """Raises `usage` for a model that has no split, with the valid numbers for one whose heads can't be split so."""
    if architecture.model_type not in (*PLANNED, *NO_PLAN) or architecture.task != "causal":
        raise unknown(f"model type {architecture.model_type}")
    if len(architecture.stacks) != 1 or architecture.adapter or not architecture.generates:
        raise unknown(architecture.class_name)
    parts = [m for layer in architecture.text.layers for m in layer.mixers]
    feeds = [layer.feed_forward for layer in architecture.text.layers]
    known = all(isinstance(m, Attention) for m in parts)
    if not known or not all(isinstance(f, FeedForward | MixtureOfExperts) for f in feeds):
        raise unknown(architecture.class_name)
    heads = sorted({n for m in parts if isinstance(m, Attention) for n in (m.heads, m.kv_heads)})
    if any(n % tp for n in heads):
        shown = " and ".join(map(str, heads))
        raise HfvramError("usage", f"--tp {tp} does not divide {shown} heads: valid are {divisors(gcd(*heads))}")
    of_experts = architecture.model_type not in WHOLE_EXPERTS
    split = [f for f in feeds if isinstance(f, FeedForward) or (isinstance(f, MixtureOfExperts) and of_experts)]
    widths = {f.intermediate_size for f in split}
    widths |= {f.shared_intermediate_size for f in split if isinstance(f, MixtureOfExperts)} - {0}
    if any(n % tp for n in widths):
        shown = " and ".join(map(str, sorted(widths)))
        raise HfvramError("usage", f"--tp {tp} does not divide the width {shown}: valid are {divisors(gcd(*widths))}")
    if architecture.head and architecture.vocab_size % tp and architecture.model_type not in NO_PLAN:
        raise HfvramError("usage", f"--tp {tp} does not divide the vocabulary of {architecture.vocab_size:,} tokens")


def check_modes(architecture: Architecture, request: Request) -> None:
    """Raises `usage` for adapters and packed weights, which no formula splits, and for ways to train that the parts
    were not held against."""
    quant = architecture.quantization if request.quant == "auto" else request.quant
    if quant not in (None, "none"):
        raise HfvramError("usage", f"--tp can't split weights of --quant {quant}: valid is --quant none")
    adapts = request.mode == "lora" and not request.sp
    if request.mode not in ("train", "inference") and (not adapts or architecture.moe or request.fsdp):
        raise unknown(f"--mode {request.mode} of {architecture.class_name} with --sp, --fsdp or experts")
    if adapts and architecture.model_type in NO_PLAN:
        raise unknown(f"--mode lora of {architecture.class_name}, for which transformers has no plan,")
    if request.zero:
        raise unknown(f"--zero {request.zero}")
    mesh = mesh_of(request)
    if mesh.data * mesh.cp > 1 and request.mode != "inference" and not request.fsdp:
        raise HfvramError(
            "usage", "--tp with more --gpus or --cp trains with --fsdp: DistributedDataParallel can't hold it"
        )


def check_sequence(request: Request) -> None:
    """Raises `usage` for a sequence that the ranks can't have equal parts of (`--sp`)."""
    if request.tp == 1:
        raise HfvramError("usage", "--sp splits the sequence over the ranks of --tp: valid is --tp 2 and more")
    if (ctx := request.ctx or 0) % request.tp:
        raise HfvramError(
            "usage", f"--sp: --ctx {ctx} is not divisible by --tp {request.tp}: valid are {multiples(ctx, request.tp)}"
        )


def multiples(n: int, of: int) -> str:
    """Those around a number, in words.

    >>> multiples(2047, 2), multiples(3, 4)
    ('2046 and 2048', '4')
    """
    below = n - n % of
    return f"{below} and {below + of}" if below else str(of)


def divisors(n: int) -> str:
    """All of them, in words.

    >>> divisors(12)
    '1, 2, 3, 4, 6, 12'
    """
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return ", ".join(map(str, sorted({*small, *(n // d for d in small)})))


def unknown(what: str) -> HfvramError:
    """The error for what no formula splits."""
    return HfvramError("usage", f"--tp has no formula for {what} yet: --method simulate runs the model's own code")


def _layer(layer: Layer, model_type: str, tp: int) -> Layer:
    mixers = tuple(_mixer(m, model_type, tp) for m in layer.mixers)
    feed = layer.feed_forward
    if isinstance(feed, MixtureOfExperts):
        return replace(layer, mixers=mixers, feed_forward=_experts(feed, model_type, tp))
    assert isinstance(feed, FeedForward)
    fused = any(_module(p) in FUSED for p in feed.params)
    feed = replace(
        feed,
        intermediate_size=feed.intermediate_size if fused else feed.intermediate_size // tp,
        params=tuple(_param(p, fused, model_type in TRANSPOSED, tp) for p in feed.params),
    )
    return replace(layer, mixers=mixers, feed_forward=feed)


def _experts(part: MixtureOfExperts, model_type: str, tp: int) -> MixtureOfExperts:
    """A part of each expert's width, the shared ones' too; the router is whole. Sums over ranks are in place."""
    if model_type in WHOLE_EXPERTS:
        return part

    def own(param: Param) -> Param:
        if param.kind != "experts":
            return _param(param, False, False, tp) if "shared" in param.name else param
        return _cut(param, 1 if "gate_up" in param.name else 2, tp, Split("experts", tp))

    return replace(
        part,
        intermediate_size=part.intermediate_size // tp,
        shared_intermediate_size=part.shared_intermediate_size // tp,
        params=tuple(own(p) for p in part.params),
    )


def _mixer(part: Mixer, model_type: str, tp: int) -> Mixer:
    assert isinstance(part, Attention)
    gathered = model_type in GATHERED or any(_module(p) in FUSED for p in part.params)
    sizes: dict[str, Any] = {} if gathered else {"heads": part.heads // tp, "kv_heads": part.kv_heads // tp}
    return replace(part, params=tuple(_param(p, gathered, model_type in TRANSPOSED, tp) for p in part.params), **sizes)


def _module(param: Param) -> str:
    return param.name.split(".")[-2] if "." in param.name else ""


def _param(param: Param, gathered: bool, transposed: bool, tp: int) -> Param:
    """A parameter's part: rows of the weight for split outputs, columns for split inputs (of a `Conv1D` vice versa)."""
    outputs = int(transposed and len(param.shape) > 1)
    module, bias = _module(param), param.name.endswith(".bias")
    if param.kind == "norm" or not (module in COLUMNS or module in ROWS or module in FUSED):
        return param
    if module in ROWS:
        split = Split("rows of parts" if gathered else "rows", tp)
        return replace(param, split=split) if bias else _cut(param, len(param.shape) - 1 - outputs, tp, split)
    return _cut(param, outputs, tp, Split("columns, gathered" if gathered else "columns", tp))


def _cut(param: Param, dim: int, tp: int, split: Split) -> Param:
    shape = list(param.shape)
    shape[dim] //= tp
    return replace(param, shape=tuple(shape), split=split)


def _rows_of_vocabulary(param: Param, tp: int) -> Param:
    return replace(param, shape=(-(-param.shape[0] // tp), *param.shape[1:]), split=Split("vocabulary", tp))


def _head(param: Param, split: Split) -> Param:
    return replace(param, shape=(-(-param.shape[0] // split.ranks), *param.shape[1:]), split=split)
