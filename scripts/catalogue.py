#!/usr/bin/env python3
"""Write hfvram/read/catalogue.json from scripts/catalogue_facts.jsonl, with parameter counts from the meta device.

    python scripts/catalogue.py [--check]

A line of facts is `id`, `config` (the values of config.json that decide architecture and memory) or `like` (the id of a
line with the same configuration), `source` (where the facts are from), and where they apply: `published` (an exact
parameter count to agree with) and `gated`. Every model is built by transformers on the meta device; a count that
disagrees with the published one is an error. Counted is the model as transformers builds it: the checkpoints of FLAN-T5
hold an output head of their own besides (24,674,304 more in the base model), DeepSeek's a layer that predicts further
tokens.

--check writes nothing and fails if the file would change.
"""

import argparse
import fnmatch
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FACTS = Path(__file__).with_name("catalogue_facts.jsonl")
CATALOGUE = Path(__file__).parents[1] / "hfvram" / "read" / "catalogue.json"
DATE = "2026-11-23"

SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
PACKED = {"mxfp4": "F4", "fp8": "F8_E4M3"}
NOT_QUANTIZED = re.compile(r"(^|\.)(embed_tokens|lm_head|gate|router)(\.|$)|norm")


def meta_parameters(config: Mapping[str, Any], architecture: str) -> list[tuple[str, int, int]]:
    """Name, number of dimensions and number of elements of every parameter that transformers builds, tied ones once."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    rest = {k: v for k, v in config.items() if k not in ("quantization_config", "model_type")}
    rest.pop("text_config", None)
    if "text_config" in config:  # Kimi has its quantization there
        rest["text_config"] = {k: v for k, v in config["text_config"].items() if k != "quantization_config"}
    built = transformers.AutoConfig.for_model(config["model_type"], **rest)
    model_class = getattr(transformers, architecture, None)
    if model_class is None:  # a name from before the model came to transformers
        causal, image = transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        model_class = (causal if type(built) in causal else image)[type(built)]
    with torch.device("meta"):
        model = model_class._from_config(built, dtype=torch.bfloat16)
    return [(name, p.dim(), math.prod(p.shape)) for name, p in model.named_parameters()]


def counts_by_dtype(config: Mapping[str, Any]) -> dict[str, int]:
    """Parameters by the dtype that the checkpoint stores: `F4` and `F8_E4M3` count numbers, not packed words."""
    dtype = config.get("dtype") or config.get("torch_dtype") or config.get("text_config", {}).get("torch_dtype")
    plain = SAFETENSORS[dtype or "float32"]
    quantization = config.get("quantization_config") or {}
    packed = PACKED.get(quantization.get("quant_method"))
    exceptions = quantization.get("modules_to_not_convert") or []
    counts: Counter[str] = Counter()
    for name, dims, elements in meta_parameters(config, config["architectures"][0]):
        excepted = any(fnmatch.fnmatchcase(name, pattern + "*") for pattern in exceptions)
        quantized = packed and dims >= 2 and name.find("_bias") < 0 and not excepted and not NOT_QUANTIZED.search(name)
        counts[packed if quantized else plain] += elements
    return dict(sorted(counts.items()))


def catalogue(facts: list[dict[str, Any]]) -> str:
    """The file's text: one model a line, in the order of their ids."""
    models: dict[str, dict[str, Any]] = {}
    wrong = 0
    for line in facts:
        if line["id"] in models:
            raise SystemExit(f"{line['id']} stands twice")
        if "like" in line:
            models[line["id"]] = {"like": line["like"]}
        else:
            counts = counts_by_dtype(line["config"])
            total = sum(counts.values())
            agrees = line.get("published", total) == total
            wrong += not agrees
            note = f"but published are {line['published']:,}" if not agrees else "as published" * ("published" in line)
            print(f"{total:>17,}  {line['id']}  {note}", flush=True)
            models[line["id"]] = {"parameters": counts, "config": line["config"]}
        if line.get("gated"):
            models[line["id"]]["gated"] = True
    if wrong:
        raise SystemExit(f"{wrong} models do not have their published count")
    for name, entry in models.items():
        if "like" in entry and "config" not in models.get(entry["like"], {}):
            raise SystemExit(f"{name} is like {entry['like']}, which has no configuration")
    lines = [f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in sorted(models.items())]
    return f'{{"date": "{DATE}", "models": {{\n' + ",\n".join(lines) + "\n}}\n"


def main() -> int:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--check", action="store_true")
    check = args.parse_args().check
    text = catalogue([json.loads(line) for line in FACTS.read_text().splitlines()])
    if check:
        return text != CATALOGUE.read_text()
    CATALOGUE.write_text(text)
    print(f"{text.count(chr(10)) - 2} models, {len(text):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
