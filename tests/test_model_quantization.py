"""Quantization sections as tools write them, in hfvram's words. The shapes are those of checkpoints on the Hub."""

from typing import Any

import pytest

from hfvram.errors import HfvramError
from hfvram.model.quantization import method


def weights(**scheme: Any) -> dict[str, Any]:
    return {"group_0": {"targets": ["Linear"], "weights": scheme}}


SECTIONS: list[tuple[dict[str, Any], str | None]] = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
    ({"quant_method": "bitsandbytes", "_load_in_4bit": True}, "fp4"),  # BitsAndBytesConfig's default type
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
    ({"load_in_8bit": True, "load_in_4bit": False}, "int8"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": False, "load_in_4bit": False}, None),
    ({"quant_method": "gptq", "bits": 3, "group_size": -1}, "gptq-3"),
    ({"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}, "awq-4"),
    ({"quant_method": "awq", "w_bit": 4}, "awq-4"),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
    ({"quant_method": "fbgemm_fp8"}, "fp8"),
    ({"quant_method": "mxfp4"}, "mxfp4"),
    ({"quant_method": "compressed-tensors", "config_groups": weights(num_bits=8, type="float")}, "fp8"),
    ({"quant_method": "compressed-tensors", "config_groups": weights(num_bits=8, type="int")}, "int8"),
    (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": weights(num_bits=4, type="int", group_size=32),
        },
        "int-4",
    ),
    (
        {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "config_groups": weights(num_bits=4, type="float", group_size=16),
        },
        "nvfp4",
    ),
    ({"quant_method": "modelopt", "quant_algo": "FP8", "config_groups": weights(num_bits=8, type="float")}, "fp8"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
    ({"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4"}}, "nvfp4"),
    ({"quant_method": "fp8", "moe_quant_algo": "NVFP4", "quant_algo": "MIXED_PRECISION"}, "nvfp4"),
    ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, "awq-4"),
    ({"quant_algo": "FP8", "producer": {"name": "modelopt"}}, "fp8"),
    (
        {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "config_groups": {
                "group_0": {"weights": {"num_bits": 8, "type": "float"}},
                "group_1": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}},
            },
        },
        "nvfp4",
    ),
    ({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"}, "gptq-4"),
    ({"quant_method": "intel/auto-round", "bits": 2, "packing_format": "auto_round:auto_awq"}, "awq-2"),
    ({"quant_method": "auto-round", "bits": 4, "data_type": "mx_fp"}, "mxfp4"),
    ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}}, "hqq-4"),
    ({"quant_method": "quanto", "weights": "int4"}, "quanto-4"),
    ({"quant_method": "quanto", "weights": "float8"}, "fp8"),
    ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "int-4"),
    ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Float8WeightOnlyConfig"}}}, "fp8"),
    ({"quant_method": "eetq"}, "eetq-8"),
    ({"quant_method": "bitnet"}, "bitnet-2"),
    ({"quant_method": "aqlm", "nbits_per_codebook": 16}, "aqlm-16"),
    ({"quant_method": "someday"}, "someday"),
    ({"group_size": 64, "bits": 4}, "mlx-4"),
    ({}, None),
]


@pytest.mark.parametrize(("section", "name"), SECTIONS, ids=[f"{i}-{s[1]}" for i, s in enumerate(SECTIONS)])
def test_methods(section: dict[str, Any], name: str | None) -> None:
    assert method({"quantization_config": section})[0] == name


def test_a_configuration_without_one() -> None:
    assert method({"model_type": "llama"}) == (None, ())
    assert method({"quantization_config": None}) == (None, ())


def test_the_section_may_be_nested_or_of_an_older_name_or_mlxs() -> None:
    gptq = {"quant_method": "gptq", "bits": 4}
    assert method({"text_config": {"quantization_config": gptq}})[0] == "gptq-4"
    assert method({"compression_config": {"quant_method": "compressed-tensors", "quant_algo": "FP8"}})[0] == "fp8"
    assert method({"quantization": {"group_size": 64, "bits": 8}})[0] == "mlx-8"


@pytest.mark.parametrize("key", ["modules_to_not_convert", "llm_int8_skip_modules", "ignore", "exclude_modules"])
def test_modules_left_alone(key: str) -> None:
    section = {"quant_method": "fp8", key: ["lm_head", "re:.*self_attn.*"]}
    assert method({"quantization_config": section}) == ("fp8", ("lm_head", "re:.*self_attn.*"))


def test_modules_that_several_keys_name_come_once() -> None:
    section = {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "ignore": ["lm_head"],
        "exclude_modules": ["lm_head", "x"],
    }
    assert method({"quantization_config": section})[1] == ("lm_head", "x")


@pytest.mark.parametrize(
    "section",
    [
        "gptq",
        ["gptq"],
        {"quant_method": 4},
        {"quant_method": "gptq", "bits": "four"},
        {"quant_method": "gptq", "bits": 999},
    ],
)
def test_nonsense(section: Any) -> None:
    with pytest.raises(HfvramError) as caught:
        method({"quantization_config": section})
    assert caught.value.kind == "bad_config"
