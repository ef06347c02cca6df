"""Fine-grained fp8 by transformers' own code: its linear layers and experts, with stand-ins for their Triton kernels.

A checkpoint that says so is loaded in fp8 as it is stored; `--quant fp8` makes the same of one that is not. Source:
transformers 5.17, integrations/finegrained_fp8.py; the kernels quantize their inputs as they read them and write
nothing but the product. DeepGEMM, which it prefers where that is installed, is not modelled.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from hfvram.errors import HfvramError
from hfvram.memory.exact.build import in_order
from hfvram.memory.exact.kernels import empty

if TYPE_CHECKING:
    from hfvram.memory.exact.run import Run
    from hfvram.request import Request


def load_fp8(run: "Run", model: Any, config: Mapping[str, Any], request: "Request") -> None:
    """Replace what transformers' quantizer replaces; what stands is as if it had been built so.

    Raises `usage` for training, which it refuses, and for formats of fp8 that are other code's.
    """
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.utils.quantization_config import FineGrainedFP8Config

    if request.mode != "inference":
        raise HfvramError("usage", "transformers can't train fp8 weights: valid are --quant none, nf4, fp4 and int8")
    stored = config.get("quantization_config")
    if stored is not None and (not isinstance(stored, Mapping) or stored.get("quant_method") != "fp8"):
        raise HfvramError("usage", "--method simulate knows fp8 as quant_method 'fp8' stores it: use --method formula")
    quantizer = AutoHfQuantizer.from_config(stored or FineGrainedFP8Config(), pre_quantized=stored is not None)
    quantizer._process_model_before_weight_loading(model)
    quantizer._process_model_after_weight_loading(model)
    for name, parameter in model.named_parameters():
        parameter._hfvram_scale = "_scale" in name
    run.tracker.start_over(in_order(model))


@contextlib.contextmanager
def fp8_kernels() -> Iterator[None]:
    """What stands in for the Triton kernels while a model runs."""
    from transformers.integrations import finegrained_fp8 as fp8

    with patch.object(fp8, "_FINEGRAINED_FP8", fp8.FineGrainedFP8(linear, batched, grouped)):
        yield


def linear(x: Any, weight: Any, scales: Any, block: Any = None, dtype: Any = None, **_: Any) -> Any:
    """(…, K) by (N, K): (…, N), in the inputs' dtype."""
    return empty(*x.shape[:-1], weight.shape[0], dtype=dtype or x.dtype)


def batched(x: Any, weight: Any, scales: Any, **_: Any) -> Any:
    """(S, K) by an expert of (E, N, K) for each row: (S, N)."""
    return empty(x.shape[0], weight.shape[1], dtype=x.dtype)


grouped = batched
"""Rows sorted by expert: the same shapes."""
