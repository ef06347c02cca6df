#!/usr/bin/env python3
"""Hold the serving engines' figures against those that people published: logs of vLLM, SGLang and llama.cpp.

    python scripts/published.py [fixtures/published] [--engine vllm] [--rows] [--markdown] [--require]

A run names a model, the settings it ran with, and figures as printed. They come from a folder (runs.jsonl and
models.jsonl) or a .tsv with a figure a row (id, model_hub_id, settings, what, value, unit). What is compared:

    cache     the cache's bytes for as many tokens or blocks as were printed, to the printed digit and a block
    tokens    how many tokens the printed bytes hold, likewise
    state     bytes of recurrent states for as many slots as were printed
    weights   what the engine says it loaded: within 0.01 GiB
    pool      the pool that is left of the GPU, nothing given but the settings, and its tokens
    …         activations, memory outside PyTorch, CUDA graphs
    compute   llama.cpp's compute buffer; the most that it may be where an older build has the logits of all tokens

Of llama.cpp `part` says which of its caches is meant: layers that see all tokens (non-SWA), a window (SWA), or one more
layer that predicts ahead (MTP layer), with which 1 + mtp_n_max copies of a state are kept.

Rows of other versions than the one modelled count for cache, tokens, state and weights alone. A model is read from the
catalogue, from models.jsonl beside the table (like another one but for some keys), or from --configs FOLDER. With
--require the exit code is 1 unless cache, tokens and state agree, and pools are within 3 % in the median.
"""

import argparse
import csv
import json
import re
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfvram.answer.estimate import Estimate, Serving
from hfvram.answer.question import Session
from hfvram.errors import HfvramError
from hfvram.memory.serving import MODELLED
from hfvram.memory.serving.llama_cpp import LARGEST_CONTEXT_BYTES
from hfvram.read.catalogue import lookup
from hfvram.request import CHOICES, Request

OWN = Path(__file__).parents[1] / "fixtures" / "published"
UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "GB(GiB)": 1 << 30, "MB(MiB)": 1 << 20}
NAMES = {
    "max_model_len": "ctx", "n_seq_max": "max_num_seqs", "cells": "max_num_seqs", "n_ubatch": "max_num_batched_tokens",
}  # fmt: skip
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
WHAT = {
    "weights_bytes": "weights", "activation_peak": "activations", "non_torch_bytes": "non_torch",
    "cuda_graph_bytes": "graphs", "compute_buffer": "compute", "max_tokens": "tokens",
    "cpu_blocks_in_4GiB": "blocks_in_4_GiB",
}  # fmt: skip
"""Figures by the names of a .tsv, in the words of runs.jsonl."""
ASKED = (
    *("ctx", "dtype", "quant", "kv_dtype", "tp", "pp", "gpu", "gpu_memory_utilization", "mem_fraction_static"),
    *("max_num_seqs", "max_num_batched_tokens", "enforce_eager", "attention"),
)
"""Settings that are asked for as they stand; the others are sizes that a run printed."""
REST = {"activations": "activation_bytes", "non_torch": "non_torch_bytes", "graphs": "graph_bytes"}
CLOSE = 0.01 * (1 << 30)


@dataclass(frozen=True, slots=True)
class Score:
    """One figure of one row: ours beside the published one, and whether it agrees where it can agree exactly."""

    id: str
    engine: str
    figure: str
    published: float
    ours: float
    agrees: bool | None

    @property
    def error(self) -> float:
        return self.ours / self.published - 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", nargs="?", default=str(OWN), type=Path)
    parser.add_argument("--engine", choices=("vllm", "sglang", "llama.cpp"))
    parser.add_argument("--configs", type=Path, help="folder of ORG__NAME.json for models that nothing else knows")
    parser.add_argument("--rows", action="store_true", help="every row, not only the table")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--require", action="store_true")
    args = parser.parse_args()
    scores, left_out = score(Path(args.table), args.configs)
    scores = [s for s in scores if args.engine in (None, s.engine)]
    if args.rows:
        for s in scores:
            mark = "" if s.agrees is None else "ok" if s.agrees else "OFF"
            print(f"{s.id:44} {s.figure:9} {s.published:>18,.2f} {s.ours:>18,.2f} {s.error:+9.3%} {mark}")
    print(table(scores, args.markdown))
    for reason, ids in sorted(left_out.items()):
        print(f"left out, {reason}: {len(ids)} ({', '.join(ids[:6])}{', …' if len(ids) > 6 else ''})", file=sys.stderr)
    return 1 if args.require and not holds(scores) else 0


