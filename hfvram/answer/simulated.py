"""The exact engine's answers: run once, then kept by configuration, request, versions and the engine's own code."""

import hashlib
import json
import sys
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from hfvram import __version__
from hfvram.answer.estimate import Item, LiveTensor, Offloaded, PhasePeak
from hfvram.answer.peak import AtPeak, at_peak
from hfvram.errors import HfvramError
from hfvram.memory.timeline import Timeline
from hfvram.memory.weights import computed
from hfvram.model.identify import Model
from hfvram.read import cache as disk
from hfvram.request import Request

SHELF = "simulated"
"""Where the answers lie in hfvram's folder of the Hugging Face cache."""
RESTS_ON = (
    *("answer/items.py", "answer/largest.py", "answer/peak.py", "model/meta.py"),
    *(f"memory/{name}.py" for name in ("allocator", "bitsandbytes", "cuda_kernels", "expandable", "generation")),
    *("memory/timeline.py", "memory/weights.py"),
)
"""What else than the engine an answer rests on."""
VERDICT = "gpu", "max_ctx", "max_batch", "recommend", "method", "allow_unknown"
"""Options that change nothing about what runs."""


def simulated(model: Model, request: Request) -> AtPeak:
    """Run a resolved request on meta, or find what it gave before. Raises `missing_extra` without torch."""
    key = key_of(model, request)
    if (kept := disk.load(SHELF, key)) is not None:
        return _restored(kept)
    found = at_peak(run(model, request), request.expandable_segments)
    disk.store(SHELF, key, asdict(found))
    return found


def run(model: Model, request: Request) -> Timeline:
    """Run a resolved request on meta, whatever is kept. Raises `missing_extra` without torch."""
    from hfvram.memory.exact.simulate import simulate

    asked = request.with_(quant="none") if computed(model.architecture, request) == "none" else request
    return simulate(model.checkpoint.config, model.architecture.class_name, asked)


def _restored(kept: dict[str, Any]) -> AtPeak:
    items = tuple(Item(**item) for item in kept["items"])
    tensors = (LiveTensor(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in kept["largest_tensors"])
    phases = tuple(PhasePeak(**phase) for phase in kept["phases"])
    elsewhere = tuple(Offloaded(**item) for item in kept["offloaded"])
    told = {"items": items, "largest_tensors": tuple(tensors), "phases": phases, "offloaded": elsewhere}
    return AtPeak(**{**kept, **told})


@cache
def versions() -> dict[str, str]:
    """Of what is installed and runs. Raises `missing_extra` where something isn't."""
    found = {"hfvram": __version__}
    for package in ("transformers", "torch"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError as error:
            message = f"--method simulate needs {package}: pip install 'hfvram[exact]'"
            raise HfvramError("missing_extra", message) from error
    return found


def key_of(model: Model, request: Request) -> str:
    """What tells one run from every other."""
    asked = {k: v for k, v in request.to_dict().items() if k not in VERDICT}
    told: list[Any] = [model.checkpoint.config, model.architecture.class_name, asked, versions(), _code()]
    told.append(f"{sys.version_info.major}.{sys.version_info.minor}")
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


@cache
def _code() -> str:
    """A digest of the engine: other rules are other answers."""
    package = Path(__file__).parents[1]
    files = [*sorted((package / "memory" / "exact").glob("*.py")), *(package / name for name in RESTS_ON)]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
