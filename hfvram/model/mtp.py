"""Heads for multi-token prediction: layers beyond the configuration's that speculate for the model in serving engines.

Each is one more layer of the kind that attends, with a projection of the last hidden state beside the next token's
embedding, 2h → h, and three norms; embedding and head are the model's own. Source: DeepSeek-V3, arXiv 2412.19437,
section 2.2; vLLM 0.19.0, model_executor/models/{deepseek_mtp, qwen3_next_mtp, glm4_moe_mtp, mimo_mtp}.py,
v1/spec_decode/eagle.py; SGLang 0.5.23, models/deepseek_nextn.py.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from hfvram.errors import HfvramError
from hfvram.model.architecture import Architecture, Stack
from hfvram.model.layers import Attention, LatentAttention, Layer, Param, norm
from hfvram.model.patterns import chosen
from hfvram.model.rope import text_section

KEYS: Final = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
UNSAID: Final = ("qwen3_next",)
"""Types with one such layer of which the configuration says nothing."""
PREFIX: Final = "mtp.layers"


def mtp(architecture: Architecture, values: Mapping[str, Any]) -> Architecture:
    """The heads as a model of their own, without embedding and head. Raises `usage` where there are none."""
    text = text_section(values)
    said = next((key for key in KEYS if text.get(key) is not None), None)
    count = text.size(said, low=0, high=64) if said else int(architecture.model_type in UNSAID)
    layers = _layers(architecture)
    if not count or not layers:
        raise HfvramError(
            "usage", f"--draft mtp: {architecture.class_name} has no layers for it, valid is the name of a draft model"
        )
    hidden = architecture.hidden_size
    around: tuple[Param, ...] = (Param("mtp.fc.weight", (hidden, 2 * hidden), "other"),)  # which nothing packs
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        around += norm(f"mtp.{name}", hidden)
    stack = Stack(name="mtp", layers=layers * count, prefix=PREFIX, before=around * count, after=(), hidden_size=hidden)
    left_alone = chosen(architecture.unquantized)
    beyond = f"{architecture.text.prefix}.{len(architecture.text.layers)}"
    plain = any(left_alone(f"{name}.mlp.weight") for name in (beyond, PREFIX))
    return replace(
        architecture,
        stacks=(stack,),
        main="mtp",
        head=(),
        adapter=(),
        stored_sizes=(),
        quantization=None if plain else architecture.quantization,
        scheme=None if plain else architecture.scheme,
    )


def _layers(a: Architecture) -> tuple[Layer, ...]:
    """What one of them consists of: the last layer that attends, with the last mixture where layers are either."""
    attending = [x for x in a.text.layers if any(isinstance(m, (Attention, LatentAttention)) for m in x.mixers)]
    if not attending:
        return ()
    indexed = [x for x in attending if any(isinstance(m, LatentAttention) and m.index_heads for m in x.mixers)]
    last = (indexed or attending)[-1]
    feeds = [x for x in a.text.layers if x.feed_forward is not None]
    return (last,) if last.feed_forward is not None or not feeds else (last, feeds[-1])
