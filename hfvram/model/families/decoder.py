"""A decoder-only model around its layers: embedding, final norm, head."""

from collections.abc import Iterable
from typing import Any

from hfvram.errors import HfvramError, printable
from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families.blocks import embedding
from hfvram.model.families.common import causal_head, dtype_of, max_positions
from hfvram.model.families.defaults import class_of, prefix_of
from hfvram.model.layers import Layer, norm


def decoder(
    config: Config,
    class_name: str | None,
    layers: Iterable[Layer],
    *,
    module: str = "layers",
    embed: str = "embed_tokens",
    final: str = "norm",
    **facts: Any,
) -> Architecture:
    """The model of `class_name`, or of the configuration's own class, with these layers.

    `module`, `embed` and `final` are transformers' names of the layers, the embedding and the last norm, which has no
    bias; `facts` more of `Architecture`.
    """
    class_name = class_of(config, class_name)
    prefix = prefix_of(config, class_name)
    hidden = config.size("hidden_size")
    stack = Stack(
        name="text",
        prefix=f"{prefix}{module}",
        hidden_size=hidden,
        before=embedding(f"{prefix}{embed}", config.size("vocab_size"), hidden),
        layers=tuple(layers),
        after=norm(f"{prefix}{final}", hidden),
    )
    return around(config, class_name, stack, **facts)


def around(
    config: Config,
    class_name: str,
    stack: Stack,
    *,
    head_width: int | None = None,
    head_bias: bool = False,
    token_head: str = "score",
    **facts: Any,
) -> Architecture:
    """The model whose one stack this is, with the head of its class; `facts` are more of `Architecture`, and win.

    `head_width` is the head's input where it isn't the stack's width, `token_head` the name of a token classifier.
    """
    vocab = config.size("vocab_size")
    width = head_width or stack.hidden_size
    head, tied = causal_head(config, class_name, width, vocab, head_bias, token_head)
    values: dict[str, Any] = {"model_type": config.model_type, "dtype": dtype_of(config)}
    return Architecture(
        class_name=class_name,
        task="causal",
        stacks=(stack,),
        main=stack.name,
        vocab_size=vocab,
        hidden_size=stack.hidden_size,
        max_positions=max_positions(config),
        head=head,
        tied_head=tied,
        **(values | facts),
    )


LEGACY_KINDS = {"mamba": "linear_attention", "conv": "linear_attention", "attention": "full_attention"}


def hybrid_kinds(
    config: Config,
    default: Iterable[str],
    names: tuple[str, ...] = ("layer_types",),
    known: Iterable[str] = ("full_attention", "linear_attention"),
    exact: bool = True,
) -> list[str]:
    """The kind of every layer, as the first of the keys `names` lists them, else `default`, in today's words.

    Raises `unknown_architecture` for a kind not in `known`, and with `exact` `bad_config` where there are not as many
    as `num_hidden_layers` says.
    """
    listed = config.strings(*names)
    kinds = [LEGACY_KINDS.get(kind, kind) for kind in (listed if listed is not None else default)]
    if exact and len(kinds) != (layers := config.layers("num_hidden_layers")):
        raise HfvramError("bad_config", f"config.json: {names[0]} has {len(kinds)} entries for {layers} layers")
    allowed = set(known)
    for kind in kinds:
        if kind not in allowed:
            raise HfvramError(
                "unknown_architecture", f"layer kind {printable(kind, 40)!r} of {config.model_type} is not known"
            )
    return kinds
