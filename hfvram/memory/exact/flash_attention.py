"""`--attention flash_attention_2`: transformers' own path to the flash-attn package, whose kernels have stand-ins.

They allocate as PyTorch's copy does: output, log-sum-exp, and in the backward pass fp32 scratch for the queries'
gradient. What a decoding step with split keys takes for a moment is left out. Nothing of it was measured. Source:
transformers 5.17, modeling_flash_attention_utils.py; flash-attn 2.8, flash_attn_interface.py and csrc/flash_api.cpp.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch.nn.functional as F
from transformers import modeling_flash_attention_utils as own

from hfvram.errors import HfvramError
from hfvram.memory.exact.kernels import FusedAttention

if TYPE_CHECKING:
    from hfvram.request import Request

NAME = "flash_attention_2"


def ask_for_flash(model: Any, request: "Request") -> None:
    """Set a built model to flash attention. Raises `usage` where it has none, or computes in fp32."""
    if not getattr(model, "_supports_flash_attn", False):
        raise HfvramError("usage", f"{type(model).__name__} can't run --attention {NAME}: valid are sdpa and eager")
    if request.dtype == "fp32" and request.mixed_precision == "no":
        raise HfvramError("usage", f"--attention {NAME} computes in fp16 and bf16: valid for --dtype fp32 is sdpa")
    model.config._attn_implementation = NAME


@contextlib.contextmanager
def flash_kernels() -> Iterator[None]:
    """The package as if installed."""
    functions = own._lazy_define_process_function(varlen)
    with patch.multiple(
        own,
        _loaded_implementation=NAME,
        _flash_fn=fixed,
        _flash_varlen_fn=varlen,
        _pad_fn=own._pad_input,
        _unpad_fn=own._unpad_input,
        _process_flash_kwargs_fn=functions,
    ):
        yield


def fixed(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Any:
    """Sequences of one length: (b, s, heads, d) in and out. Heads are padded to a multiple of 8."""
    d = q.shape[-1]
    if d % 8:
        q, k, v = (F.pad(x, (0, -d % 8)) for x in (q, k, v))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return FusedAttention.apply(*heads, None, "flash").transpose(1, 2)[..., :d]


def varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Any:
    """Sequences one behind the other: (tokens, heads, d) in and out."""
    return fixed(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0))[0]
