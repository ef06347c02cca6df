#!/usr/bin/env python3
"""Hold hfvram's answers against GPU memory that was measured.

    python scripts/score.py [--method formula] [--mode inference] [--only TEXT] [--worst 10]
                            [--require "peak_allocated:median=1,p95=4,max=10"] [--require exact]
                            [--markdown] [--accuracy hfvram/answer/accuracy.json]

Each case of fixtures/measured/h100.jsonl goes through `hfvram batch` as one request. The signed error is predicted
over measured, less one; a refusal counts as 100 % off. Device memory that was read after some had been given back
(below the reserved peak) is left out. --require, which may stand several times, names bounds in percent, or `exact`:
the parameters of every case, and the bytes of every cache. Exit 1 where one does not hold.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

TRUTH = Path(__file__).parents[1] / "fixtures" / "measured" / "h100.jsonl"
FIGURES = ("peak_allocated", "peak_reserved", "device")
STATE_SPACE = {"mamba", "mamba2", "falcon_mamba", "bamba", "jamba", "zamba2", "nemotron_h", "falcon_h1"}
STATE_SPACE |= {"granitemoehybrid", "recurrent_gemma", "qwen3_next", "lfm2"}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
Case = dict[str, Any]


def group(case: Case) -> str:
    """The kind of case, by request and architecture: `inference-moe`, `train-dense-ckpt`, `lora`, `fsdp`…"""
    request, config = case["request"], case["config"]
    mode = request["mode"]
    if request.get("fsdp"):
        return "fsdp"
    if mode in ("lora", "qlora"):
        return str(mode)
    if mode == "inference" and request.get("quant"):
        return "inference-quantized"
    moe = any(config.get(key) for key in EXPERTS)
    state_space = "ssm-fallback" if request.get("kernels") == "fallback" else "ssm"
    kind = state_space if config["model_type"] in STATE_SPACE else "moe" if moe else "dense"
    return f"{mode}-{kind}" + ("-ckpt" if request.get("gradient_checkpointing") else "")


def answers(cases: list[Case], method: str, command: list[str]) -> dict[str, Any]:
    """What hfvram says to each case, by its id."""
    with tempfile.TemporaryDirectory() as folder:
        lines = []
        for number, case in enumerate(cases):
            model = Path(folder) / str(number)
            model.mkdir()
            (model / "config.json").write_text(json.dumps(case["config"]))
            lines.append(json.dumps({"id": case["id"], "model": str(model), "method": method, **case["request"]}))
        done = subprocess.run(
            [*command, "batch", "-", "--json", *(["--jobs", "2"] if method == "simulate" else [])],
            input="\n".join(lines),
            capture_output=True,
            text=True,
        )
    if not done.stdout:
        raise SystemExit(f"{shlex.join(command)} gave no answer: {done.stderr.strip()[-300:]}")
    return {a["id"]: a for a in map(json.loads, done.stdout.splitlines())}


def errors(case: Case, answer: Case) -> dict[str, float]:
    """Signed errors in percent, by figure."""
    measured = case["measured"]
    out = {}
    for figure in FIGURES:
        got, want = answer.get(f"{figure}_bytes"), measured[f"{figure}_bytes"]
        if figure != "device" or want >= measured["peak_reserved_bytes"]:
            out[figure] = (got / want - 1) * 100 if got else -100.0
    return out


def inexact(case: Case, answer: Case) -> list[str]:
    """What of the figures that must be exact is not."""
    pairs = {
        "parameters": ((answer.get("model") or {}).get("parameters"), case["measured"]["parameters"]),
        "cache_bytes": (answer.get("cache_bytes"), case["measured"].get("cache_bytes")),
    }
    return [f"{name} {got}, measured {want}" for name, (got, want) in pairs.items() if want is not None and got != want]


def summary(values: Collection[float]) -> dict[str, float]:
    """Median, 95th percentile and maximum of the errors' sizes."""
    ordered = sorted(map(abs, values)) or [0.0]
    return {"median": statistics.median(ordered), "p95": ordered[round(0.95 * (len(ordered) - 1))], "max": ordered[-1]}


