"""The fused kernels of state spaces: mamba-ssm, causal-conv1d and flash-linear-attention, as they allocate.

None of them runs on meta, and transformers takes its slow path where they aren't installed. Here they stand in for the
functions that transformers calls, by the kernels' own names and by its own. Mamba's are in `selective_scan`, Mamba-2's
in `chunk_scan`. Sources: causal-conv1d 1.5; flash-linear-attention 0.3.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import transformers

from hfvram.errors import HfvramError
from hfvram.memory.exact.chunk_scan import Tune, chunk_scan, contiguous, split_scan
from hfvram.memory.exact.kernels import empty
from hfvram.memory.exact.selective_scan import alike, inner, selective_scan
from hfvram.memory.timeline import Tag

if TYPE_CHECKING:
    from hfvram.memory.exact.run import Run

TUNING = Tag("Triton's autotuner", "workspace", "256 MiB that clear the L2 cache", "Triton 3: testing.py do_bench")
TUNING_BYTES = 256 << 20
TRANSFORMERS = tuple(int(part) for part in transformers.__version__.split(".")[:2])
FALLBACKS = ("slow_forward", "torch_forward")
"""The methods of a layer that can do without its kernels."""


def tuner(run: "Run") -> Tune:
    """The first launch of a Triton kernel for these sizes: its variants are timed, and a buffer is held meanwhile."""

    def tune(*kernel: object) -> None:
        timeline = run.timeline
        if kernel not in timeline.tuned:
            timeline.tuned.add(kernel)
            timeline.moment(TUNING, TUNING_BYTES)

    return tune


class Convolution(torch.autograd.Function):  # type: ignore[misc]
    """The causal convolution, activation included: the output has the input's layout."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any) -> Any:
        x = x if x.stride(2) == 1 or x.stride(1) == 1 else x.contiguous()
        ctx.save_for_backward(x, weight, bias)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return tuple(alike(saved) for saved in ctx.saved_tensors)


def convolution(x: Any, weight: Any, bias: Any = None, *_: Any, **__: Any) -> Any:
    """`causal_conv1d_fn` of x (b, d, s)."""
    return Convolution.apply(x, weight, bias)


def same_shape(x: Any, *_: Any, **__: Any) -> Any:
    """`causal_conv1d_update` of x: the state is updated in place."""
    return torch.empty_like(x)


def state_update(state: Any, x: Any, *_: Any, **__: Any) -> Any:
    """`selective_state_update`: the state is updated in place."""
    return torch.empty_like(x)


def delta_rule(tune: Tune) -> Callable[..., Any]:
    """`chunk_gated_delta_rule` without gradients: q and k normalized, the gate's sums, scores of 64 tokens and their
    inverse, w and u, the state of every chunk, corrected values, output, last state.

    Triton times the variants of each of its kernels at the first launch, the last one beside all of these.
    """

    def rule(
        query: Any, key: Any, value: Any, g: Any = None, beta: Any = None, output_final_state: bool = False, **_: Any
    ) -> Any:
        (b, s, _, d_k), (h, d_v) = key.shape, value.shape[2:]
        normed = [contiguous(t) for t in (query, key)]
        sums, scores = empty(b, s, h), empty(b, s, h, 64)
        tune("delta rule, scores", h, d_k)
        inverse = empty(b, s, h, 64, dtype=key.dtype)
        tune("delta rule, inverse", h)
        del scores
        w, u = empty(b, s, h, d_k, dtype=key.dtype), contiguous(value)
        tune("delta rule, w and u", h, d_k, d_v)
        states = empty(b, -(-s // 64), h, d_k, d_v, dtype=key.dtype)
        last = empty(b, h, d_k, d_v)
        corrected = contiguous(u)
        tune("delta rule, states", h, d_k, d_v)
        out = contiguous(u)
        tune("delta rule, output", h, d_k, d_v)
        del normed, sums, inverse, w, states, corrected
        return out, (last if output_final_state else None)

    return rule


def delta_step(query: Any, key: Any, value: Any, *_: Any, **options: Any) -> Any:
    """`fused_recurrent_gated_delta_rule`: output and a new state."""
    out, state = contiguous(value), empty(*value.shape[::2], key.shape[-1], value.shape[-1])
    return out, (state if options.get("output_final_state") else None)


def kernels(run: "Run", gradients: bool) -> dict[str, Callable[..., Any]]:
    """What stands in for each function, by its names in transformers and in the packages.

    The delta rule's kernels are known without gradients only: training keeps to transformers' own.
    """
    tune = tuner(run)
    chunked, split = chunk_scan(tune), split_scan(tune, run)
    delta = {"chunk_gated_delta_rule": delta_rule(tune), "fused_recurrent_gated_delta_rule": delta_step}
    delta |= {f"torch_{name}": rule for name, rule in delta.items()}
    return ({} if gradients else delta) | {
        "causal_conv1d_fn": convolution,
        "causal_conv1d_update": same_shape,
        "mamba_inner_fn": inner(run),
        "mamba_selective_scan": selective_scan,
        "selective_scan_fn": selective_scan,
        "mamba_selective_state_update": state_update,
        "mamba2_selective_state_update": state_update,
        "selective_state_update": state_update,
        "mamba2_chunk_scan": chunked,
        "mamba_chunk_scan_combined": chunked,
        "mamba2_split_conv1d_scan_combined": split,
        "mamba_split_conv1d_scan_combined": split,
    }


@contextlib.contextmanager
def fused(run: "Run", model: Any, gradients: bool) -> Iterator[None]:
    """The kernels as if installed, for this model's code. Raises `usage` where transformers calls them otherwise."""
    if TRANSFORMERS < (5, 17) and any(hasattr(module, name) for module in model.modules() for name in FALLBACKS):
        raise HfvramError("usage", "--kernels fused with --method simulate needs transformers 5.17 or newer")
    stand_ins, undo = kernels(run, gradients), list[tuple[dict[str, Any], str, Any]]()
    for name in {type(module).__module__ for module in model.modules()}:
        code = vars(sys.modules[name])
        for function in code.keys() & stand_ins.keys():
            undo.append((code, function, code[function]))
            code[function] = stand_ins[function]
    try:
        yield
    finally:
        for code, function, own in undo:
            code[function] = own
