"""The best bound for what is not understood: layers as full attention (`--allow-unknown`), or the weights alone."""

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hfvram.errors import HfvramError
from hfvram.model import meta
from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families import reader
from hfvram.model.families.common import dtype_of
from hfvram.model.infer import infer
from hfvram.model.layers import Layer, Param
from hfvram.model.quantization import method
from hfvram.model.scheme import scheme
from hfvram.read.checkpoint import Checkpoint

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
ALIASES = {
    "num_hidden_layers": ("n_layer", "num_layers", "n_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "hidden_size": ("n_embd", "d_model", "dim"),
    "intermediate_size": ("ffn_hidden_size", "n_inner", "d_ff"),
    "vocab_size": ("padded_vocab_size",),
}
STORED_DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
"""The floating-point dtypes of safetensors that a model computes in."""


def bound(checkpoint: Checkpoint, unknown: HfvramError, trust_remote_code: bool = False) -> Architecture:
    """An architecture that needs no less: every layer is full attention of the sizes that the configuration gives.

    Its tensors are those of the headers where they were read, or of the model that its own code builds (with
    `trust_remote_code`, or where transformers knows the type), else Llama's. Raises `unknown` where there are no sizes.
    """
    values = dict(checkpoint.config)
    if isinstance(text := values.get("text_config"), Mapping):
        values |= text
    for name, others in ALIASES.items():
        if not values.get(name):
            values[name] = next((values[o] for o in others if values.get(o)), None)
    if any(not values.get(key) for key in SIZES):
        raise unknown
    values["intermediate_size"] = values["intermediate_size"] or 4 * Config(values).size("hidden_size")
    ignored = ("layer_types", "architectures", "sliding_window", "attention_chunk_size")
    likeness = infer({k: v for k, v in values.items() if k not in ignored} | {"model_type": "llama"})
    params, counted = _tensors(checkpoint, trust_remote_code)
    if params:
        layers = tuple(_without_params(layer) for layer in likeness.text.layers)
        shell = Stack(name="text", layers=layers, hidden_size=likeness.hidden_size)
        likeness = replace(likeness, stacks=(shell,), head=params, tied_head=True)  # whichever is its head, it has one
    warning = (
        f"{unknown.message}: every layer counts as full attention, {counted}; what its code needs beside is left out"
    )
    return replace(likeness, **_names(checkpoint), warnings=(warning,))


def can_run(config: Mapping[str, Any]) -> bool:
    """Whether an installed transformers knows a type that has no reader, found out without importing it."""
    kind, found = config.get("model_type"), find_spec("transformers")
    if not isinstance(kind, str) or reader(kind) is not None or find_spec("torch") is None or found is None:
        return False
    tables = Path(str(found.origin)).parent.glob("models/auto/*.py")
    return any(f"{json.dumps(kind)}, " in table.read_text() for table in tables)


def by_its_code(checkpoint: Checkpoint, unknown: HfvramError) -> Architecture:
    """What the exact engine has to know of a model that transformers builds, but of which no closed form is known.

    Its layers are counted, not understood. Raises `missing_extra` without torch, `unknown` where transformers knows no
    such type, `bad_config` where it refuses the values.
    """
    dtype = dtype_of(Config(checkpoint.config))
    try:
        model = meta.build(checkpoint.config, None, dtype)
    except HfvramError as error:
        raise unknown if error.kind == "unknown_architecture" else error from None
    text = model.config.get_text_config()
    stack = Stack(
        name="text",
        layers=(Layer(),) * int(getattr(text, "num_hidden_layers", 0) or 0),
        before=meta.params(model),
        hidden_size=int(getattr(text, "hidden_size", 0) or 0),
    )
    generates = model.can_generate()
    return Architecture(
        model_type=_names(checkpoint)["model_type"],
        class_name=type(model).__name__,
        task="seq2seq" if generates and model.config.is_encoder_decoder else "causal" if generates else "encoder",
        stacks=(stack,),
        main="text",
        vocab_size=int(getattr(text, "vocab_size", 0) or 0),
        hidden_size=stack.hidden_size,
        max_positions=_limit(getattr(text, "max_position_embeddings", None)),
        dtype=dtype,
        tied_head=generates,
        quantization=method(checkpoint.config)[0],
        scheme=scheme(checkpoint.config),
        closed_form=False,
        warnings=(f"{unknown.message} to the formulas: its own code says what it takes",),
    )


def weights_only(checkpoint: Checkpoint, unknown: HfvramError) -> Architecture:
    """An architecture without layers, of the stored tensors alone. Raises `unknown` where no header was read."""
    if not checkpoint.tensors:
        raise unknown
    stored = {t.dtype: 0 for t in checkpoint.tensors}
    for t in checkpoint.tensors:
        stored[t.dtype] += t.nbytes
    dtype = STORED_DTYPES.get(max(stored, key=stored.__getitem__), "fp32")
    params = tuple(Param(t.name, t.shape, "other", STORED_DTYPES.get(t.dtype)) for t in checkpoint.tensors)
    names = _names(checkpoint)
    return Architecture(
        **names,
        task="encoder",
        stacks=(Stack(name="weights", layers=(), before=params),),
        main="weights",
        vocab_size=0,
        hidden_size=0,
        max_positions=None,
        dtype=dtype,
        final_norm=None,
        warnings=(f"{names['class_name']}: weights alone, what it needs to run is not known",),
    )


def _names(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    named = config.get("architectures")
    class_name = named[0] if isinstance(named, list) and named else config.get("_class_name")
    return {"class_name": str(class_name or "unknown"), "model_type": str(config.get("model_type") or "unknown")}


def _without_params(layer: Layer) -> Layer:
    mixers = tuple(replace(m, params=()) for m in layer.mixers)
    feed_forward = replace(layer.feed_forward, params=()) if layer.feed_forward else None
    return replace(layer, mixers=mixers, feed_forward=feed_forward, params=())


def _tensors(checkpoint: Checkpoint, trust_remote_code: bool) -> tuple[tuple[Param, ...], str]:
    """The tensors by the best source, and its name in words."""
    if checkpoint.tensors:
        kinds = [(t.name, t.shape) for t in checkpoint.tensors]
        return tuple(Param(n, s, "linear" if len(s) == 2 else "other") for n, s in kinds), "weights by the headers"
    try:
        model = meta.build(checkpoint.config, None, "bf16", trust_remote_code, checkpoint.path or checkpoint.id)
    except HfvramError:
        return (), "weights like those of Llama with these sizes"
    return meta.params(model), "weights by its own code on the meta device"


def _limit(positions: object) -> int | None:
    """A number of positions; XLNet says −1 for as many as one likes."""
    return positions if isinstance(positions, int) and positions > 0 else None
