"""What a layer is made of. Each kind of mixer and of feed-forward is one small frozen dataclass: sizes and parameters.

A new kind of layer is a dataclass here, a line where its family is read (`families/`), and its memory in
`memory/`. Sizes are in elements, tokens or heads; bytes belong to `memory/`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal, NamedTuple

ParamKind = Literal[
    "linear", "linear_subclass", "experts", "embedding", "head", "norm", "bias", "conv", "other", "buffer", "adapter"
]


class Split(NamedTuple):
    """A part of a layer that `ranks` share: of a product's outputs, which stay parts or are gathered; of its inputs,
    which are parts already or are cut; of each expert's width; or of an embedding's tokens."""

    how: Literal["columns", "columns, gathered", "rows", "rows of parts", "experts", "vocabulary"]
    ranks: int


Activation = str  # transformers' ACT2FN names: "silu", "gelu", "gelu_new", "relu2", …


@dataclass(frozen=True, slots=True)
class Param:
    """One tensor of a built model: transformers' name for it, its shape in elements, and what it is.

    `kind` decides what happens to it: only `linear` (exactly `nn.Linear`, or GPT-2's `Conv1D`) is quantized by
    bitsandbytes; a `linear_subclass` (Falcon's, some routers) is a target of LoRA alone; `buffer` is not counted as a
    parameter; `experts` are the fused tensors of a mixture of experts. `dtype` is None for the model's own.
    """

    name: str
    shape: tuple[int, ...]
    kind: ParamKind = "linear"
    dtype: str | None = None
    split: Split | None = None
    """Where this is one tensor parallel rank's part of it."""

    @property
    def numel(self) -> int:
        return prod(self.shape)


def linear(name: str, inputs: int, outputs: int, bias: bool = False, kind: ParamKind = "linear") -> tuple[Param, ...]:
    """`nn.Linear`: a weight (outputs, inputs) and, with `bias`, a bias (outputs)."""
    weight = Param(f"{name}.weight", (outputs, inputs), kind)
    return (weight, Param(f"{name}.bias", (outputs,), "bias")) if bias else (weight,)


def norm(name: str, size: int, bias: bool = False) -> tuple[Param, ...]:
    """RMSNorm (weight alone) or LayerNorm (weight and bias)."""
    weight = Param(f"{name}.weight", (size,), "norm")
    return (weight, Param(f"{name}.bias", (size,), "norm")) if bias else (weight,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """Rotary position embedding over the first `dim` of each head: `half` rotates halves (Llama), `interleaved`
    rotates neighbours (GPT-J), `complex` multiplies complex numbers (DeepSeek, Llama-4)."""

    dim: int
    style: Literal["half", "interleaved", "complex"] = "half"
    sliced: bool = False
    """The layer slices queries and keys itself: they stay beside the rotated parts and the whole (Phi, GPT-J)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Softmax attention with a cache of keys and values: full, sliding-window, chunked or cross attention."""

    kind: Literal["full_attention", "sliding_attention", "chunked_attention", "cross_attention"] = "full_attention"
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    """Head size of the values; differs from `head_dim` in a few models."""
    window: int | None = None
    """Tokens that a query sees, itself included (sliding), or the chunk's length (chunked)."""
    causal: bool = True
    rotary: Rotary | None = None
    qk_norm: Literal["head", "full"] | None = None
    """Normalization of queries and keys, over each head or over all heads together."""
    fused_qkv: bool = False
    """One projection for queries, keys and values, split after it."""
    always_masked: bool = False
    """A mask is made even where a plain causal one would do (Falcon)."""
    output_apart: bool = False
    """The output's projection is another module's: queries, keys and values are gone before it (BERT)."""
    implementations: tuple[str, ...] = ("sdpa", "flash_attention_2", "eager")
    """What the model's code can run, the first being what it falls back to."""
    position_bias: bool = False
    """A bias of shape (heads, s, s) is added to the scores: ALiBi, T5's buckets."""
    relative_bias: Literal["first", "later", "own"] | None = None
    """T5's learned bias for every pair of positions: computed in the first layer and kept for the later ones, or each
    layer's own (UMT5)."""
    scores: Literal["fp32 softmax", "own dtype", "fp32", "fp32 bias"] = "fp32 softmax"
    """How eager attention computes: a softmax in fp32 (Llama) or in the model's dtype (BERT), queries and keys cast
    before the product (GPT-J), or a bias in fp32 (MPT)."""
    softcap: bool = False
    output_gate: bool = False
    """The queries' projection is doubled: its second half gates the output (Qwen3-Next)."""
    sinks: bool = False
    clips: bool = False
    """What is projected is clipped (`clip_qkv`)."""
    groups: Literal["gqa", "broadcast", "expanded"] = "gqa"
    """How grouped keys and values reach the kernel: as groups, which it may know; broadcast, which only the math path
    takes (Falcon-7B); or expanded to every head before they are cached (Falcon-40B)."""
    named_scores: int = 0
    """Squares of scores that eager attention's code holds to its end, beside the weights: the masked ones (MPT), and
    those before the mask (BLOOM)."""
    flattened: bool = False
    """Written for products of three dimensions, for which the queries of several sequences are copied, and with the
    residual's sum inside (BLOOM)."""
    cached: bool = True
    """False for encoders, and for layers that read another layer's cache (`num_kv_shared_layers`)."""
    params: tuple[Param, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values come from one vector a token."""

    kind: ClassVar[str] = "latent_attention"
    hidden_size: int
    heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rotary_style: Literal["half", "interleaved", "complex"] = "complex"
    latent_cache: bool = True
    """The cache holds the latent vector and the rotary key; else every head's expanded keys and values (GLM-5)."""
    index_heads: int = 0
    index_head_dim: int = 0
    """Sizes of the sparse attention's indexer (DeepSeek-V3.2), 0 where there is none."""
    index_top_k: int = 0
    """Tokens that a query keeps by the indexer's scores."""
    implementations: tuple[str, ...] = ("sdpa", "flash_attention_2", "eager")
    params: tuple[Param, ...]

    @property
    def head_dim(self) -> int:
        """Of queries and expanded keys."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedAttention:
    """Attention of DeepSeek-V4: one shared vector a token is key and value, in a window; older tokens are compressed,
    `rate` of them into one entry, all attended to (heavily compressed) or the indexer's choice (compressed sparse)."""

    kind: Literal["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    hidden_size: int
    heads: int
    head_dim: int
    rotary_dim: int
    q_lora_rank: int
    output_groups: int
    output_lora_rank: int
    window: int
    rate: int = 0
    """0 where nothing is compressed."""
    index_heads: int = 0
    index_head_dim: int = 0
    index_top_k: int = 0
    implementations: tuple[str, ...] = ("eager",)
    params: tuple[Param, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba1:
    """Selective state space of Mamba (arXiv 2312.00752): state d_inner × d_state, convolution d_inner × d_conv."""

    kind: ClassVar[str] = "mamba"
    hidden_size: int
    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int
    inner_norms: bool = False
    """Δ, B and C are normalized before the scan (Jamba, Falcon-Mamba)."""
    heads: int = 1
    """Scans that run one after the other, each over a part of d_inner (Zamba)."""
    mask_of_ones: bool = False
    """generate()'s mask is multiplied in even where no token is padding (Mamba, Falcon-Mamba)."""
    params: tuple[Param, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2:
    """State space duality of Mamba-2 (arXiv 2405.21060): `heads` × `head_dim` × `d_state`."""

    kind: ClassVar[str] = "mamba2"
    hidden_size: int
    heads: int
    head_dim: int
    d_state: int
    groups: int
    d_conv: int
    chunk_size: int
    gated_norm: bool = True
    """A gated RMSNorm follows the scan (absent in Falcon-H1 by default)."""
    multipliers: bool = False
    """Input and projection are scaled, each by a copy (Falcon-H1)."""
    params: tuple[Param, ...]

    @property
    def d_inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        return self.d_inner + 2 * self.groups * self.d_state


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDeltaNet:
    """Gated delta rule (arXiv 2412.06464), as in Qwen3-Next: state value_heads × key_dim × value_dim."""

    kind: ClassVar[str] = "gated_delta_net"
    hidden_size: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    d_conv: int
    fused_projection: bool = True
    """One projection for queries, keys, values and gate, sorted by copies after it (Qwen3-Next); else one for the first
    three (Qwen3.5)."""
    params: tuple[Param, ...]

    @property
    def conv_dim(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class RGLRU:
    """Real-gated linear recurrent unit of Griffin (arXiv 2402.19427): a state of `width`, a short convolution."""

    kind: ClassVar[str] = "rg_lru"
    hidden_size: int
    width: int
    heads: int
    d_conv: int
    params: tuple[Param, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LightningAttention:
    """Linear attention with decay (MiniMax-01, arXiv 2501.08313): state heads × head_dim × head_dim."""

    kind: ClassVar[str] = "linear_attention"
    hidden_size: int
    heads: int
    head_dim: int
    block_size: int = 256
    params: tuple[Param, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortConv:
    """Gated short convolution of LFM2: a state of hidden_size × d_conv."""

    kind: ClassVar[str] = "short_conv"
    hidden_size: int
    d_conv: int
    params: tuple[Param, ...]


Recurrent = Mamba1 | Mamba2 | GatedDeltaNet | RGLRU | LightningAttention | ShortConv
Mixer = Attention | LatentAttention | CompressedAttention | Recurrent


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    """Dense feed-forward: down(act(gate(x)) · up(x)) where gated, else down(act(up(x)))."""

    kind: ClassVar[str] = "dense"
    hidden_size: int
    intermediate_size: int
    gated: bool
    activation: Activation
    fused_gate_up: bool = False
    """Gate and up are one projection, split after it (Phi-3)."""
    inline: bool = False
    """Written into the layer's own code: its input is let go after the first product (OPT)."""
    adds_residual: bool = False
    """The residual is added in its own code, its widest tensor still there (BLOOM, MPT)."""
    fp32_in_fp16: bool = False
    """In fp16 its last product is in fp32, its input cast for it, and so is the residual from then on (T5)."""
    keeps_parts: bool = False
    """Its code names the activated gate and the other half to its end (T5)."""
    params: tuple[Param, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureOfExperts:
    """Routed experts, `top_k` of `experts` for each token, and shared ones that every token passes."""

    kind: ClassVar[str] = "moe"
    hidden_size: int
    experts: int
    top_k: int
    intermediate_size: int
    """Width of one routed expert."""
    shared_intermediate_size: int = 0
    """Width of all shared experts together, 0 where there are none."""
    gated: bool = True
    activation: Activation = "silu"
    latent_size: int = 0
    """Width in which the routed experts work, 0 where it is `hidden_size` (Nemotron-H)."""
    router_fp32: bool = False
    """The router's matmul is in fp32, its input cast for it (DeepSeek)."""
    fused_gate_up: bool = False
    """The shared expert's gate and up are one projection."""
    routing_fp32: bool = True
    """The chosen experts' weights stay in fp32, and so do the weighted outputs; else they are in the model's dtype."""
    expert_bias: bool = False
    every_token: bool = False
    """Each expert computes every token, weighted by zero where it isn't chosen (Llama 4)."""
    fused: bool = True
    """The experts of a layer are two 3-D tensors, run by a grouped matmul; else a list of modules."""
    normalized: bool = False
    """The chosen experts' weights are divided by their sum."""
    auxiliary: bool = False
    """While training, a loss that asks for balance is made of the router's logits (`output_router_logits`)."""
    choice_bias: bool = False
    """Experts are chosen after a bias was added that needs no gradient (LFM2)."""
    group_limited: bool = False
    """Experts are chosen of the best groups only."""
    groups: int = 1
    groups_chosen: int = 1
    jitter: bool = False
    """While training, the input is multiplied by noise."""
    params: tuple[Param, ...]
    """Router, shared experts and the fused tensors of kind `experts`, whose first dimension is the experts'."""


@dataclass(frozen=True, slots=True)
class Dropout:
    """Shares that are dropped while training: of the embeddings, of attention's weights, of what joins the residual."""

    embedding: float = 0.0
    attention: float = 0.0
    residual: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One block of a stack, in the order in which data passes it."""

    mixers: tuple[Mixer, ...] = ()
    """One as a rule; self and cross attention in a decoder with an encoder; attention beside Mamba (Falcon-H1)."""
    feed_forward: FeedForward | MixtureOfExperts | None = None
    norm: Literal["rms", "layer"] = "rms"
    norm_position: Literal["pre", "post", "both"] = "pre"
    parallel: bool = False
    """Attention and feed-forward read the same input and are added together (GPT-J, Phi, Falcon)."""
    keeps: Literal["mixed", "mixed and normed"] | None = None
    """What the layer's code holds through the feed-forward: the mixer's output (GPT-2), and its input (StableLM)."""
    returns_weights: bool = False
    """The model holds what a layer returned, eager attention's weights too, until the next one has returned (GPT-J)."""
    norms_first: bool = False
    """A parallel layer's own norm for each part, both before the parts run (Falcon-40B)."""
    streams: int = 1
    """Copies of the residual that are kept and mixed (DeepSeek-V4's hyper-connections)."""
    residual_fp32: bool = False
    """The residual stream is fp32 whatever the weights are (`residual_in_fp32` of Mamba and Mamba-2)."""
    dropout: Dropout = Dropout()
    """Of the model that it belongs to."""
    params: tuple[Param, ...] = ()
    """Norms and whatever else belongs to no part of it."""

    def all_params(self) -> Iterator[Param]:
        for mixer in self.mixers:
            yield from mixer.params
        if self.feed_forward:
            yield from self.feed_forward.params
        yield from self.params
