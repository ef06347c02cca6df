"""Weights in fewer bits: what transformers loads and makes, what it turns into more, and what is refused."""

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
from small import LLAMA

from hfvram.answer.estimate import Estimate
from hfvram.answer.question import Session
from hfvram.errors import HfvramError
from hfvram.request import Request

LINEAR = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256)
"""Weights of the linear layers: queries and output, keys and values, three of the feed-forward, twice."""
REST = 2 * 1000 * 256 + 5 * 256
"""Embeddings, head and norms."""
BF16 = LLAMA | {"torch_dtype": "bfloat16"}


def ask(folder: Path, config: dict[str, Any], tensors: Any = None, **options: Any) -> Estimate:
    (folder / "config.json").write_text(json.dumps(config))
    if tensors:
        write(folder / "model.safetensors", tensors)
    options = {"method": "formula"} | options if options.get("engine", "transformers") == "transformers" else options
    return Session().estimate(str(folder), Request.from_dict(options), offline=True)


def refusal(folder: Path, config: dict[str, Any], **options: Any) -> str:
    with pytest.raises(HfvramError) as caught:
        ask(folder, config, **options)
    assert caught.value.kind == "usage"
    return caught.value.message


def write(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], int]]) -> None:
    """A safetensors file of a header, and a hole where the weights would be."""
    header, at = {}, 0
    for name, (dtype, shape, nbytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)


