"""What encoders share: which class is built, their layers, what stands on top, and the model around it all."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal, get_args

from hfvram.errors import HfvramError, printable
from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families.blocks import attention
from hfvram.model.families.common import dropout_of, dtype_of, max_positions, num_labels
from hfvram.model.layers import Attention, FeedForward, Layer, Param, linear, norm

Head = Literal["bare", "masked", "causal", "sequence", "tokens", "answers", "choice", "pretraining", "next"]

HEADS: dict[str, Head] = {
    "Model": "bare",
    "ForMaskedLM": "masked",
    "LMHeadModel": "causal",
    "ForCausalLM": "causal",
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "tokens",
    "ForQuestionAnswering": "answers",
    "ForMultipleChoice": "choice",
    "ForPreTraining": "pretraining",
    "ForNextSentencePrediction": "next",
}
"""End of a class's name → its head."""


def class_and_head(
    config: Config, asked: str | None, family: str, known: Iterable[Head] = get_args(Head)
) -> tuple[str, Head]:
    """The class to build, and its head: the one asked for, else the first of `architectures` that is the family's, else
    the bare model. Raises `unknown_architecture` for a class that the family's reader doesn't know."""
    known = tuple(known)
    for name in (asked,) if asked else config.strings("architectures") or ():
        head = HEADS.get(name.removeprefix(family)) if name.startswith(family) else None
        if head in known:
            return name, head
        if head or asked:
            break
    else:
        return f"{family}Model", "bare"
    raise HfvramError("unknown_architecture", f"the class {printable(name, 60)!r} of {config.model_type} is not known")


ENCODER: dict[str, Any] = {"causal": False, "cached": False}
"""Style of attention that sees everything and keeps nothing."""


def self_attention(
    config: Config, name: str, hidden: int, projections: tuple[str, str, str, str], **style: Any
) -> Attention:
    """Attention with biases whose heads share the width; an encoder's unless `style` says otherwise."""
    heads = config.size("num_attention_heads")
    head_dim = config.divided("hidden_size", hidden, heads)
    return attention(name, hidden, heads, head_dim, projections=projections, **({"bias": True} | ENCODER | style))


def encoder_layer(
    attention: Attention,
    feed: FeedForward,
    first: str,
    second: str,
    bias: bool = True,
    position: Literal["pre", "post"] = "pre",
    extra: tuple[Param, ...] = (),
) -> Layer:
    """A layer with a norm before or after each part: LayerNorm, or RMSNorm without `bias`. `extra` follows them."""
    hidden = attention.hidden_size
    return Layer(
        mixers=(attention,),
        feed_forward=feed,
        norm="layer" if bias else "rms",
        norm_position=position,
        params=norm(first, hidden, bias) + norm(second, hidden, bias) + extra,
    )


def label_head(config: Config, head: Head, hidden: int, name: str = "classifier") -> tuple[Param, ...]:
    """One linear layer over labels: of tokens, of sequences, of answers' starts and ends, or of one choice."""
    if head == "answers":
        name = "qa_outputs"
    return linear(name, hidden, 1 if head == "choice" else num_labels(config), bias=True, kind="head")


def dense_head(config: Config, hidden: int) -> tuple[Param, ...]:
    """RoBERTa's classifier: a dense layer, then one over the labels."""
    last = linear("classifier.out_proj", hidden, num_labels(config), bias=True, kind="head")
    return linear("classifier.dense", hidden, hidden, bias=True) + last


def masked_head(
    name: str, hidden: int, width: int, vocab: int, tied: bool, dense: str = "dense", normed: str = "LayerNorm"
) -> tuple[Param, ...]:
    """A masked language model's head: a dense layer to `width`, a norm, and a decoder with a bias.

    The decoder's weight is the embedding where `tied`, and its bias then the head's.
    """
    bias = (Param(f"{name}.bias", (vocab,), "bias"),)
    decoder = () if tied else linear(f"{name}.decoder", width, vocab, bias=True, kind="head")
    return (
        bias
        + linear(f"{name}.{dense}", hidden, width, bias=True)
        + norm(f"{name}.{normed}", width, bias=True)
        + decoder
    )


def encoder(config: Config, class_name: str, stack: Stack, head: tuple[Param, ...] = (), **facts: Any) -> Architecture:
    """The model of `class_name` whose one stack this is; `facts` are more of `Architecture`, and win."""
    values: dict[str, Any] = {
        "task": "encoder",
        "max_positions": max_positions(config),
        "final_norm": None,
        "vocab_size": config.size("vocab_size", default=1),
    }
    dropout = dropout_of(config)
    dropping = {id(x): replace(x, dropout=dropout) for x in stack.layers}
    return Architecture(
        model_type=config.model_type,
        class_name=class_name,
        stacks=(replace(stack, layers=tuple(dropping[id(x)] for x in stack.layers)),),
        main=stack.name,
        hidden_size=stack.hidden_size,
        dtype=dtype_of(config),
        head=head,
        **(values | facts),
    )
