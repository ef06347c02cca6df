#!/usr/bin/env python3
"""Which of transformers' model types the exact engine can run, each at its default configuration: docs/coverage.md.

    python scripts/coverage.py [--only TYPE ...] [--jobs N]

For each model type that transformers registers for a task, the task's class is built on the meta device, run once for
inference (`generate` where it can) and trained for two steps with AdamW. Deep stacks and wide layers of
experts are cut, of all types alike (coverage_attempts.py). Each class has a process of its own, a time limit and a
memory limit. With `--only` the results are printed, and nothing is written.
"""

import argparse
import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import transformers
from coverage_attempts import CTX, DEPTH, EXPERTS, STAGES, Case, attempt
from transformers.models.auto import modeling_auto as auto

OUT = Path(__file__).parents[1] / "docs" / "coverage.md"
TASKS = {
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_TO_SEQ_CAUSAL_LM",
    "masked": "MASKED_LM",
    "image-text-to-text": "IMAGE_TEXT_TO_TEXT",
    "multimodal": "MULTIMODAL_LM",
    "speech-to-text": "SPEECH_SEQ_2_SEQ",
    "ctc": "CTC",
}
SECONDS = 60
OTHERWISE = "It runs in fp32, with more tokens, with what its default leaves open, or at a published configuration."
MEMORY_BYTES = 12 << 30
Results = dict[str, dict[str, str]]
"""By stage: why it fails, or nothing, and how it ran where not at the default."""


def cases() -> Iterator[Case]:
    """Every class of every task."""
    for task, table in TASKS.items():
        for kind, names in getattr(auto, f"MODEL_FOR_{table}_MAPPING_NAMES").items():
            for name in [names] if isinstance(names, str) else names:
                yield Case(task, kind, name)


def child(case: Case, pipe: Any) -> None:
    """All stages of a case, in its own process."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    for stage in STAGES:
        pipe.send((stage, found := attempt(case, stage)))
        if stage == "build" and found["why"]:
            return


def results(wanted: list[Case], jobs: int) -> Iterator[tuple[Case, Results]]:
    """Cases and how they went, as they are done."""
    fork = multiprocessing.get_context("fork")
    rest, running = wanted[::-1], dict[Any, tuple[Case, Any, Results, float]]()
    while rest or running:
        while rest and len(running) < jobs:
            case = rest.pop()
            ours, theirs = fork.Pipe(duplex=False)
            process = fork.Process(target=child, args=(case, theirs), daemon=True)
            process.start()
            theirs.close()
            running[ours] = case, process, {}, time.monotonic()
        ready = wait(list(running), timeout=1)
        for pipe, (case, process, found, since) in list(running.items()):
            late = pipe not in ready
            if late and time.monotonic() - since <= SECONDS:
                continue
            if not late:
                try:
                    stage, found[stage] = pipe.recv()
                    running[pipe] = case, process, found, time.monotonic()
                    continue
                except EOFError:
                    pass
            process.kill()
            process.join()
            del running[pipe]
            yield case, filled(found, f"more than {SECONDS} s" if late else f"its process ended ({process.exitcode})")


def filled(found: Results, otherwise: str) -> Results:
    """All stages: what didn't come to an answer fails for the reason of the build, or for this one."""
    why = found.get("build", {}).get("why") or otherwise
    return {stage: found.get(stage, {"why": why, "how": ""}) for stage in STAGES}


def table(head: str, rows: list[str]) -> list[str]:
    """A Markdown table."""
    return [f"| {head} |", "|" + "---|" * (head.count("|") + 1), *rows, ""]


def document(found: dict[Case, Results]) -> str:
    """docs/coverage.md."""
    versions = f"torch {torch.__version__.partition('+')[0]} and transformers {transformers.__version__}"
    lines = [
        "# What the exact engine runs",
        "",
        f"Written by `scripts/coverage.py` with {versions}: every class that",
        "transformers registers for these tasks, at the default configuration of its model type (layers cut to",
        f"{DEPTH}, experts to {EXPERTS}), on the meta device, with {CTX} tokens in bf16. Inference is `generate` where",
        "the class can, else one pass; training is two steps of AdamW. A class is given text alone where it runs on",
        "that, else pictures or sound of the sizes of its configuration, too. Where code asks what is in a tensor,",
        "the answer is assumed: `hfvram/memory/exact/data_dependent.py` says what.",
        "",
    ]
    rows = []
    for task in (*TASKS, "all"):
        mine = [r for c, r in found.items() if task in (c.task, "all")]
        ran = [sum(not r[stage]["why"] for r in mine) for stage in STAGES]
        rows.append(f"| {task} | {' | '.join(f'{n} of {len(mine)}' for n in ran)} |")
    lines += table("task | built | inference | training", rows)
    failures, otherwise = [], []
    for case, stages in found.items():
        by_reason: dict[str, list[str]] = {}
        for stage in STAGES:
            if (why := stages[stage]["why"]) and (stage == "build" or not stages["build"]["why"]):
                by_reason.setdefault(why, []).append(stage)
        row = f"`{case.kind}` | {case.task}"
        failures += [(why, f"| {row} | {', '.join(s)} | {why.replace('|', '/')} |") for why, s in by_reason.items()]
        for how in sorted({stages[stage]["how"] for stage in STAGES} - {""}):
            which = ", ".join(stage for stage in STAGES if stages[stage]["how"] == how)
            otherwise.append((how, f"| {row} | {which} | {how} |"))
    lines += ["## What doesn't run", "", "What can't be built can't be run either.", ""]
    lines += table("model type | task | fails at | reason", [line for _, line in sorted(failures)])
    lines += ["## What doesn't run at its default", "", OTHERWISE, ""]
    lines += table("model type | task | stage | run", [line for _, line in sorted(otherwise)])
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Run all, or print some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="TYPE")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    wanted = [case for case in cases() if not options.only or case.kind in options.only]
    found: dict[Case, Results] = {}
    for case, stages in results(wanted, options.jobs):
        found[case] = stages
        for stage, went in stages.items():
            if options.only or went["why"]:
                print(case.task, case.kind, stage, went["why"] or "runs " + went["how"], sep="  ", flush=True)
    if not options.only:
        OUT.write_text(document({case: found[case] for case in wanted}))


if __name__ == "__main__":
    main()
