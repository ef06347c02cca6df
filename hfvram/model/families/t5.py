"""T5, mT5 and UMT5: an encoder and a decoder whose attention has a learned bias for relative positions.

Source: transformers 5.17, models/{t5, mt5, umt5}/modeling_*.py and configuration_*.py.
"""

from dataclasses import replace
from typing import Literal

from hfvram.errors import HfvramError
from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families.blocks import attention, embedding, gated_mlp, mlp
from hfvram.model.families.common import class_and_end, dropout_of, dtype_of, max_positions, num_labels
from hfvram.model.families.defaults import known
from hfvram.model.layers import Attention, FeedForward, Layer, Param, linear, norm

RelativeBias = Literal["first", "later", "own"]
FAMILIES = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}
HEADS = (
    "ForConditionalGeneration",
    "Model",
    "EncoderModel",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)


def read(config: Config, class_name: str | None) -> Architecture:
    """Embedding, encoder's and decoder's, and head are one tensor, whatever the configuration says."""
    config = known(config)
    class_name, kind = class_and_end(config, class_name, FAMILIES[config.model_type], HEADS)
    hidden, vocab = config.size("d_model", "hidden_size"), config.size("vocab_size")
    prefix = "transformer." if kind in ("ForSequenceClassification", "ForTokenClassification") else ""
    depth = config.layers("num_layers", "num_hidden_layers")
    generates = kind not in ("EncoderModel", "ForTokenClassification")
    shared = embedding(f"{prefix}shared", vocab, hidden)
    encoder = stack(config, "encoder", f"{prefix}encoder", hidden, depth, shared)
    decoder_depth = config.layers("num_decoder_layers", default=depth)
    decoder = stack(config, "decoder", f"{prefix}decoder", hidden, decoder_depth, ())
    return Architecture(
        model_type=config.model_type,
        class_name=class_name,
        task="seq2seq" if generates else "encoder",
        stacks=(encoder, decoder) if generates else (encoder,),
        main="decoder" if generates else "encoder",
        vocab_size=vocab,
        hidden_size=hidden,
        max_positions=max_positions(config),
        dtype=dtype_of(config),
        head=head(config, kind, hidden),
        tied_head=kind == "ForConditionalGeneration",
        logits_of_all_tokens=True,
        scales_output=config.model_type == "t5" and config.values.get("tie_word_embeddings") is not False,
        fp32_in_fp16=("wo",),
    )


def head(config: Config, kind: str, hidden: int) -> tuple[Param, ...]:
    labels = num_labels(config)
    if kind == "ForSequenceClassification":
        name = "classification_head"
        return linear(f"{name}.dense", hidden, hidden, True) + linear(f"{name}.out_proj", hidden, labels, True, "head")
    if kind == "ForTokenClassification":
        return linear("classifier", hidden, labels, True, "head")
    return linear("qa_outputs", hidden, labels, True, "head") if kind == "ForQuestionAnswering" else ()


def stack(config: Config, name: str, path: str, hidden: int, depth: int, before: tuple[Param, ...]) -> Stack:
    """Encoder or decoder. T5 learns a position bias in the first layer and uses it in all; UMT5 learns one in each."""
    own = config.model_type == "umt5"
    first = layer(config, name, hidden, "own" if own else "first")
    rest = first if own else layer(config, name, hidden, "later")
    return Stack(
        name=name,
        prefix=f"{path}.block",
        hidden_size=hidden,
        before=before,
        layers=tuple(rest if i else first for i in range(depth)),
        after=norm(f"{path}.final_layer_norm", hidden),
    )


def layer(config: Config, stack: str, hidden: int, bias: RelativeBias) -> Layer:
    decodes = stack == "decoder"
    cross = (scores(config, "layer.1.EncDecAttention", hidden, "cross_attention"),) if decodes else ()
    last = 2 if decodes else 1
    norms = tuple(p for i in range(last + 1) for p in norm(f"layer.{i}.layer_norm", hidden))
    return Layer(
        mixers=(self_attention(config, hidden, decodes, bias), *cross),
        feed_forward=replace(
            feed_forward(config, f"layer.{last}.DenseReluDense", hidden), fp32_in_fp16=True, keeps_parts=True
        ),
        params=norms,
        dropout=dropout_of(config),
    )


def self_attention(config: Config, hidden: int, decodes: bool, kind: RelativeBias) -> Attention:
    name, heads = "layer.0.SelfAttention", config.size("num_heads", "num_attention_heads")
    buckets = config.size("relative_attention_num_buckets")
    bias = embedding(f"{name}.relative_attention_bias", buckets, heads) if kind != "later" else ()
    return replace(scores(config, name, hidden, "full_attention", decodes, decodes, bias), relative_bias=kind)


def scores(
    config: Config,
    name: str,
    hidden: int,
    kind: str,
    causal: bool = False,
    cached: bool = True,
    extra: tuple[Param, ...] = (),
) -> Attention:
    """Attention with a position bias: learned for the sequence's own positions, zeros in cross attention."""
    return attention(
        name,
        hidden,
        config.size("num_heads", "num_attention_heads"),
        config.size("d_kv", "head_dim"),
        projections=("q", "k", "v", "o"),
        kind=kind,
        causal=causal,
        cached=cached,
        position_bias=True,
        scores="own dtype",
        implementations=("sdpa", "eager"),
        extra=extra,
    )


def feed_forward(config: Config, name: str, hidden: int) -> FeedForward:
    """`feed_forward_proj` is an activation, or `gated-` and one; `gated-gelu` means `gelu_new`."""
    width, words = config.size("d_ff"), config.text("feed_forward_proj", default="relu").split("-")
    if len(words) > 2 or (len(words) == 2 and words[0] != "gated"):
        raise HfvramError("bad_config", "config.json: feed_forward_proj is neither an activation nor gated-ACTIVATION")
    if len(words) == 1:
        return mlp(f"{name}.wi", f"{name}.wo", hidden, width, words[0], bias=False)
    activation = "gelu_new" if words[1] == "gelu" else words[1]
    return gated_mlp(name, hidden, width, activation, projections=("wi_0", "wi_1", "wo"))
