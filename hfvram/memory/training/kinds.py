"""Which code a model type runs where its architecture does not tell: its norms, its layers, what is done around them.

Only types that were held against their own code, event by event, stand here; any other has no formula yet.
"""

from dataclasses import dataclass, replace
from typing import Final, Literal

from hfvram.memory.training.blocks import NormCode, NormKind, unknown
from hfvram.model.architecture import Architecture

Rotation = Literal[
    "whole",
    "back",
    "joined",
    "part",
    "part, both",
    "fp32",
    "halves",
    "neighbours",
    "neighbours, part",
    "neighbours, cast",
    "neighbours, fp32",
]
"""Rotary positions of halves: over whole heads (forward or back), over a part joined with the rest (each at once, one
after the other, or both at the end), in fp32 and cast back, or each half by itself; and of neighbours, so as well."""
NormOrder = Literal[
    "last", "first", "between", "after each", "middle", "after the feed-forward", "before the feed-forward"
]
"""Where a layer's norms stand among its parameters: after its parts, before them, one before or after each, or
all before its feed-forward; or after or before a feed-forward that is before the mixer."""
Embedding = Literal[
    "tokens",
    "positions",
    "late positions",
    "normed",
    "late norm",
    "counted ones",
    "summed",
    "counted positions",
]
"""Learned positions are added, before the mask is made or after it; or the embeddings are normed, so as well; or
positions are counted in a mask of ones (OPT). Of encoders: words, token types and positions, which RoBERTa counts
without padding."""
ENCODED: Final = ("summed", "counted positions")
"""Embeddings of encoders."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How a type's code differs from Llama's."""

    norm: NormCode = "weight last"
    layer: Literal[
        "residual",
        "held output",
        "two branches",
        "with alibi",
        "one norm",
        "flattened",
        "state space",
        "norm after",
        "plain norm after",
        "relative",
        "with sinks",
    ] = "residual"
    sums: Literal["branches first", "residual first"] = "residual first"
    """What a layer of two branches over one norm adds up first."""
    embedding: Embedding = "tokens"
    masks: Literal["used", "both", "always both"] = "used"
    """Masks are made for the layers that there are, or for full attention and a window in any case."""
    interleaved: bool = False
    """Queries, keys and values of a head lie side by side."""
    counts: bool = True
    """Positions are counted, and looked through for packed sequences."""
    masks_first: bool = False
    """Masks are made before positions, through which nothing looks (Gemma 3 with its tower)."""
    caches: bool = False
    """Without checkpointing keys and values are cached while training, too: `use_cache` is the text configuration's."""
    layers_count: bool = True
    """Layers are given the positions, through which flash attention looks again."""
    shifts: bool = True
    """What is counted is shifted by the cache's length (Bamba: not)."""
    packs: bool = True
    """The mask is made with those positions, and layers are given them (Granite 4: neither)."""
    masks_know: bool = True
    """The mask is (gpt-oss: not, though layers are given them)."""
    transposed: bool = False
    """Linear layers are `Conv1D`."""
    own_softmax: bool = False
    """Eager attention's softmax is in the scores' dtype."""
    copies_out: bool = True
    """So is its output copied into rows."""
    norms: NormOrder = "last"
    final_first: bool = False
    """The last norm's parameters stand before those of the layers."""
    scaled: Literal["no", "first", "after masks"] = "no"
    """When the embeddings are multiplied by a number."""
    scales_itself: bool = False
    """The embedding's own module does that."""
    multiplied: bool = False
    """So are what joins the residual, and the logits."""
    scaled_logits: bool = False
    wide_logits: bool = False
    """The model hands out logits in fp32, of hidden states cast to the head's dtype."""
    rotates: Rotation = "whole"
    angles: Literal["once", "by layer type", "in three", "in three, woven"] = "once"
    """Of positions; for each type of layer; or of a place in time, height and width, put together piece by piece
    (Qwen2-VL), or in place (Qwen3-VL)."""
    far: bool = False
    """Queries of far positions are scaled."""
    projects: Literal["heads", "first"] = "heads"
    """Each projection is seen as heads at once, or all of them after the last."""
    qk: Literal["as projected", "all projected", "as heads", "rotated"] = "as projected"
    """When queries and keys are normed: each as it is projected, after all three are (their heads moved first, or
    not), or once they are rotated."""
    qk_norm: NormKind = "rms"
    qk_bias: bool = False
    """That norm has a bias and is one for all heads; else a LayerNorm is one for each."""
    drops_inside: bool = False
    """The attention itself drops what it returns."""
    router: (
        Literal[
            "probabilities",
            "cast back",
            "flat, cast back",
            "chosen first",
            "chosen alone",
            "greedy",
            "balanced",
            "sigmoids",
        ]
        | None
    ) = None
    """How experts are chosen: `routing.ROUTERS`."""
    shared: Literal["first", "weighted", "last", "last, flat first"] = "first"
    """Shared experts run before the routed ones, weighted by a gate of their own (Qwen2) or not,
    or after them (DeepSeek), also over tokens flattened for the routed ones (Granite 4)."""
    balance: bool = False
    """A loss of the routers' logits is there to be asked for."""
    grouped_norm: bool = False
    """Without kernels Mamba-2's gated norm is over each group alone."""
    head_first: bool = False
    """The head is built before the encoder."""
    head_gelu: bool = False
    """A masked language model's head has GELU, whatever its layers have."""


_LLAMA = Kind()
_BERT = Kind(layer="norm after", embedding="summed", norms="after each", own_softmax=True)
_ROBERTA = replace(_BERT, embedding="counted positions", head_gelu=True)
_GEMMA = Kind(norm="plus one", scaled="first", scales_itself=True)

_MAMBA = Kind(norms="first", layer="state space", counts=False, wide_logits=True)

_QWEN35 = Kind(norm="plus one", rotates="part", router="cast back", shared="weighted", angles="in three, woven")

KINDS: Final[dict[str, Kind]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "starcoder2": _LLAMA,
    "qwen2_vl_text": Kind(angles="in three", projects="first", layers_count=False),
    "qwen2_5_vl_text": Kind(angles="in three", projects="first", layers_count=False),
    "qwen3_vl_text": Kind(angles="in three, woven"),
    "arcee": _LLAMA,
    "cwm": _LLAMA,
    "granite": Kind(scaled="first", multiplied=True),
    "phi3": Kind(rotates="joined"),
    "olmo2": Kind(norm="weight in fp32", rotates="fp32"),
    "seed_oss": Kind(drops_inside=True),
    "gpt2": Kind(
        norms="between", layer="held output", embedding="positions", transposed=True, own_softmax=True, copies_out=False
    ),
    "gpt_bigcode": Kind(
        norms="between", layer="held output", embedding="late positions", interleaved=True, layers_count=False
    ),
    "gpt_neox": Kind(norms="first", layer="two branches"),
    "bloom": Kind(norms="between", layer="with alibi", embedding="normed", counts=False),
    "mt5": Kind(layer="relative", norms="after each", own_softmax=True),
    "t5": Kind(layer="relative", norms="after each", own_softmax=True),
    "bert": _BERT,
    "distilbert": replace(_BERT, layer="plain norm after"),
    "electra": replace(_BERT, head_gelu=True),
    "roberta": _ROBERTA,
    "xlm-roberta": replace(_ROBERTA, head_first=True),
    "camembert": replace(_ROBERTA, head_first=True),
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3_text": Kind(
        norm="plus one", scaled="first", scales_itself=True, masks="both", angles="by layer type", qk="all projected"
    ),
    "mamba": _MAMBA,
    "mamba2": _MAMBA,
    "falcon_mamba": _MAMBA,
    "jamba": Kind(router="flat, cast back"),
    "nemotron_h": Kind(norms="first", layer="state space", wide_logits=True, grouped_norm=True),
    "bamba": Kind(norms="after the feed-forward", rotates="part", shifts=False),
    "granitemoehybrid": Kind(
        norms="before the feed-forward",
        packs=False,
        scaled="first",
        multiplied=True,
        router="chosen first",
        shared="last, flat first",
    ),
    "qwen3_vl_moe_text": Kind(angles="in three, woven", router="cast back"),
    "qwen3_next": Kind(norm="plus one", rotates="part", router="cast back", shared="weighted", balance=True),
    "qwen3_5_text": _QWEN35,
    "qwen3_5_moe_text": _QWEN35,
    "lfm2": _LLAMA,
    "lfm2_moe": Kind(router="sigmoids"),
    "smollm3": _LLAMA,
    "opt": Kind(layer="flattened", embedding="counted ones", counts=False, norms="after each", final_first=True),
    "ministral": Kind(masks="both"),
    "ministral3": Kind(far=True, layers_count=False),
    "hunyuan_v1_dense": Kind(qk="rotated"),
    "nanochat": Kind(norm="no weight", rotates="back", qk="rotated", embedding="late norm"),
    "olmo": Kind(norm="wide", rotates="fp32", projects="first"),
    "olmo3": Kind(norm="weight in fp32", rotates="fp32", masks="both", angles="by layer type"),
    "exaone4": Kind(qk="all projected"),
    "helium": Kind(norm="weight cast", rotates="neighbours"),
    "ernie4_5": Kind(rotates="neighbours, cast"),
    "glm": Kind(rotates="neighbours, part"),
    "glm4": Kind(rotates="neighbours, part"),
    "nemotron": Kind(norm="plus one", rotates="part, both"),
    "phi": Kind(layer="one norm", sums="branches first", qk="all projected", qk_norm="layer", qk_bias=True),
    "stablelm": Kind(layer="one norm", projects="first", qk="all projected", qk_norm="layer"),
    "cohere": Kind(
        norm="weight cast",
        layer="one norm",
        rotates="neighbours, fp32",
        qk="as heads",
        qk_norm="layer",
        scaled_logits=True,
    ),
    "cohere2": Kind(norm="weight cast", layer="one norm", masks="both", rotates="neighbours, fp32", scaled_logits=True),
    "mixtral": Kind(router="probabilities", balance=True),
    "olmoe": Kind(router="cast back", balance=True),
    "qwen2_moe": Kind(router="cast back", shared="weighted", masks="always both", balance=True),
    "qwen3_moe": Kind(router="cast back", balance=True),
    "deepseek_v2": Kind(router="greedy", shared="last"),
    "deepseek_v3": Kind(router="balanced", shared="last"),
    "glm4_moe_lite": Kind(router="balanced", shared="last"),
    "glm4_moe": Kind(router="balanced", shared="last", rotates="part", qk="all projected"),
    "gpt_oss": Kind(
        norm="weight in fp32",
        layer="with sinks",
        rotates="halves",
        masks="both",
        masks_know=False,
        router="chosen alone",
    ),
    "granitemoe": Kind(scaled="after masks", multiplied=True, norms="middle", router="chosen first"),
}


WITH_TOWERS: Final = (
    *("gemma3", "llava", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
    *("qwen3_5", "qwen3_5_moe", "qwen3_vl_moe"),
)
"""Types whose nested language model trains as it does alone; text alone is trained on."""


def kind_of(architecture: Architecture) -> Kind:
    """Raises `usage` for a type that was not held against its code."""
    if architecture.text_type is not None and architecture.model_type in WITH_TOWERS:
        if architecture.text_type not in KINDS:
            raise unknown(f"text model type {architecture.text_type}")
        return replace(KINDS[architecture.text_type], caches=True, masks_first=architecture.model_type == "gemma3")
    if architecture.model_type not in KINDS:
        raise unknown(f"model type {architecture.model_type}")
    return KINDS[architecture.model_type]
