"""bitsandbytes' linear layers as they allocate: nf4 and fp4 (`Linear4bit`), int8 (`Linear8bitLt`).

Weights are quantized one by one, as while loading: a copy in the computing dtype comes and goes. Source: bitsandbytes
0.50, nn/modules.py, functional.py, autograd/_functions.py and backends/cuda/ops.py, at their defaults.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from hfvram.errors import HfvramError
from hfvram.memory.bitsandbytes import BLOCK, FEW_ROWS, NESTED_BLOCK, ON_LOADING
from hfvram.memory.exact.build import DTYPES
from hfvram.memory.exact.kernels import empty
from hfvram.memory.weights import DEQUANTIZED

if TYPE_CHECKING:
    from hfvram.memory.exact.run import Run
    from hfvram.request import Request


class Codes(nn.Module):  # type: ignore[misc]
    """What dequantizing takes beside the packed weights: scales of 64 values, in 8 bits themselves where nested."""

    def __init__(self, numel: int, nested: bool, storage: Any) -> None:
        super().__init__()
        blocks = -(-numel // BLOCK)
        scales = empty(blocks)
        self.keep("packed", empty((numel + 1) // (2 * storage.itemsize), 1, dtype=storage))
        self.keep("code", empty(16))
        if nested:
            self.keep("offset", scales.mean())
            shifted = scales - self.offset
            self.keep("nested_code", empty(256))
            self.keep("nested_scales", empty(-(-blocks // NESTED_BLOCK)))
            scales = empty(blocks, dtype=torch.uint8)
            del shifted
        self.keep("scales", scales)

    def keep(self, name: str, tensor: Any) -> None:
        tensor._hfvram_scale = True
        self.register_buffer(name, tensor, persistent=False)

    def fp32_scales(self, in_place: bool) -> Any:
        """The scales as the products read them; nested ones are unpacked, then shifted."""
        if self.scales.dtype == torch.float32:
            return self.scales
        scales = empty(self.scales.numel())
        return (scales.add_(self.offset),) if in_place else (scales, scales + self.offset)


class Product4bit(torch.autograd.Function):  # type: ignore[misc]
    """Weights made anew for each product, forward and backward; the forward holds their scales beside them.

    A few rows are multiplied by the packed weights themselves.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, layer: Any, bias: Any) -> Any:
        ctx.layer = layer
        if x.numel() <= FEW_ROWS * x.shape[-1]:
            return empty(*x.shape[:-1], layer.out_features, dtype=x.dtype)
        scales = layer.state.fp32_scales(in_place=False)
        out = F.linear(x, empty(*layer.shape, dtype=x.dtype), bias)
        del scales
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        scales = ctx.layer.state.fp32_scales(in_place=True)
        weight = empty(*ctx.layer.shape, dtype=ctx.layer.dtype)
        del scales
        return torch.matmul(grad, weight.to(grad.dtype)), None, None


class Linear4bit(nn.Linear):  # type: ignore[misc]
    """A linear layer of 4 bits a weight, packed into numbers of the dtype `storage` (`bnb_4bit_quant_storage`)."""

    def __init__(self, layer: Any, dtype: Any, nested: bool, storage: Any = torch.uint8) -> None:
        nn.Module.__init__(self)
        self.shape = self.out_features, self.in_features = sizes(layer)
        self.dtype = dtype
        loaded = empty(*self.shape, dtype=dtype)
        state = Codes(loaded.numel(), nested, storage)
        del loaded
        self.weight = nn.Parameter(state.packed, requires_grad=False)
        del state._buffers["packed"]
        self.state = state
        self.bias = layer.bias

    def forward(self, x: Any) -> Any:
        own = x.dtype
        x = x.to(self.dtype)
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return Product4bit.apply(x, self, bias).to(own)


class Product8bit(torch.autograd.Function):  # type: ignore[misc]
    """Inputs in 8 bits a row, a product in int32, its value in fp16, then in the inputs' dtype."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, scales: Any, bias: Any) -> Any:
        ctx.save_for_backward(weight, scales)
        ctx.dtype = x.dtype
        rows = x.reshape(-1, x.shape[-1])
        quantized, row_scales = int8_rows(rows.to(torch.float16))
        product = empty(rows.shape[0], weight.shape[0], dtype=torch.int32)
        out = empty(*product.shape, dtype=torch.float16)
        if bias is not None:
            out.add_(bias)
        out = out.to(x.dtype)
        del quantized, row_scales, product
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        weight, scales = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1]).contiguous()
        wide = weight.to(ctx.dtype, copy=True).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))
        return torch.matmul(rows.to(ctx.dtype), wide).view(*grad.shape[:-1], weight.shape[1]), None, None, None


def int8_rows(x: Any) -> tuple[Any, Any]:
    """A matrix in 8 bits, with an fp32 scale for each row."""
    scales = empty(x.shape[0])
    return empty(*x.shape, dtype=torch.int8), scales


class Linear8bit(nn.Linear):  # type: ignore[misc]
    """A linear layer of 8 bits a weight."""

    def __init__(self, layer: Any) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = sizes(layer)
        weight, scales = int8_rows(empty(self.out_features, self.in_features, dtype=torch.float16))
        self.weight = nn.Parameter(weight, requires_grad=False)
        scales._hfvram_scale = True
        self.register_buffer("scales", scales, persistent=False)
        self.bias = layer.bias

    def forward(self, x: Any) -> Any:
        return Product8bit.apply(x, self.weight, self.scales, self.bias)


def sizes(layer: Any) -> tuple[int, int]:
    """Outputs and inputs; GPT-2's Conv1D holds its weights transposed."""
    rows, columns = layer.weight.shape
    return (rows, columns) if isinstance(layer, nn.Linear) else (columns, rows)


def method(request: "Request") -> str:
    """How weights are packed; QLoRA is nf4 where nothing is said."""
    return "nf4" if request.mode == "qlora" and request.quant not in ON_LOADING else request.quant


def quantize(run: "Run", model: Any, request: "Request") -> None:
    """Replace the linear layers, as `BitsAndBytesConfig` does; raises `usage` for other methods.

    The head stays, and so do modules that the model keeps in fp32 where the rest is fp16 (transformers 5.17,
    quantizers/base.py), and what transformers itself loads in the computing dtype. FSDP shards what is packed into
    floats, which is how FSDP-QLoRA stores it: the scales are no parameters, and stay whole on every rank. Source:
    bitsandbytes, docs/source/fsdp_qlora.md; accelerate 1.15, `fsdp2_prepare_model`. No GPU has measured it yet.
    """
    quant = method(request)
    if quant in ("auto", "none", *DEQUANTIZED):
        return
    if quant not in ON_LOADING:
        words = ", ".join(("none", "fp8", *ON_LOADING))
        raise HfvramError(
            "usage", f"--method simulate can't run --quant {quant}: valid are {words} (or --method formula)"
        )
    head, dtype = model.get_output_embeddings(), DTYPES[request.dtype]
    storage = dtype if request.fsdp else torch.uint8
    spared = tuple(model._keep_in_fp32_modules or ())
    with run.tracker, run.tracker.making("weights"):
        for parent in list(model.modules()):
            for name, layer in list(parent.named_children()):
                linear = type(layer) is nn.Linear or type(layer).__name__ == "Conv1D"
                if linear and layer is not head and name not in spared:
                    nested = request.double_quant
                    new = Linear8bit(layer) if quant == "int8" else Linear4bit(layer, dtype, nested, storage)
                    setattr(parent, name, new.train(layer.training))
                    del new, layer
