"""Group sizes, zero points, blocks and exceptions out of sections as tools write them."""

from typing import Any

import pytest

from hfvram.model.scheme import scheme


def read(**section: Any) -> Any:
    found = scheme({"quantization_config": section})
    assert found is not None
    return found


def groups(**weights: Any) -> dict[str, Any]:
    return {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}


@pytest.mark.parametrize(
    ("section", "facts"),
    [
        ({"quant_method": "gptq", "bits": 3, "group_size": -1}, {"method": "gptq-3", "group": 0, "ordered": True}),
        ({"quant_method": "gptq", "bits": 4}, {"group": 128}),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, {"group": 64, "loader": "awq"}),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 32}, {"group": 32, "ordered": False}),
        (
            {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}},
            {"group": 64},
        ),
        ({"group_size": 32, "bits": 4}, {"method": "mlx-4", "group": 32, "loader": ""}),
        ({"quant_method": "fp8", "weight_block_size": [64, 128]}, {"block": (64, 128), "static": False}),
        ({"quant_method": "fp8"}, {"block": (128, 128)}),
        (
            {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
            {"block": None, "static": True},
        ),
        ({"quant_method": "fbgemm_fp8"}, {"block": None, "by_row": True, "scale_bytes": 4}),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, {"block": None, "static": True, "by_row": False}),
        ({"quant_algo": "FP8", "producer": {"name": "modelopt"}}, {"block": None, "static": True}),
        ({"quant_method": "mxfp4"}, {"method": "mxfp4"}),
        ({"quant_method": "aqlm", "nbits_per_codebook": 16, "in_group_size": 8}, {"codebook": (1, 16, 8, 1)}),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"method": "nf4", "loader": "bitsandbytes"}),
        (
            {
                "quant_method": "torchao",
                "quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 64}}},
            },
            {"method": "int-4", "group": 64, "loader": "torchao"},
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": groups(num_bits=4, type="int", group_size=32, strategy="group", symmetric=True),
            },
            {"method": "int-4", "group": 32, "zeros": False, "loader": "compressed-tensors"},
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": groups(num_bits=4, type="int", symmetric=False)},
            {"group": 0, "zeros": True},
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": groups(num_bits=8, type="float", strategy="channel"),
            },
            {"method": "fp8", "by_row": True, "block": None, "static": False},
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": groups(num_bits=8, type="float", strategy="block", block_structure=[128, 128]),
            },
            {"block": (128, 128)},
        ),
    ],
)
def test_sections(section: dict[str, Any], facts: dict[str, Any]) -> None:
    found = read(**section)
    assert {name: getattr(found, name) for name in facts} == facts


def test_nothing_quantized() -> None:
    assert scheme({"model_type": "llama"}) is None
    assert scheme({"quantization_config": {"load_in_8bit": False, "load_in_4bit": False}}) is None


def test_modelopts_mixtures_pack_what_they_name() -> None:
    layers = {
        "model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"},
        "model.layers.0.mlp.experts.7.up_proj": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        "lm_head": {"quant_algo": "NVFP4"},
    }
    both = {
        "group_0": {"weights": {"num_bits": 8, "type": "float"}},
        "group_1": {"weights": {"num_bits": 4, "type": "float"}},
    }
    found = read(quant_method="modelopt", quant_algo="MIXED_PRECISION", quantized_layers=layers, config_groups=both)
    assert found.of("model.layers.0.self_attn.q_proj.weight") == "fp8"
    assert found.of("model.layers.0.mlp.experts.gate_up_proj", "experts") == "nvfp4"  # all experts by one of them
    assert found.of("lm_head.weight", "head") == "nvfp4"
    assert found.of("model.layers.0.self_attn.k_proj.weight") == "none"


def test_experts_in_four_bits_beside_fp8() -> None:
    section = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    found = scheme({"expert_dtype": "fp4", "quantization_config": section})
    assert found is not None
    assert (found.of("e", "experts"), found.of("q"), found.block) == ("mxfp4", "fp8", (128, 128))
    nvidias = read(
        **section, moe_quant_algo="NVFP4", quant_algo="MIXED_PRECISION", config_groups=groups(num_bits=4, type="float")
    )
    assert (nvidias.of("e", "experts"), nvidias.of("q"), nvidias.block) == ("nvfp4", "fp8", (128, 128))


def test_modules_with_other_bits() -> None:
    found = read(
        quant_method="gptq",
        bits=4,
        lm_head=True,
        dynamic={"+:.*down_proj": {"bits": 8}, "-:.*layers\\.0\\..*": {}},
    )
    assert found.of("model.layers.1.mlp.down_proj.weight") == "gptq-8"
    assert found.of("model.layers.0.mlp.up_proj.weight") == "none"
    assert found.of("model.layers.1.mlp.up_proj.weight") == "gptq-4"
    assert found.of("lm_head.weight", "head") == "gptq-4"
    rounded = read(quant_method="auto-round", bits=4, extra_config={"layers.0.q_proj": {"bits": 16}})
    assert rounded.of("layers.0.q_proj.weight") == "none"
    mlx = scheme({"quantization": {"bits": 4, "group_size": 64, "lm_head": {"bits": 6}, "embed": False}})
    assert mlx is not None
    assert (mlx.of("lm_head.weight", "head"), mlx.of("embed.weight", "embedding")) == ("mlx-6", "none")


def test_groups_of_compressed_tensors_with_targets_of_their_own() -> None:
    found = read(
        quant_method="compressed-tensors",
        config_groups={
            "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 128}},
            "group_1": {"targets": ["re:.*down_proj"], "weights": {"num_bits": 8, "type": "float"}},
        },
    )
    assert found.of("model.layers.0.mlp.down_proj.weight") == "fp8"
    assert found.of("model.layers.0.mlp.up_proj.weight") == "int-4"