@dataclass(frozen=True, slots=True)
class Run:
    """A model's run: settings in hfvram's words, sizes that the engine printed among them, and figures as printed."""

    id: str
    engine: str
    model: str
    settings: dict[str, Any]
    printed: dict[str, str]


def runs(path: Path) -> Iterator[Run]:
    """The runs of a folder's runs.jsonl, or of a .tsv with a figure a row."""
    if path.is_dir():
        for line in (path / "runs.jsonl").read_text().splitlines():
            run = json.loads(line)
            yield Run(*(run[k] for k in ("id", "engine", "model", "settings", "printed")))
        return
    with path.open(newline="") as opened:
        for row in csv.DictReader(opened, delimiter="\t"):
            settings = json.loads(row["settings"])
            engine = str(settings.get("engine", ""))
            if engine.startswith("llama.cpp"):
                what = "state" if row["what"] == "state_bytes" else figure(row["what"], settings, engine)
                model = row["model_hub_id"].partition(" ")[0]
                yield Run(row["id"], engine, model, llama_words(settings), {what: value(row)})
            if engine.startswith(("vllm", "sglang")):
                printed = {figure(row["what"], settings, engine): value(row)}
                if "max_concurrency" in settings:
                    printed["concurrency"] = str(settings["max_concurrency"])
                yield Run(row["id"], engine, row["model_hub_id"], words(settings), printed)


def value(row: dict[str, str]) -> str:
    """A figure of a .tsv as printed."""
    return f"{row['value']} {row['unit']}"


