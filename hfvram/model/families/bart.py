"""BART and those built like it: mBART, Marian, Pegasus, M2M-100.

Source: transformers 5.17, models/{bart, mbart, marian, pegasus, m2m_100}/modeling_*.py and configuration_*.py.
"""

from dataclasses import dataclass

from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families.blocks import attention, embedding, mlp
from hfvram.model.families.common import class_and_end, dtype_of, max_positions, num_labels
from hfvram.model.families.defaults import known
from hfvram.model.layers import Attention, Layer, Param, linear, norm


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How a family differs from BART."""

    name: str
    pre_norm: bool = False
    """Norms stand before each part, and one after the last layer."""
    embedding_norm: bool = False
    learned_positions: bool = False
    """Position embeddings with two more rows than positions; else sinusoids of as many rows, M2M-100's in buffers."""
    generator: str = "ForConditionalGeneration"
    logits_bias: bool = True


STYLES = {
    "bart": Style(name="Bart", embedding_norm=True, learned_positions=True),
    "mbart": Style(name="MBart", embedding_norm=True, learned_positions=True, pre_norm=True),
    "marian": Style(name="Marian", generator="MTModel"),
    "pegasus": Style(name="Pegasus", pre_norm=True),
    "m2m_100": Style(name="M2M100", pre_norm=True, logits_bias=False),
}


def read(config: Config, class_name: str | None) -> Architecture:
    config = known(config)
    style = STYLES[config.model_type]
    kinds = (style.generator, "Model", "ForSequenceClassification", "ForQuestionAnswering")
    class_name, kind = class_and_end(config, class_name, style.name, kinds)
    hidden, vocab = config.size("d_model", "hidden_size"), config.size("vocab_size")
    tied = config.flag("tie_word_embeddings", default=True)
    shares = config.model_type != "marian" or config.flag("share_encoder_decoder_embeddings", default=True)
    target = vocab if shares else config.size("decoder_vocab_size", default=vocab)
    prefix = "" if kind == "Model" else "model."
    own = not (shares and tied)
    shared = embedding(f"{prefix}shared", vocab, hidden) if shares else ()
    tokens = {"encoder": vocab if own else 0, "decoder": target if own else 0}
    encoder, decoder = (stack(config, style, side, prefix, hidden, tokens[side]) for side in ("encoder", "decoder"))
    return Architecture(
        model_type=config.model_type,
        class_name=class_name,
        task="seq2seq",
        stacks=(Stack(name="embedding", layers=(), before=shared, hidden_size=hidden), encoder, decoder),
        main="decoder",
        vocab_size=target,
        hidden_size=hidden,
        max_positions=max_positions(config),
        dtype=dtype_of(config),
        head=head(config, kind, style, hidden, target, tied),
        tied_head=kind == style.generator and tied,
        logits_of_all_tokens=True,
        final_norm="layer" if style.pre_norm else None,
    )


def head(config: Config, kind: str, style: Style, hidden: int, vocab: int, tied: bool) -> tuple[Param, ...]:
    if kind == style.generator:
        bias = (Param("final_logits_bias", (1, vocab), "buffer"),) if style.logits_bias else ()
        return bias + (() if tied else linear("lm_head", hidden, vocab, kind="head"))
    if kind == "ForSequenceClassification":
        # BART's classifiers tell entailment, neutral and contradiction unless the configuration says otherwise.
        three = config.model_type == "bart" and config.get("num_labels", "id2label") is None
        name, labels = "classification_head", 3 if three else num_labels(config)
        return linear(f"{name}.dense", hidden, hidden, True) + linear(f"{name}.out_proj", hidden, labels, True, "head")
    return linear("qa_outputs", hidden, 2, True, "head") if kind == "ForQuestionAnswering" else ()


def stack(config: Config, style: Style, side: str, prefix: str, hidden: int, tokens: int) -> Stack:
    """Encoder or decoder, with an embedding of `tokens` of its own unless that is 0."""
    path, rows = f"{prefix}{side}", config.size("max_position_embeddings")
    positions = embedding(f"{path}.embed_positions", rows + 2 if style.learned_positions else rows, hidden)
    if config.model_type == "m2m_100":
        positions = (Param(f"{path}.embed_positions.weights", (rows + 2, hidden), "buffer"),)
    return Stack(
        name=side,
        prefix=f"{path}.layers",
        hidden_size=hidden,
        before=(embedding(f"{path}.embed_tokens", tokens, hidden) if tokens else ())
        + positions
        + (norm(f"{path}.layernorm_embedding", hidden, bias=True) if style.embedding_norm else ()),
        layers=(layer(config, side, hidden, pre_norm=style.pre_norm),) * config.layers(f"{side}_layers"),
        after=norm(f"{path}.layer_norm", hidden, bias=True) if style.pre_norm else (),
    )


def layer(config: Config, side: str, hidden: int, *, pre_norm: bool, key_bias: bool = True) -> Layer:
    """A layer of the encoder, or of the decoder with its cross attention."""
    decodes = side == "decoder"
    names = ("self_attn", "encoder_attn") if decodes else ("self_attn",)
    activation = config.text("activation_function", default="gelu")
    norms = (*(f"{name}_layer_norm" for name in names), "final_layer_norm")
    return Layer(
        mixers=tuple(scores(config, side, name, hidden, key_bias) for name in names),
        feed_forward=mlp("fc1", "fc2", hidden, config.size(f"{side}_ffn_dim"), activation),
        norm="layer",
        norm_position="pre" if pre_norm else "post",
        params=tuple(p for name in norms for p in norm(name, hidden, bias=True)),
    )


def scores(config: Config, side: str, name: str, hidden: int, key_bias: bool) -> Attention:
    heads, cross, decodes = config.size(f"{side}_attention_heads"), name == "encoder_attn", side == "decoder"
    return attention(
        name,
        hidden,
        heads,
        config.divided("d_model", hidden, heads),
        bias=True,
        k_bias=key_bias,
        projections=("q_proj", "k_proj", "v_proj", "out_proj"),
        kind="cross_attention" if cross else "full_attention",
        causal=decodes and not cross,
        cached=decodes,
        scores="own dtype",
    )
