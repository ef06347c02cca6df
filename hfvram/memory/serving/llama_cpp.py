"""llama.cpp's plan: which tensors and caches stand on the GPU, which in CPU memory, and what computing takes.

Of L layers and the output layer the last `--n-gpu-layers` are on the GPU, cache and states with them; the input
embedding never is, so that a tied one stands twice. `--n-cpu-moe N` keeps the experts of the first N layers in CPU
memory, `--override-tensor REGEX=CPU` whatever a pattern finds. A buffer on the GPU begins each tensor at 128 bytes and
pads quantized rows to 512.

Source: llama.cpp b10635, src/llama-model.cpp (load_tensors), common/common.h (LLM_FFN_EXPS_REGEX),
ggml/src/ggml-cuda/ggml-cuda.cu (ggml_backend_cuda_buffer_type_get_alloc_size).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from hfvram.memory.serving.llama_cache import Cache, Cells, caches
from hfvram.memory.serving.llama_compute import compute_bytes
from hfvram.model.architecture import Architecture
from hfvram.read.checkpoint import StoredTensor
from hfvram.units import MiB

ALIGNMENT: Final = 128
ROW: Final = 512
CONTEXT_BYTES: Final = 264 * MiB
"""CUDA's context and what ggml's backend loads: 248 MiB seen on an RTX 5070 Ti after the backend's start, 264 by a fit
(a published table, CUDA 13, b10277). Larger GPUs have larger ones: a PyTorch process on an H100 has 527."""
LARGEST_CONTEXT_BYTES: Final = 620 * MiB

_BLOCK = re.compile(r"blk\.(\d+)\.")
_EXPERTS = re.compile(r"\.ffn_(up|down|gate|gate_up)_(ch|)exps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How llama.cpp is started. `gpu_layers` None is all of them, and the output layer."""

    cells: Cells
    keys: str = "f16"
    values: str = "f16"
    gpu_layers: int | None = None
    cpu_moe: int = 0
    overrides: tuple[str, ...] = ()
    """Patterns of tensors that stay in CPU memory."""
    scores: bool = False
    """Without flash attention."""


@dataclass(frozen=True, slots=True, eq=False)
class LlamaPlan:
    """What stands where. Tensors and caches on the GPU are those of `on_gpu`; the rest is in CPU memory."""

    on_gpu: tuple[StoredTensor, ...]
    on_cpu: tuple[StoredTensor, ...]
    gpu_caches: tuple[Cache, ...]
    cpu_caches: tuple[Cache, ...]
    padding_bytes: int
    """Between tensors, and behind quantized rows."""
    compute_low_bytes: int
    compute_bytes: int
    compute_high_bytes: int
    gpu_layers: int
    """With the output layer."""
    copied_bytes: int
    """Of an embedding that stands a second time as the output layer."""

    @property
    def weights_bytes(self) -> int:
        return sum(t.nbytes for t in self.on_gpu)

    @property
    def cache_bytes(self) -> int:
        return sum(c.nbytes for c in self.gpu_caches)

    @property
    def allocated_bytes(self) -> int:
        return self.weights_bytes + self.padding_bytes + self.cache_bytes + self.compute_bytes

    @property
    def device_bytes(self) -> int:
        return self.allocated_bytes + CONTEXT_BYTES

    @property
    def cpu_bytes(self) -> int:
        return sum(t.nbytes for t in self.on_cpu) + sum(c.nbytes for c in self.cpu_caches)


def plan(a: Architecture, tensors: Sequence[StoredTensor], o: Options) -> LlamaPlan:
    """Place every tensor and every layer's cache, and add what the graph takes."""
    layers = len(a.text.layers)
    gpu_layers = layers + 1 if o.gpu_layers is None else min(o.gpu_layers, layers + 1)
    first = layers + 1 - gpu_layers
    patterns = [re.compile(p) for p in o.overrides]
    on_gpu: list[StoredTensor] = []
    on_cpu: list[StoredTensor] = []
    for t in (*tensors, *_copies(a, tensors)):
        block = _BLOCK.match(t.name)
        if block and int(block[1]) >= layers:
            continue  # layers for predicting several tokens ahead are not loaded
        at = int(block[1]) if block else -1 if _is_input(t.name) else layers
        moe = at >= 0 and at < o.cpu_moe and _EXPERTS.search(t.name)
        gpu = at >= first and gpu_layers > 0 and not moe and not any(p.search(t.name) for p in patterns)
        (on_gpu if gpu else on_cpu).append(t)
    kept = tuple(caches(a, o.cells, o.keys, o.values))
    low, likely, high = compute_bytes(a, o.cells, o.scores)
    return LlamaPlan(
        on_gpu=tuple(on_gpu),
        on_cpu=tuple(on_cpu),
        gpu_caches=tuple(c for c in kept if c.layer >= first),
        cpu_caches=tuple(c for c in kept if c.layer < first),
        padding_bytes=sum(map(_padding, on_gpu)),
        compute_low_bytes=low,
        compute_bytes=likely,
        compute_high_bytes=high,
        gpu_layers=gpu_layers,
        copied_bytes=sum(t.nbytes for t in _copies(a, tensors)),
    )


def _copies(a: Architecture, tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
    """The output layer of a model that has none of its own: the embedding once more."""
    if not a.tied_head:
        return []
    return [StoredTensor("output.weight", t.dtype, t.shape, t.nbytes) for t in tensors if t.name == "token_embd.weight"]


def _is_input(name: str) -> bool:
    return name.startswith(("token_embd", "per_layer_token_embd", "position_embd", "token_types"))


def _padding(t: StoredTensor) -> int:
    """What a buffer adds to a tensor."""
    more = 0
    if t.dtype not in ("F32", "F16", "BF16") and t.shape and (rest := t.shape[-1] % ROW):
        elements = 1
        for size in t.shape:
            elements *= size
        more = t.nbytes * (ROW - rest) // elements
    return -(-(t.nbytes + more) // ALIGNMENT) * ALIGNMENT - t.nbytes