def llama_words(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of llama.cpp in a .tsv in the words of runs.jsonl."""
    found = {NAMES.get(k, k): v for k, v in settings.items() if v is not None}
    if settings.get("flash_attn") is False:
        found["attention"] = "eager"
    return found


def figure(what: str, settings: dict[str, Any], engine: str) -> str:
    """What a row of a .tsv is about."""
    name = what.partition("(")[0]
    if what.startswith("state_bytes"):
        return "state" if "ssm" in what else "convolutions"
    if name != "kv_cache_bytes":
        return WHAT.get(name, name)
    if "K only" in what:
        return "keys"
    counted = engine.startswith(("sglang", "llama.cpp")) or ("blocks" in settings and "kv_tokens" not in settings)
    return "cache" if counted else "pool"


def words(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a .tsv in the words of runs.jsonl."""
    found = {NAMES.get(k, k): v for k, v in settings.items() if v not in (None, "None", "auto")}
    found["dtype"] = DTYPES.get(str(found.get("dtype")), found.get("dtype"))
    found["kv_dtype"] = "fp8" if str(found.get("kv_dtype")).startswith("fp8") else None
    found["quant"] = "fp8" if found.get("quant") == "fp8" else None
    size = re.search(r"(\d+\.\d+) ?GiB", f"{settings.get('gpu', '')} {settings.get('total_gib', '')}GiB")
    found["gpu"] = f"{size[1]}GiB" if size else None
    return found


def score(path: Path, configs: Path | None = None) -> tuple[list[Score], dict[str, list[str]]]:
    """The scores of a table's runs, and the ids of those left out by reason."""
    models = path / "models.jsonl" if path.is_dir() else OWN / "models.jsonl"
    known = {m["id"]: m for m in map(json.loads, models.read_text().splitlines())}
    session = Session()
    found: list[Score] = []
    left_out: dict[str, list[str]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for run in runs(path):
            try:
                model, quantized = where(run.model, known, configs, Path(folder))
                request = Request.from_dict(asked(run, quantized))
                scored = compared(run, session.estimate(model, request, offline=True))
            except HfvramError as error:
                reason = "no configuration" if error.kind in ("offline", "not_found") else error.message
                left_out[reason].append(run.id)
                continue
            found += scored
            if not scored:
                left_out["nothing that follows from the settings"].append(run.id)
    return found, left_out


def where(name: str, known: dict[str, Any], configs: Path | None, folder: Path) -> tuple[str, bool]:
    """What to read a model from, and whether its configuration says how it is quantized."""
    if entry := known.get(name):
        base = lookup(entry["like"]) if "like" in entry else None
        config = {**(base.config if base else {}), **entry.get("config", {})}
        target = folder / name.replace("/", "__") / "config.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(config))
        return str(target), "quantization_config" in config
    if (entry := lookup(name)) is not None:
        return name, "quantization_config" in entry.config
    if configs and (file := configs / f"{name.replace('/', '__')}.json").is_file():
        return str(file), "quantization_config" in json.loads(file.read_text())
    return name, False


def asked(run: Run, quantized: bool) -> dict[str, Any]:
    """A run's settings as a request. Of a quantized checkpoint its own quantization is asked for."""
    valid = set(ASKED) - ({"quant"} if quantized else set())
    found = {k: v for k, v in run.settings.items() if k in valid and v is not None}
    if run.engine.startswith("sglang"):
        found.pop("gpu_memory_utilization", None)
    if not run.engine.startswith("llama.cpp"):
        found.pop("attention", None)
    if found.get("dtype") not in CHOICES["dtype"]:
        found.pop("dtype", None)
    return {**found, "engine": run.engine.partition(" ")[0]}


def compared(run: Run, answer: Estimate) -> list[Score]:
    """The scores of one run."""
    s, settings, engine = answer.serving, run.settings, answer.request.engine
    if engine == "llama.cpp":
        return compared_buffers(run, answer)
    assert s is not None
    current = run.engine == f"{engine} {MODELLED[engine]}" or run.engine.startswith(f"{engine} {MODELLED[engine]} ")
    row = s.block_bytes + round(s.kv_bytes_per_token * 16)
    found: list[Score] = []

    def add(name: str, published: float, ours: float, agrees: bool | None = None) -> None:
        found.append(Score(run.id, engine, name, published, ours, agrees))

    for what, text in run.printed.items():
        value, _, unit = text.partition(" ")
        scale = UNITS.get(unit, 1)
        published, half = float(value) * scale, 0.505 * 10.0 ** -len(value.partition(".")[2]) * scale
        tokens = settings.get("kv_tokens") or (int(run.printed.get("tokens", "0").split()[0]) if what == "pool" else 0)
        if what == "pool":
            if tokens:
                held = tokens * s.kv_bytes_per_token
                add("cache", published, held, abs(held - published) <= half + row)
            if current and s.kv_pool_bytes is not None:
                add("pool", published, s.kv_pool_bytes)
        elif what in ("cache", "keys") and (held := printed_size(settings, s, engine)):
            share = 0.5 if what == "keys" else 1.0
            add("cache", published, held * share, abs(held * share - published) <= half)
        elif what == "tokens":
            if current and s.kv_tokens is not None:
                add("tokens of the pool", published, s.kv_tokens)
            if (gib := settings.get("kv_gib_min")) is not None:
                held = gib * UNITS["GiB"] / s.kv_bytes_per_token
                reach = (0.005 * UNITS["GiB"] + row) / s.kv_bytes_per_token
                add("tokens", published, held, abs(held - published) <= reach)
        elif what == "concurrency" and "tokens" in run.printed and s.max_concurrency and s.kv_tokens:
            ours = s.max_concurrency * int(run.printed["tokens"].split()[0]) / s.kv_tokens
            add("concurrency", published, ours, abs(ours / published - 1) < 0.005)
        elif what == "blocks_in_4_GiB":
            ours = float((4 << 30) // s.block_bytes)
            add("cache", published, ours, ours == published)
        elif what == "state" and (slots := settings.get("max_mamba_cache_size")):
            ours = s.state_bytes * (slots + 1)
            add("state", published, ours, abs(ours - published) <= half)
        elif what == "weights":
            agrees = abs(s.loaded_bytes - published) <= CLOSE if engine == "vllm" else None
            add("weights", published, s.loaded_bytes, agrees)
        elif what in REST and current:
            add(what, published, getattr(s, REST[what]))
    return found


def compared_buffers(run: Run, answer: Estimate) -> list[Score]:
    """The scores of one run of llama.cpp, whose log prints each buffer."""
    held: dict[str, int] = defaultdict(int)
    layers: dict[str, int] = defaultdict(int)
    for item in (*answer.items, *answer.offloaded):
        held[item.name.removeprefix("cache: ")] += item.bytes
        if found := re.search(r"× (\d+) layer", item.formula):
            layers[item.name.removeprefix("cache: ")] += int(found[1])
    full, window = held["full attention"] + held["latent attention"], held["sliding window"]
    caches = {"non-SWA": full, "SWA": window, "MTP layer": full // max(layers["full attention"], 1)}
    ours = {
        "cache": caches.get(str(run.settings.get("part")), full + window),
        "state": held["recurrent states"] * (1 + run.settings.get("mtp_n_max", 0)),
        "weights": answer.weights_bytes,
        "compute": answer.activations_bytes,
    }
    if not re.search(r" (b1\d{4}|2026)", run.engine):  # builds that compute the logits of all tokens
        beside = answer.peak_allocated_bytes - answer.activations_bytes + LARGEST_CONTEXT_BYTES
        ours["compute"] = answer.interval.high_bytes - beside
    scores = []
    for what, text in run.printed.items():
        number, _, unit = text.partition(" ")
        scale = UNITS[unit]
        published, half = float(number) * scale, 0.505 * 10.0 ** -len(number.partition(".")[2]) * scale
        if ours.get(what):  # of a cache there is none in encoders, which had one until March 2025
            agrees = abs(ours[what] - published) <= half if what != "compute" else None
            name = "compute, at the most" if what == "compute" and ours[what] != answer.activations_bytes else what
            scores.append(Score(run.id, "llama.cpp", name, published, ours[what], agrees))
    return scores


def printed_size(settings: dict[str, Any], s: Serving, engine: str) -> float:
    """The cache for as many blocks or tokens as were printed; SGLang's pools have a spare page."""
    if engine == "vllm":
        return float(settings.get("blocks", 0) * s.block_bytes)
    page = settings.get("page", 1)
    if "swa_tokens" in settings:
        return float(
            (settings["swa_tokens"] + page) * s.sliding_bytes + (settings["full_tokens"] + page) * s.block_bytes
        )
    part = s.sliding_bytes if settings.get("part") == "SWA" else s.block_bytes
    return float((settings["tokens"] + page) * part) if "tokens" in settings else 0.0


def table(scores: list[Score], markdown: bool) -> str:
    """A line for each engine and figure: rows, how many agree, the median and the largest error."""
    lines = [("engine", "figure", "rows", "agree", "median error", "largest")]
    for engine, figure in dict.fromkeys(
        (s.engine, s.figure) for s in sorted(scores, key=lambda s: (s.engine, s.figure))
    ):
        these = [s for s in scores if (s.engine, s.figure) == (engine, figure)]
        judged = [s for s in these if s.agrees is not None]
        agree = f"{sum(bool(s.agrees) for s in judged)} of {len(judged)}" if judged else ""
        errors = [abs(s.error) for s in these]
        lines.append((engine, figure, str(len(these)), agree, f"{statistics.median(errors):.3%}", f"{max(errors):.3%}"))
    if markdown:
        rule = ["---", "---", "---:", "---:", "---:", "---:"]
        return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def holds(scores: list[Score]) -> bool:
    """Whether everything that can be exact is, and pools are near enough."""
    exact = [s for s in scores if s.figure in ("cache", "tokens", "state")]
    pools = [abs(s.error) for s in scores if s.figure == "pool"]
    return all(s.agrees for s in exact) and (not pools or statistics.median(pools) <= 0.03)


if __name__ == "__main__":
    sys.exit(main())
