#!/usr/bin/env python3
"""How long the first command takes over a Hub that answers after 50 ms, and how much it asks for.

    python benchmarks/first_command.py [--latency 0.05] [--runs 5] [--hfvram COMMAND] [--check]

The Hub is the tests' own, over real HTTP on loopback, with Mixtral's 19 shards, their real tensors and the repository's
other files. Each command is a process of its own; figures are the least of its runs, own time is user and system. Where
hf-mem is installed it answers the same from the same Hub, its address rewritten. With --check, exit 1 where a bound
does not hold.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from hub import FakeHub, Repo, Sparse, safetensors

NAME = "mistralai/Mixtral-8x7B"
ASKED = ["--mode", "inference", "--ctx", "8192"]
SHARD_BYTES = 4_950_000_000
BOUNDS = {"cold": (1.0, None, 30, 1_000_000), "cached": (None, 0.5, 1, None), "--help": (0.2, None, 0, None)}
"""Most wall seconds, own seconds, requests and bytes."""

# huggingface.co is written into hf-mem: its client sends every request to the address in HUB instead
HF_MEM = """
import os, httpx2
from hf_mem.cli import main
send = httpx2.AsyncHTTPTransport.handle_async_request
async def rewritten(self, request):
    if request.url.host == "huggingface.co":
        scheme, _, address = os.environ["HUB"].partition("://")
        host, _, port = address.partition(":")
        request.url = request.url.copy_with(scheme=scheme, host=host, port=int(port))
        request.headers["Host"] = address
    return await send(self, request)
httpx2.AsyncHTTPTransport.handle_async_request = rewritten
main()
"""


def mixtral() -> Repo:
    """mistralai/Mixtral-8x7B-v0.1 as its repository is: 995 tensors in 19 shards."""
    from hfvram.read.catalogue import lookup

    entry = lookup(f"{NAME}-v0.1")
    assert entry
    tensors: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (32000, 4096))]
    for i in range(32):
        layer = f"model.layers.{i}"
        tensors += [(f"{layer}.self_attn.{n}_proj.weight", (4096 if n in "qo" else 1024, 4096)) for n in "qkvo"]
        tensors += [(f"{layer}.block_sparse_moe.gate.weight", (8, 4096))]
        for expert in range(8):
            shapes = {"w1": (14336, 4096), "w2": (4096, 14336), "w3": (14336, 4096)}
            tensors += [(f"{layer}.block_sparse_moe.experts.{expert}.{w}.weight", s) for w, s in shapes.items()]
        tensors += [(f"{layer}.{n}_layernorm.weight", (4096,)) for n in ("input", "post_attention")]
    tensors += [("model.norm.weight", (4096,)), ("lm_head.weight", (32000, 4096))]
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    held = 0
    for name, shape in tensors:
        nbytes = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        if held + nbytes > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = ("BF16", shape)
        held += nbytes
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    index = {"metadata": {}, "weight_map": {t: n for n, shard in zip(names, shards, strict=True) for t in shard}}
    config = dict(entry.config)
    files: dict[str, bytes | Sparse] = {n: safetensors(s) for n, s in zip(names, shards, strict=True)}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    files["config.json"] = json.dumps(config).encode()
    files["generation_config.json"] = b'{"bos_token_id": 1, "eos_token_id": 2, "_from_model_config": true}'
    files |= dict.fromkeys((".gitattributes", "README.md", "tokenizer.json", "tokenizer_config.json"), b"{}")
    return Repo(files)


def with_listing(hub: FakeHub) -> None:
    """Let the Hub list a repository's files with their sizes, as hf-mem asks."""
    plain = hub.server.RequestHandlerClass

    class Listing(plain):  # type: ignore[misc, valid-type]
        def route(self) -> None:
            words = urlsplit(self.path).path.strip("/").split("/")
            if words[:2] != ["api", "models"] or "tree" not in words:
                return super().route()
            files = hub.repos["/".join(words[2 : words.index("tree")])].files
            sizes = {n: len(f) if isinstance(f, bytes) else f.size for n, f in files.items()}
            return self.json([{"type": "file", "path": n, "size": s, "oid": "0"} for n, s in sizes.items()])

    hub.server.RequestHandlerClass = Listing


def timed(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """Wall and own seconds of a process that must succeed."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, check=False)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:3])}: {done.stderr.strip()[-500:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    """Run every command some times and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds before the Hub answers (0.05)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--hfvram", default=str(Path(sys.executable).with_name("hfvram")), help="the command to time")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()

    hfvram = options.hfvram
    hf_mem = [sys.executable, "-c", HF_MEM, "--model-id", f"{NAME}-v0.1", "--experimental", "--max-model-len", "8192"]
    print(f"{'':28}{'wall s':>8}{'own s':>8}{'requests':>10}{'bytes':>10}")
    broken = []
    with FakeHub({f"{NAME}-v0.1": mixtral()}, latency=options.latency) as hub, tempfile.TemporaryDirectory() as folder:
        with_listing(hub)
        kept = Path(folder) / "kept"

        def row(name: str, command: list[str], fresh: bool, **env: str) -> None:
            found = []
            for i in range(options.runs):
                home = Path(folder) / f"{name}{i}" if fresh else kept
                hub.log.clear()
                wall, own = timed(command, {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HUB": hub.url, **env})
                found.append((wall, own, len(hub.log), sum(a.sent for a in hub.log)))
            best = [min(column) for column in zip(*found, strict=True)]
            print(f"{name:28}{best[0]:8.2f}{best[1]:8.2f}{best[2]:10,}{best[3]:10,}")
            most = BOUNDS.get(name, (None,) * 4)
            broken.extend(f"{name}: {m:,.2f} > {b}" for m, b in zip(best, most, strict=True) if b and m > b)

        row("cold", [hfvram, NAME, *ASKED], True)
        row("cold, exact id", [hfvram, f"{NAME}-v0.1", *ASKED], True)
        timed([hfvram, NAME, *ASKED], {"HF_HOME": str(kept), "HF_ENDPOINT": hub.url})
        row("cached", [hfvram, NAME, *ASKED], False)
        row("cached, offline", [hfvram, NAME, *ASKED, "--offline"], False)
        row("catalogue, offline", [hfvram, NAME, *ASKED, "--offline"], True)
        row("--help", [hfvram, "--help"], False)
        row("python alone", [sys.executable, "-c", ""], False)
        try:
            row("hf-mem", hf_mem, True)
        except SystemExit as why:
            print(f"hf-mem: {str(why).splitlines()[-1]}")
    print("\n".join(["", *broken]) if broken else "\nevery bound holds")
    return bool(broken) and options.check


if __name__ == "__main__":
    sys.exit(main())
