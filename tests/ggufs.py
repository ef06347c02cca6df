"""GGUF headers as the `gguf` package writes them: any tensors, a tokenizer of any size, no weights."""

import math
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType, GGUFEndian, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from hub import Sparse

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name → type, and shape as rows × columns."""


def gguf(
    arch: str,
    keys: Mapping[str, Any],
    tensors: Tensors,
    *,
    tokens: int = 0,
    merges: int = 0,
    scores: bool = False,
    split: tuple[int, int] | None = None,
    big_endian: bool = False,
) -> Sparse:
    """A file's header, and its size. `keys` are the architecture's, without its name in front."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        w = GGUFWriter(path, arch, endianess=GGUFEndian.BIG if big_endian else GGUFEndian.LITTLE)
        for key, value in keys.items():
            _add(w, key if "." in key and key.startswith(("general.", "split.")) else f"{arch}.{key}", value)
        rng = random.Random(tokens + merges)
        if tokens:
            w.add_tokenizer_model("gpt2")
            w.add_token_list(
                ["".join(rng.choices("abcdefgĠé<|", k=1 + int(rng.expovariate(0.15)))) for _ in range(tokens)]
            )
            if scores:
                w.add_token_scores([-float(i) for i in range(tokens)])
            w.add_token_types([1] * tokens)
        if merges:
            w.add_token_merges(
                [
                    f"{'a' * (1 + int(rng.expovariate(0.3)))} {'bĠ' * (1 + int(rng.expovariate(0.5)))}"
                    for _ in range(merges)
                ]
            )
            w.add_bos_token_id(0)
            w.add_add_bos_token(False)
            w.add_chat_template("{% for m in messages %}" + "x" * 9000)
            w.add_quantization_version(2)
        if split:
            w.add_uint16("split.no", split[0])
            w.add_uint16("split.count", split[1])
        for name, (dtype, shape) in tensors.items():
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
            nbytes = math.prod(shape) // block * size
            import numpy as np

            w.add_tensor_info(name, shape, np.dtype("float32"), nbytes, GGMLQuantizationType[dtype])
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_ti_data_to_file()
        w.close()
        head = path.read_bytes()
    head += b"\0" * (-len(head) % 32)
    data = 0
    for dtype, shape in tensors.values():
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
        data += -(-(math.prod(shape) // block * size) // 32) * 32
    return Sparse(head, len(head) + data)


def _add(w: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        w.add_bool(key, value)
    elif isinstance(value, int):
        w.add_uint32(key, value)
    elif isinstance(value, float):
        w.add_float32(key, value)
    elif isinstance(value, str):
        w.add_string(key, value)
    else:
        w.add_array(key, value)


def llama(layers: int = 2, dtype: str = "Q4_K", hidden: int = 256, vocab: int = 512, tied: bool = False) -> Tensors:
    """The tensors of a small Llama: 4 heads of 64, 2 for keys and values, 512 wide feed-forwards."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {"token_embd.weight": (dtype, (vocab, hidden))}
    for i in range(layers):
        for name, shape in {
            "attn_norm": (hidden,), "attn_q": (hidden, hidden), "attn_k": (hidden // 2, hidden),
            "attn_v": (hidden // 2, hidden), "attn_output": (hidden, hidden), "ffn_norm": (hidden,),
            "ffn_gate": (2 * hidden, hidden), "ffn_up": (2 * hidden, hidden), "ffn_down": (hidden, 2 * hidden),
        }.items():  # fmt: skip
            found[f"blk.{i}.{name}.weight"] = ("F32" if len(shape) == 1 else dtype, shape)
    found["output_norm.weight"] = ("F32", (hidden,))
    if not tied:
        found["output.weight"] = ("Q6_K", (vocab, hidden))
    return found


LLAMA = {
    "block_count": 2, "context_length": 8192, "embedding_length": 256, "feed_forward_length": 512,
    "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip
