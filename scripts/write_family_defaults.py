"""Write hfvram/model/families/defaults.json from the installed transformers: what a configuration leaves unsaid.

For every model type that a reader knows, and for the types nested in it: the defaults of its configuration class that
decide about shapes, other names of its keys, the types of its sections, and the classes that are built from it.

    python scripts/write_family_defaults.py [--check]
"""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto import modeling_auto

from hfvram.model.families import MODULES

TARGET = Path(__file__).parent.parent / "hfvram/model/families/defaults.json"
# Keys that say nothing about sizes: losses, generation, processors. Dropout's rates are kept: its masks are.
LEFT_OUT = re.compile(
    r"token_id|_token_index|classifier_dropout|drop_rate|initializer|_eps$|^eps$|epsilon|loss|^output_|^return_dict|_std$|"
    r"pretraining_tp|_coef|^is_|chunk_size_feed|summary_|_multiplier$|clip_min|scale_factor|^transformers_version|"
    r"problem_type|^mask_|apply_spec|codevector|_token$|^rope_theta$|^std_|_fixed_|jitter|ctc_|^architectures$|theta|^dtype$"
)
HEADS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)


def plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) <= 64 and all(plain(v) for v in value)
    return isinstance(value, (bool, int, float, str)) and value != ""


def config_class(model_type: str, default: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The configuration class of a type (the mapping's own `get` doesn't load it)."""
    if model_type not in CONFIG_MAPPING:
        return default
    found: type[PreTrainedConfig] = CONFIG_MAPPING[model_type]
    return found


def classes(model_type: str) -> dict[str, str]:
    """Classes that transformers builds from this type, the default first, each with its base model's prefix."""
    found: list[str] = []
    for mapping in HEADS:
        names = getattr(modeling_auto, mapping, {}).get(model_type, ())
        found += [n for n in ((names,) if isinstance(names, str) else names) if n not in found]
    # A wrapper's bare class ends its list, so that what is built by default generates.
    found.sort(key=lambda n: n.endswith("Model") and not n.endswith("LMHeadModel"))
    if "text_config" in config_class(model_type, PreTrainedConfig).sub_configs:
        found.sort(key=lambda n: not n.endswith("ForConditionalGeneration"))  # the whole before its text model
    return {n: prefix(n) for n in found if hasattr(transformers, n)}


def prefix(name: str) -> str:
    """`model.` for Llama's causal class, nothing for its bare model."""
    if name.endswith("Model") and not name.endswith("LMHeadModel"):
        return ""
    return f"{getattr(transformers, name).base_model_prefix}."


def facts(model_type: str, kind: type[PreTrainedConfig], known: dict[str, Any]) -> None:
    """Adds the facts of one type, and of the types in its sections."""
    if model_type in known:
        return
    defaults = {f.name: f.default for f in dataclasses.fields(kind) if plain(f.default) and not LEFT_OUT.search(f.name)}
    if defaults.get("use_cache") is True:
        del defaults["use_cache"]
    known[model_type] = entry = {
        "classes": classes(model_type),
        "aliases": {k: v for k, v in kind.attribute_map.items() if not LEFT_OUT.search(k)},
        "sections": {},
        "defaults": defaults,
    }
    if not kind.sub_configs:
        return
    built = kind()
    for name in kind.sub_configs:
        nested, section_kind = getattr(built, name, None), kind.sub_configs[name]
        if nested is None and section_kind is not AutoConfig:
            own = section_kind.model_type or f"{model_type}.{name}"
            facts(own, section_kind, known)
            entry["sections"][name] = {"type": own, "any": False, "absent": None}
        if nested is None or isinstance(nested, dict):
            continue
        # A section whose class shares its type with another (or has none) is known by its place.
        own = nested.model_type
        if not own or own == model_type or config_class(own, type(nested)) is not type(nested):
            own = f"{model_type}.{name}"
        facts(own, type(nested), known)
        base = known[own]["defaults"]
        unlike = {k: v for k, v in nested.to_dict().items() if k in base and plain(v) and v != base[k]}
        entry["sections"][name] = {"type": own, "any": section_kind is AutoConfig, "absent": unlike}


def main() -> int:
    known: dict[str, Any] = {}
    for types in MODULES.values():
        for model_type in types:
            facts(model_type, CONFIG_MAPPING[model_type], known)
    lines = (f"{json.dumps(k)}: {json.dumps(v, separators=(', ', ': '))}" for k, v in sorted(known.items()))
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    if "--check" in sys.argv:
        return 0 if TARGET.read_text() == text else 1
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
