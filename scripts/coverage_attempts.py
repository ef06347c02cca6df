"""How scripts/coverage.py tries a class: at its type's default configuration, scaled down, completed, or published."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import transformers

from hfvram.errors import HfvramError
from hfvram.memory.exact import simulate as engine
from hfvram.memory.exact import training  # noqa: F401  (here once, not in each process)
from hfvram.model import meta
from hfvram.request import Request

PUBLISHED = Path(__file__).parents[1] / "fixtures" / "configs" / "facts.jsonl"
DEPTH, EXPERTS = 6, 32
"""Stacks of layers are no deeper, and layers of experts no wider: the rest only repeats."""
COMPLETED: dict[str, Any] = {
    "vocab_size": 256,
    "is_decoder": True,
    "default_language": "en_XX",
    "vocabulary_map": {"<image>": 1, "<|extra_200|>": 2},
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "attn_layer_indices": [0],
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
"""What a default may leave open that its model needs; the rest follows from what it says."""
TEXT_DECODER = {"model_type": "bert", "is_decoder": True, "add_cross_attention": True}
MUSIC = {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}}
COMPOSED: dict[str, dict[str, Any]] = {
    "encoder-decoder": {"encoder": {"model_type": "bert"}, "decoder": TEXT_DECODER},
    "vision-encoder-decoder": {"encoder": {"model_type": "vit"}, "decoder": TEXT_DECODER},
    "speech-encoder-decoder": {"encoder": {"model_type": "wav2vec2"}, "decoder": TEXT_DECODER},
    "musicgen": MUSIC | {"decoder": {"model_type": "musicgen_decoder"}},
    "musicgen_melody": MUSIC | {"decoder": {"model_type": "musicgen_melody_decoder"}},
}
"""Types that are put together from others and have no default: usual parts."""
INCONSISTENT = "its default configuration is inconsistent: "
LACKS = r"Config' object has no attribute|in the config, or it is not set"
STAGES = ("build", "inference", "training")
CTX, LONG = 128, 4096


class Case(NamedTuple):
    """A class that a task registers for a model type."""

    task: str
    kind: str
    class_name: str


def parts(config: Any) -> Iterator[tuple[str, Any]]:
    """The configurations inside of one."""
    for key, value in config.to_dict().items():
        if isinstance(value, dict) and isinstance(inner := getattr(config, key, None), transformers.PreTrainedConfig):
            yield key, inner


def shallow(config: Any) -> dict[str, Any]:
    """What to pass to a configuration's class so that it is not deeper than DEPTH nor wider than EXPERTS."""
    cut: dict[str, Any] = {key: part | _typed(inner) for key, inner in parts(config) if (part := shallow(inner))}
    for key, value in config.to_dict().items():
        limit = DEPTH if key.endswith(("layers", "layer", "depth")) else EXPERTS if key.endswith("experts") else None
        if limit is not None and type(value) is int and value > limit:
            cut[key] = limit
    return cut


def completed(config: Any) -> dict[str, Any]:
    """Values for what a configuration leaves open: ids are 1, heads as many as queries have, layers all of one kind."""
    found: dict[str, Any] = {key: part | _typed(inner) for key, inner in parts(config) if (part := completed(inner))}
    values = config.to_dict()
    heads, layers = (values.get(f"num_{name}") for name in ("attention_heads", "hidden_layers"))
    size = values.get("hidden_size") // heads if type(heads) is int and values.get("hidden_size") else None
    layers = layers if type(layers) is int else 0
    follow = {"layer_types": ["full_attention"] * layers, "mlp_layer_types": ["dense"] * layers}
    follow |= {"moe_intermediate_size": values.get("intermediate_size")}
    for key, value in values.items():
        if value is not None and key != "is_decoder":
            continue
        fill = COMPLETED.get(key, follow.get(key))
        if key.endswith(("_token_id", "_token_index", "_downsample_rate")):
            fill = 1
        elif key.endswith("_heads"):
            fill = heads
        elif key.endswith("head_dim"):
            fill = size
        elif key.endswith("_experts") and fill is None:
            fill = 4
        elif (part := config.sub_configs.get(key)) is not None:
            fill = {"model_type": getattr(part, "model_type", "") or "llama"}
        if fill and fill != value:
            found[key] = fill
    return found


def _typed(config: Any) -> dict[str, Any]:
    return {"model_type": config.model_type} if config.model_type else {}


def merged(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested dictionaries as one; the second has the last word."""
    both = {k: merged(a[k], b[k]) for k in a.keys() & b.keys() if isinstance(a[k], dict) and isinstance(b[k], dict)}
    return {**a, **b, **both}


def published(kind: str) -> dict[str, Any] | None:
    """A published configuration of this type, where the fixtures have one."""
    configs = (json.loads(line)["config"] for line in PUBLISHED.read_text().splitlines())
    found = next((c for c in configs if c["model_type"] == kind), None)
    return found and {k: v for k, v in found.items() if k != "architectures"}


def configurations(kind: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The default scaled down and whole, then completed, then a published one; and what to say of it."""
    whole: dict[str, Any] = {"model_type": kind}
    if kind in COMPOSED:
        whole |= COMPOSED[kind]
        named = ", ".join(f"{key}: {part['model_type']}" for key, part in COMPOSED[kind].items())
        yield whole, f"of usual parts ({named})"
        return
    default = buildable(whole)
    cut = shallow(default) if default is not None else {}
    if (scaled := buildable(whole | cut)) is None:
        cut, scaled = {}, default
    if cut:
        yield whole | cut, ""
    yield whole, ""
    if scaled is not None and (more := completed(scaled)):
        yield whole | merged(cut, more), f"with {', '.join(told(more))}"
    if (other := published(kind)) is not None:
        yield merged(other, shallow(meta.configuration(other))), "a published configuration"


def buildable(values: dict[str, Any]) -> Any:
    """The configuration of these values, None where its class refuses them: the run tells why."""
    try:
        return meta.configuration(values)
    except Exception:
        return None


def told(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Names of the values, inner ones with their path."""
    for key, value in values.items():
        if isinstance(value, dict) and key != "vocabulary_map" and set(value) - {"model_type"}:
            yield from told(value, f"{prefix}{key}.")
        elif key != "model_type":
            yield f"`{prefix}{key}`"


def run(case: Case, stage: str, config: dict[str, Any], dtype: str, ctx: int) -> None:
    """One stage of one case. Raises what the engine raises."""
    if stage == "build":
        meta.build(config, case.class_name, dtype)
        return
    asked: dict[str, Any] = {"mode": "train"}
    if stage == "inference":
        generates = meta.build(config, case.class_name, dtype).can_generate()
        asked = {"phase": "generate", "new_tokens": 4} if generates else {"phase": "encode"}
    asked |= {"ctx": ctx, "dtype": dtype, "quant": "none", "method": "simulate"}
    engine.simulate(config, case.class_name, Request.from_dict(asked))


def attempt(case: Case, stage: str) -> dict[str, str]:
    """Whether a stage runs and how, first as is, then in fp32, then with all the tokens that it has positions for."""
    whys: list[str] = []
    for dtype, long, how in (("bf16", False, ""), ("fp32", False, "in fp32"), ("bf16", True, "at its full context")):
        for config, with_what in configurations(case.kind):
            try:
                run(case, stage, config, dtype, full_context(config) if long else CTX)
            except Exception as error:
                whys.append(reason(error))
            else:
                return {"why": "", "how": ", ".join(filter(None, (with_what, how)))}
        if stage == "build":
            break
    return {"why": next((why for why in whys if not why.startswith(INCONSISTENT)), whys[0]), "how": ""}


def full_context(config: dict[str, Any]) -> int:
    """Positions, at most LONG."""
    positions = getattr(meta.configuration(config), "max_position_embeddings", None)
    return min(positions, LONG) if isinstance(positions, int) else LONG


def reason(error: BaseException) -> str:
    """An error in a line: of a configuration that can't be built, that it is inconsistent."""
    text = " ".join(str(error).split())
    text = re.sub(r"the code of \S+ can't run on the meta device \((.*)\): --method formula", r"\1", text)
    text = re.sub(r"transformers can't build this \S+ model: ", "", text)
    if "pip install" in text:
        return "a package is missing: " + text.partition(" but it")[0].partition(". ")[0]
    if (isinstance(error, HfvramError) and error.kind == "bad_config") or re.search(LACKS, text):
        return INCONSISTENT + text
    return text if isinstance(error, HfvramError) else f"{type(error).__name__}: {text}"