def markdown(cases: list[Case], said: dict[str, Any]) -> str:
    """The errors by group, as README shows them."""
    lines = ["| | cases | allocated: median | 95 % | max | reserved: median | 95 % | device: median | 95 % |"]
    lines += ["| --- |" + " ---: |" * 8]
    for name in (*sorted({group(case) for case in cases}), "all"):
        off = [errors(case, said[case["id"]]) for case in cases if name in ("all", group(case))]
        cells = [str(len(off))]
        for figure in FIGURES:
            found = summary([o[figure] for o in off if figure in o])
            cells += [f"{found[k]:.2f}" for k in ("median", "p95", "max")[: 3 if figure == "peak_allocated" else 2]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truth", type=Path, default=TRUTH)
    parser.add_argument("--method", default="formula")
    parser.add_argument("--mode", default="", help="inference, train, lora or qlora; all without it")
    parser.add_argument("--only", default="", help="cases with this text in their id or group")
    parser.add_argument("--worst", type=int, default=10)
    parser.add_argument("--require", action="append", default=[])
    parser.add_argument("--markdown", action="store_true", help="print README's table as well")
    parser.add_argument("--accuracy", type=Path, help="put the device errors by group into this file (accuracy.json)")
    parser.add_argument("--hfvram", default=str(Path(sys.executable).with_name("hfvram")), help="the command to score")
    options = parser.parse_args()

    cases = [json.loads(line) for line in options.truth.read_text().splitlines()]
    cases = [c for c in cases if options.mode in ("", c["request"]["mode"]) and options.only in f"{c['id']} {group(c)}"]
    start = time.perf_counter()
    said = answers(cases, options.method, shlex.split(options.hfvram))
    took = time.perf_counter() - start

    by_group: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    rows, not_exact, refused = [], [], 0
    for case in cases:
        answer = said.get(case["id"]) or {"error": {"message": "no answer"}}
        why = (answer.get("error") or {}).get("message", "")
        refused += bool(why)
        not_exact += [f"{case['id']}: {what}" for what in inexact(case, answer)]
        off = errors(case, answer)
        rows.append((off["peak_allocated"], case, why))
        for name in (group(case), "all"):
            for figure, error in off.items():
                by_group[name][figure].append(error)

    print(f"{len(cases)} cases in {took:.1f} s, {refused} refused, {len(not_exact)} counts not exact\n")
    print(f"{'|error| in %':<22}{'n':>5}" + "".join(f"{f + ' median':>24}{'p95':>8}{'max':>8}" for f in FIGURES))
    for name in sorted(by_group, key=lambda n: (n == "all", n)):
        figures = by_group[name]
        cells = "".join(
            f"{s['median']:>24.2f}{s['p95']:>8.2f}{s['max']:>8.2f}" for s in map(summary, (figures[f] for f in FIGURES))
        )
        print(f"{name:<22}{len(figures['peak_allocated']):>5}{cells}")
    print("\nfurthest off in peak_allocated:")
    for error, case, why in sorted(rows, key=lambda r: -abs(r[0]))[: options.worst]:
        print(
            f"{error:>+9.2f} %  {case['measured']['peak_allocated_bytes'] / 2**30:>7.2f} GiB  {case['id']}  {why[:100]}"
        )
    for line in not_exact[: options.worst]:
        print(f"not exact: {line}")

    if options.markdown:
        print(f"\n{markdown(cases, said)}")
    if options.accuracy:
        table = {
            name: {"cases": len(off), "low": round(min(off) / 100, 4), "high": round(max(off) / 100, 4)}
            for name, figures in sorted(by_group.items())
            if name != "all" and (off := figures["device"])
        }
        methods = json.loads(options.accuracy.read_text()) | {options.method: table}
        rows = [[f"    {json.dumps(n)}: {json.dumps(row)}" for n, row in of.items()] for of in methods.values()]
        parts = (
            f"  {json.dumps(m)}: {{\n" + ",\n".join(lines) + "\n  }" for m, lines in zip(methods, rows, strict=True)
        )
        options.accuracy.write_text("{\n" + ",\n".join(parts) + "\n}\n")

    broken = []
    for bound in options.require:
        if bound == "exact":
            broken += not_exact[:1]
            continue
        figure, _, limits = bound.partition(":")
        got = summary(by_group["all"][figure])
        for limit in limits.split(","):
            name, _, most = limit.partition("=")
            if got[name] > float(most):
                broken.append(f"{figure} {name} {got[name]:.2f} % > {most} %")
    if options.require:
        print("\n" + ("falls short: " + "; ".join(broken) if broken else "every bound holds"))
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
