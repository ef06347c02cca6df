"""Transformers' offloaded, quantized and static caches on meta: what CUDA does with them that meta does not.

The offloaded one keeps a layer's keys and values in CPU memory, and fetches the next layer's on a stream of its own:
they come from that stream's pool. The quantized one keeps 4 bits in groups of 64 with a scale and a shift each, but for
the last 128 tokens; quanto, its default backend, is written here by what it allocates, whether installed or not.
Source: transformers 5.17, cache_utils.py (`Cache.update`, `prefetch`, `QuantizedLayer`); optimum-quanto 0.2.7,
tensor/optimizers/max_optimizer.py, library/quantize.py, tensor/packed.py, tensor/qbits.py. Not measured.

With a static one, `generate` compiles its decoding on a GPU by itself, in the mode that records CUDA graphs: these
allocate from a pool of their own, and nothing that the prefill freed serves them. What runs here is not compiled, which
frees earlier in places and keeps copies of windows longer: the reserved memory of the two measured cases comes out
0.2 % too high and 5 % too low (without this 2 % and 9 % too low).
Source: transformers 5.17, generation/utils.py (`_valid_auto_compile_criteria`), `CompileConfig.mode`; PyTorch 2.11,
_inductor/cudagraph_trees.py.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Final
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import cache_utils
from transformers.generation import GenerationMixin

from hfvram.errors import HfvramError
from hfvram.memory.allocator import GRAPHS, PREFETCH
from hfvram.memory.exact.run import Run
from hfvram.request import Request

BITS: Final = 4
DECODING: Final = "_optimize_model_for_decode"


class Pool:
    """What is allocated inside comes from the pool of this stream: stands for the cache's `torch.Stream`, too."""

    def __init__(self, run: Run, stream: int) -> None:
        self.tracker = run.tracker
        self.stream = stream
        self.before: list[int] = []

    def __enter__(self) -> None:
        self.before.append(self.tracker.stream)
        self.tracker.stream = self.stream

    def __exit__(self, *_: Any) -> None:
        self.tracker.stream = self.before.pop()


class DefaultStream:
    """Stands for the device's own stream, which only ever waits."""

    def wait_stream(self, stream: Any) -> None:
        """Nothing runs, so nothing is waited for."""


class ToHost(TorchDispatchMode):  # type: ignore[misc]
    """Lets a meta tensor go to CPU memory: what is there has its shape, and no memory behind it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "meta":
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == "cpu":
                return torch.empty((), dtype=kwargs.get("dtype") or args[0].dtype).expand(args[0].shape)
        return func(*args, **kwargs)


class QuantoLayer(cache_utils.QuantizedLayer):  # type: ignore[misc]
    """`QuantoQuantizedLayer`, with quanto's operations in place of quanto."""

    def _quantize(self, tensor: Any, axis: int) -> Any:
        """Groups along the last dimension: codes of 4 bits in pairs of rows, and each row's scale and shift."""
        if tensor[0].numel() % self.q_group_size:
            size = f"a cache layer of {tensor[0].numel()} elements"
            raise ValueError(f"QuantizedCache: {size} is not divisible by its group size {self.q_group_size}")
        groups = tensor.reshape(-1, self.q_group_size)
        low, high = torch.amin(groups, 1, keepdim=True), torch.amax(groups, 1, keepdim=True)
        scale, shift = (high - low) / (2**BITS - 1), -low
        codes = self._codes(groups, scale, shift)
        half = -(-codes.shape[0] // 2)
        packed = torch.zeros((half, self.q_group_size), dtype=torch.uint8, device=codes.device)
        for n, rows in enumerate((codes[:half], codes[half:])):
            packed[: rows.shape[0]] |= rows << (BITS * n)
        return tensor.shape, packed, scale, shift

    @staticmethod
    def _codes(groups: Any, scale: Any, shift: Any) -> Any:
        rounded = torch.round((groups + shift) / scale)
        return torch.clamp(rounded, min=0, max=2**BITS - 1).to(torch.uint8)

    def _dequantize(self, q_tensor: Any) -> Any:
        shape, packed, scale, shift = q_tensor
        codes = packed.new_empty((2 * packed.shape[0], packed.shape[1]))[: scale.shape[0]]
        values = scale * codes
        values -= shift
        return values.reshape(shape)


def compiled(run: Run) -> Any:
    """Where `generate` decodes: with the memory of CUDA graphs."""
    inner = getattr(GenerationMixin, DECODING)

    @contextlib.contextmanager
    def decoding(model: Any) -> Iterator[None]:
        with Pool(run, GRAPHS), inner(model):
            yield

    return decoding


@contextlib.contextmanager
def caches(run: Run, request: Request) -> Iterator[None]:
    """What the cache that is asked for needs while `generate` runs. Raises `usage` where the model can't have it."""
    kind = request.cache
    with contextlib.ExitStack() as stands:
        if kind == "offloaded":
            stands.enter_context(patch.object(torch, "Stream", lambda: Pool(run, PREFETCH)))
            stands.enter_context(patch.object(torch.cuda, "default_stream", lambda device=None: DefaultStream()))
            stands.enter_context(ToHost())
        elif kind == "quantized":
            stands.enter_context(patch.object(cache_utils, "QuantoQuantizedLayer", QuantoLayer))
        elif kind == "static" and request.quant not in ("nf4", "fp4", "int8"):  # bitsandbytes does not compile
            stands.enter_context(patch.object(GenerationMixin, DECODING, compiled(run)))
        try:
            yield
        except ValueError as error:
            if kind == "quantized" and "quantizedcache" in str(error).lower().replace(" ", "").replace("`", ""):
                raise HfvramError("usage", f"--cache quantized: {' '.join(str(error).split())}") from error
            raise


def grow(cache: Any, tokens: int) -> bool:
    """Keys and values of so many tokens more, for each layer that keeps any; whether one does.

    A quantized layer packs all but what would be left after the last time that it is full.
    """
    grown = False
    for number, layer in enumerate(cache.layers):
        kept: list[Any] = [getattr(layer, name, None) for name in ("keys", "values")]
        if not all(isinstance(t, torch.Tensor) and t.dim() == 4 for t in kept):
            continue
        parts = [tokens]
        if isinstance(layer, QuantoLayer):
            full = layer.residual_length
            rest = (kept[0].shape[2] + tokens) % full
            parts = [tokens - rest, rest] if rest < tokens else [tokens]
        for n, part in enumerate(parts):
            if len(parts) > 1:
                layer.residual_length = full if n else 0
            cache.update(*[t.new_empty((*t.shape[:2], part, t.shape[3]), device="meta") for t in kept], number)
        grown = True
    return grown