@pytest.mark.parametrize(
    ("quant", "nbytes"),
    [
        # blocks of 128 × 128: 2·2 and 1·2 of the attention twice each, 4·2 of the feed-forward
        ("fp8", LINEAR + 2 * (2 * 4 + 2 * 2 + 3 * 8) * 4),
        # a scale of 2 B and a zero point of half a byte for 128 weights; the order of 256 inputs of six, 512 of one
        ("gptq-4", LINEAR // 2 + LINEAR // 128 * 5 // 2 + 2 * (6 * 256 + 512) * 4),
        ("awq-4", LINEAR // 2 + LINEAR // 128 * 5 // 2),
    ],
)
def test_made_while_loading_or_as_if_it_were(tmp_path: Path, quant: str, nbytes: int) -> None:
    assert ask(tmp_path, BF16, quant=quant).weights_bytes == nbytes + 2 * REST


def test_what_transformers_can_not_make(tmp_path: Path) -> None:
    said = refusal(tmp_path, BF16, quant="mxfp4")
    assert "of gpt-oss alone" in said
    assert "none, nf4, fp4, int8, fp8, gptq-4, awq-4" in said
    assert "valid are none, nf4, fp4, int8" in refusal(tmp_path, BF16, quant="gptq-4", mode="lora", method="formula")
    assert "8.9" in refusal(tmp_path, BF16, quant="fp8", compute_capability="8.0")


STORED = BF16 | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def test_fp8_on_a_gpu_without_it_is_turned_into_the_dtype(tmp_path: Path) -> None:
    e = ask(tmp_path, STORED, compute_capability="8.6")
    assert e.weights_bytes == 2 * (LINEAR + REST)
    assert any("below compute capability 8.9" in w for w in e.warnings)
    assert ask(tmp_path, STORED).weights_bytes < 2 * LINEAR


def compressed(**weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return BF16 | {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}


def test_compressed_tensors_are_unpacked_by_transformers_and_kept_by_engines(tmp_path: Path) -> None:
    config = compressed(num_bits=8, type="float", strategy="channel", symmetric=True)
    e = ask(tmp_path, config)
    assert e.weights_bytes == 2 * (LINEAR + REST)
    assert any("unpacks them at the first pass" in w for w in e.warnings)
    assert ask(tmp_path, config, engine="vllm").weights_bytes < 1.2 * LINEAR + 3 * REST


def test_a_tool_whose_files_transformers_does_not_load(tmp_path: Path) -> None:
    config = BF16 | {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    e = ask(tmp_path, config)
    assert any("no loader for those of modelopt" in w for w in e.warnings)
    # half a byte, a byte for 16 of them, two fp32 for each of 14 matrices
    assert e.weights_bytes == LINEAR // 2 + LINEAR // 16 + 14 * 8 + 2 * REST


@pytest.mark.parametrize("engine", ["transformers", "vllm", "sglang"])
@pytest.mark.parametrize("method", ["vptq", "spqr", "someday"])
def test_a_method_of_unknown_size_is_refused_by_name_or_counts_as_stored(
    tmp_path: Path, engine: str, method: str
) -> None:
    config = BF16 | {"quantization_config": {"quant_method": method}}
    assert f"quantization {method} is not supported yet without the headers" in refusal(tmp_path, config, engine=engine)
    tensors = {"model.embed_tokens.weight": ("BF16", (1000, 256), 512_000), "x.indices": ("I32", (100, 10), 4_000)}
    e = ask(tmp_path, config, tensors, engine=engine)
    assert e.model.parameters == LINEAR + REST
    assert any("weights count as they are stored" in w for w in e.warnings)
    assert sum(i.bytes for i in e.items if i.name == "weights as stored") == 516_000


def test_a_dtype_that_nobody_has_seen_counts_as_stored(tmp_path: Path) -> None:
    names = {"model.embed_tokens.weight": (1000, 256), "lm_head.weight": (1000, 256)}
    tensors = {name: ("F2_E1M0", shape, prod(shape) // 4) for name, shape in names.items()}
    e = ask(tmp_path, BF16, tensors)
    assert e.weights_bytes == 2 * 64_000
    assert e.model.parameters == LINEAR + REST
    assert any("not known here (F2_E1M0)" in w for w in e.warnings)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_what_engines_make_while_loading(tmp_path: Path, engine: str) -> None:
    def weights(**options: Any) -> int:
        e = ask(tmp_path, BF16, engine=engine, **options)
        return sum(
            i.bytes for i in e.items if i.name in ("weights, packed", "weights, quantized", "quantization scales")
        )

    # qkv, output, gate and up, down: four matrices of a layer, each with one fp32 scale
    assert weights(quant="fp8") == LINEAR + 8 * 4
    assert weights(quant="awq-4") == LINEAR // 2 + LINEAR // 128 * 5 // 2
    # bitsandbytes: fp32 for 64 weights, and a map of 16 fp32 for each matrix
    assert weights(quant="nf4") == LINEAR // 2 + LINEAR // 64 * 4 + 8 * 64
    assert "valid are auto, none, fp8, nf4, gptq-4, awq-4" in refusal(tmp_path, BF16, engine=engine, quant="int8")
    assert "loads gpt-oss so" in refusal(tmp_path, BF16, engine=engine, quant="mxfp4")
    assert "valid are auto, none" in refusal(tmp_path, STORED, engine=engine, quant="nf4")


def packed(extra: int = 0) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """The files of the small model in AWQ, as AutoAWQ writes them, with heads that are `extra` rows longer."""
    found = {
        f"{n}.weight": ("BF16", (1000 + extra, 256), (1000 + extra) * 512) for n in ("model.embed_tokens", "lm_head")
    }
    found["model.norm.weight"] = ("BF16", (256,), 512)
    shapes = {"self_attn.q_proj": (256, 256), "self_attn.k_proj": (128, 256), "self_attn.v_proj": (128, 256)}
    shapes |= {"self_attn.o_proj": (256, 256), "mlp.gate_proj": (512, 256), "mlp.up_proj": (512, 256)}
    shapes |= {"mlp.down_proj": (256, 512)}
    for layer in ("model.layers.0", "model.layers.1"):
        for name, (outputs, inputs) in shapes.items():
            words, groups = inputs * outputs // 8, inputs // 128
            found[f"{layer}.{name}.qweight"] = ("I32", (inputs, outputs // 8), words * 4)
            found[f"{layer}.{name}.qzeros"] = ("I32", (groups, outputs // 8), groups * outputs // 2)
            found[f"{layer}.{name}.scales"] = ("F16", (groups, outputs), groups * outputs * 2)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}.{name}.weight"] = ("BF16", (256,), 512)
    return found


AWQ = BF16 | {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}


def test_files_and_the_rule_for_them_are_of_one_size(tmp_path: Path) -> None:
    stored = LINEAR // 2 + LINEAR // 128 * 5 // 2 + 2 * REST
    e = ask(tmp_path, AWQ, packed())
    assert e.model.parameters == LINEAR + REST
    assert e.model.parameters_from == "headers"
    assert e.weights_bytes == stored == ask(tmp_path, AWQ).weights_bytes
    for engine in ("vllm", "sglang"):
        assert not any("by the rule" in w for w in ask(tmp_path, AWQ, packed(), engine=engine).warnings)
    other = ask(tmp_path, AWQ, packed(extra=500), engine="vllm")
    assert any("the engine's are by the rule" in w for w in other.warnings)


def test_layers_of_packed_files_go_to_cpu_memory(tmp_path: Path) -> None:
    e = ask(tmp_path, AWQ, packed(), offload=["layers"])
    assert e.cpu_bytes == LINEAR // 2 + LINEAR // 128 * 5 // 2 + 4 * 256 * 2


def test_formats_that_no_serving_engine_loads(tmp_path: Path) -> None:
    config = BF16 | {"quantization_config": {"bits": 4, "group_size": 64}}
    for engine, name in (("vllm", "vLLM"), ("sglang", "SGLang")):
        assert any(f"{name} loads no mlx files" in w for w in ask(tmp_path, config, engine=engine).warnings)
