#!/usr/bin/env python3
"""How many requests a second `hfvram batch` answers, by formula and in one process.

    python benchmarks/batch.py [--count 2000] [--only TEXT] [--by-model] [--at-least 300]

Every model of the catalogue in turn, with contexts from 512 to 131,072 tokens and batches from 1 to 64. The first
answer for a model reads it, later ones don't. Exit 1 below --at-least requests a second.
"""

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from itertools import cycle, islice, product
from pathlib import Path

CATALOGUE = Path(__file__).parents[1] / "hfvram" / "read" / "catalogue.json"


def requests(count: int, only: str, verdicts: bool) -> list[bytes]:
    """Lines for `hfvram batch`: the same ones at every run."""
    models = [name for name in json.loads(CATALOGUE.read_bytes())["models"] if only in name]
    sizes = product((512, 2048, 4096, 8192, 32768, 131072), (1, 2, 8, 64))
    gpus = (None,) if not verdicts else ("H100", "24GB")
    made = zip(cycle(models), cycle(sizes), cycle(gpus), strict=False)
    return [
        json.dumps({"id": i, "model": model, "ctx": ctx, "batch": batch, "gpu": gpu}).encode()
        for i, (model, (ctx, batch), gpu) in enumerate(islice(made, count))
    ]


def main() -> int:
    """Answer them all and print the rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--only", default="", help="models with this text in their id")
    parser.add_argument("--verdicts", action="store_true", help="each with a GPU: fit, limits and ways")
    parser.add_argument("--by-model", action="store_true", help="the slowest models")
    parser.add_argument("--at-least", type=float, default=0)
    options = parser.parse_args()

    os.environ["HF_HUB_OFFLINE"] = "1"
    from hfvram.show.batch import answer_line
    from hfvram.show.json import dumps

    lines = requests(options.count, options.only, options.verdicts)
    spent: dict[str, list[float]] = defaultdict(list)
    start, failed = time.process_time(), 0
    for line in lines:
        before = time.process_time()
        answer = answer_line(line)
        dumps(answer, None)
        spent[answer["model"]["id"]].append(time.process_time() - before)
        failed += answer["error"] is not None
    took = time.process_time() - start
    rate = len(lines) / took
    print(f"{len(lines):,} requests in {took:.2f} s of one core: {rate:,.0f} a second; {failed} failed")
    if options.by_model:
        for model, times in sorted(spent.items(), key=lambda s: -sum(s[1]))[:20]:
            print(f"{sum(times) / len(times) * 1000:8.2f} ms each, the first {times[0] * 1000:8.2f} ms  {model}")
    return rate < options.at_least


if __name__ == "__main__":
    sys.exit(main())
