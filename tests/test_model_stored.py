"""Parameters by headers as real checkpoints store them: packed words, scales, buffers, copies, more layers."""

from dataclasses import replace
from typing import Any

import pytest
from small import LLAMA

from hfvram.model.architecture import Architecture
from hfvram.model.infer import infer
from hfvram.model.stored import count
from hfvram.read.checkpoint import StoredTensor
from hfvram.read.headers import BITS

Table = dict[str, tuple[str, tuple[int, ...]]]


def tensors(table: Table) -> list[StoredTensor]:
    out = []
    for name, (dtype, shape) in table.items():
        elements = 1
        for size in shape:
            elements *= size
        out.append(StoredTensor(name, dtype, shape, elements * BITS[dtype] // 8))
    return out


def plain(architecture: Architecture, dtype: str = "BF16") -> Table:
    """The tensors of a model as `save_pretrained` writes them."""
    return {p.name: (dtype, p.shape) for p in architecture.all_params if p.kind != "buffer"}


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and "_proj" in name


def packed(architecture: Architecture, parts: Any) -> Table:
    """The same with each projection replaced by what `parts` (module, outputs, inputs) yields."""
    table: Table = {}
    for name, (dtype, shape) in plain(architecture).items():
        if is_linear(name, shape):
            table |= parts(name.removesuffix(".weight"), *shape)
        else:
            table[name] = (dtype, shape)
    return table


def gptq(bits: int) -> Any:
    def parts(m: str, outputs: int, inputs: int) -> Table:
        groups = inputs // 128
        return {
            f"{m}.qweight": ("I32", (inputs * bits // 32, outputs)),
            f"{m}.qzeros": ("I32", (groups, outputs * bits // 32)),
            f"{m}.scales": ("F16", (groups, outputs)),
            f"{m}.g_idx": ("I32", (inputs,)),
            f"{m}.bias": ("F16", (outputs,)),  # GPTQ's packers write zeros where there is none
        }

    return parts


def awq(m: str, outputs: int, inputs: int) -> Table:
    return {
        f"{m}.qweight": ("I32", (inputs, outputs // 8)),
        f"{m}.qzeros": ("I32", (inputs // 128, outputs // 8)),
        f"{m}.scales": ("F16", (inputs // 128, outputs)),
    }


def nf4(m: str, outputs: int, inputs: int) -> Table:
    blocks = outputs * inputs // 64
    return {
        f"{m}.weight": ("U8", (outputs * inputs // 2, 1)),
        f"{m}.weight.absmax": ("U8", (blocks,)),
        f"{m}.weight.quant_map": ("F32", (16,)),
        f"{m}.weight.nested_absmax": ("F32", (-(-blocks // 256),)),
        f"{m}.weight.nested_quant_map": ("F32", (256,)),
        f"{m}.weight.quant_state.bitsandbytes__nf4": ("U8", (108,)),
    }


def int8(m: str, outputs: int, inputs: int) -> Table:
    return {
        f"{m}.weight": ("I8", (outputs, inputs)),
        f"{m}.SCB": ("F32", (outputs,)),
        f"{m}.weight_format": ("U8", ()),
    }


def fp8_blocks(m: str, outputs: int, inputs: int) -> Table:
    scales = (-(-outputs // 128), -(-inputs // 128))
    return {f"{m}.weight": ("F8_E4M3", (outputs, inputs)), f"{m}.weight_scale_inv": ("F32", scales)}


def fp8_tensors(m: str, outputs: int, inputs: int) -> Table:
    scale: Table = {f"{m}.{name}": ("F32", ()) for name in ("weight_scale", "input_scale", "k_scale", "v_scale")}
    return {f"{m}.weight": ("F8_E4M3", (outputs, inputs)), **scale}


def compressed(m: str, outputs: int, inputs: int) -> Table:
    return {
        f"{m}.weight_packed": ("I32", (outputs, inputs // 8)),
        f"{m}.weight_scale": ("BF16", (outputs, inputs // 128)),
        f"{m}.weight_zero_point": ("I32", (outputs // 8, inputs // 128)),
        f"{m}.weight_shape": ("I64", (2,)),
        f"{m}.weight_g_idx": ("I32", (inputs,)),
    }


def nvfp4_modelopt(m: str, outputs: int, inputs: int) -> Table:
    return {
        f"{m}.weight": ("U8", (outputs, inputs // 2)),
        f"{m}.weight_scale": ("F8_E4M3", (outputs, inputs // 16)),
        f"{m}.weight_scale_2": ("F32", ()),
        f"{m}.input_scale": ("F32", ()),
    }


def nvfp4_compressed(m: str, outputs: int, inputs: int) -> Table:
    return {
        f"{m}.weight_packed": ("U8", (outputs, inputs // 2)),
        f"{m}.weight_scale": ("F8_E4M3", (outputs, inputs // 16)),
        f"{m}.weight_global_scale": ("F32", (1,)),
        f"{m}.input_global_scale": ("F32", (1,)),
    }


def hqq(m: str, outputs: int, inputs: int) -> Table:
    groups = outputs * inputs // 64
    scalars: Table = {f"{m}.{name}": ("I32", ()) for name in ("nbits", "group_size", "axis", "packing")}
    return {
        f"{m}.W_q": ("U8", (groups // 2, 64)),
        f"{m}.scale": ("F16", (groups, 1)),
        f"{m}.zero": ("F16", (groups, 1)),
        **scalars,
    }


def eetq(m: str, outputs: int, inputs: int) -> Table:
    return {f"{m}.weight": ("I8", (inputs, outputs)), f"{m}.weight_scales": ("F16", (outputs,))}


def bitnet(m: str, outputs: int, inputs: int) -> Table:
    return {f"{m}.weight": ("U8", (outputs // 4, inputs)), f"{m}.weight_scale": ("BF16", (1,))}


def torchao(m: str, outputs: int, inputs: int) -> Table:
    scales = (outputs, inputs // 128)
    return {f"{m}._weight_qdata": ("U8", (outputs, inputs // 2)), f"{m}._weight_scale": ("BF16", scales)}


def mlx(m: str, outputs: int, inputs: int) -> Table:
    scales: Table = {f"{m}.{name}": ("BF16", (outputs, inputs // 64)) for name in ("scales", "biases")}
    return {f"{m}.weight": ("U32", (outputs, inputs // 8)), **scales}


def mxfp4(m: str, outputs: int, inputs: int) -> Table:
    return {f"{m}.weight": ("I8", (outputs, inputs // 2)), f"{m}.scale": ("F8_E8M0", (outputs, inputs // 32))}


def section(method: str, **more: Any) -> dict[str, Any]:
    return {**LLAMA, "quantization_config": {"quant_method": method, **more}}


FORMATS = {
    "gptq-4": (section("gptq", bits=4), gptq(4)),
    "gptq-8": (section("gptq", bits=8), gptq(8)),
    "gptq-3": (section("gptq", bits=3), gptq(3)),
    "awq-4": (section("awq", bits=4), awq),
    "nf4": (section("bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4"), nf4),
    "int8": (section("bitsandbytes", load_in_8bit=True), int8),
    "fp8 blocks": (section("fp8", weight_block_size=[128, 128]), fp8_blocks),
    "fp8 tensors": (section("modelopt", quant_algo="FP8"), fp8_tensors),
    "auto-round": (section("auto-round", bits=4, packing_format="auto_round:auto_gptq"), gptq(4)),
    "hqq": (section("hqq", quant_config={"weight_quant_params": {"nbits": 4, "group_size": 64}}), hqq),
    "eetq": (section("eetq"), eetq),
    "bitnet": (section("bitnet"), bitnet),
    "torchao": (section("torchao", quant_type="int4_weight_only"), torchao),
    "mlx": ({**LLAMA, "quantization_config": {"bits": 4, "group_size": 64}}, mlx),
    "mxfp4": (section("fp8", weight_block_size=[128, 128]), mxfp4),
    "int-4": (
        section("compressed-tensors", config_groups={"group_0": {"weights": {"num_bits": 4, "type": "int"}}}),
        compressed,
    ),
    "nvfp4 modelopt": (section("modelopt", quant_algo="NVFP4"), nvfp4_modelopt),
    "nvfp4 compressed": (
        section(
            "compressed-tensors",
            format="nvfp4-pack-quantized",
            config_groups={"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}},
        ),
        nvfp4_compressed,
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_packed_words_count_as_the_parameters_that_they_hold(name: str) -> None:
    config, parts = FORMATS[name]
    a = infer(config)
    table = tensors(packed(a, parts))
    found = count(table, a)
    assert (found.parameters, found.beyond) == (a.parameters, 0)
    assert sum(found.sizes) == sum(t.nbytes for t in table)  # what is loaded is all of it, as it is stored


def test_a_bias_that_the_model_has_is_a_parameter_whatever_the_file_calls_its_module() -> None:
    """Qwen2's queries, keys and values have one; files of older versions have no `language_model` in their names."""
    config = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_scaling": None}
    config |= {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    a = infer(config)
    table = packed(a, gptq(4))
    renamed = [replace(t, name=t.name.replace("model.", "model.language_model.")) for t in tensors(table)]
    assert count(renamed, a).parameters == a.parameters


def test_a_routers_correction_is_a_buffer_where_the_model_has_no_such_parameter() -> None:
    a = infer(LLAMA)
    table = plain(a) | {"model.layers.0.mlp.gate.e_score_correction_bias": ("F32", (256,))}
    table |= {"model.layers.1.ffn.gate.bias": ("F32", (256,)), "model.layers.0.ffn.gate.tid2eid": ("I64", (1000, 6))}
    assert count(tensors(table), a).parameters == a.parameters


def test_a_scale_that_the_model_has_is_a_parameter() -> None:
    """Gemma-4's router has one; its layers' and its tower's scalars are buffers."""
    text = {**LLAMA, "model_type": "gemma4_text", "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
    text |= {"moe_intermediate_size": 64, "head_dim": 64, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    a = infer({**text, "architectures": ["Gemma4ForCausalLM"]})
    names = [p.name for p in a.all_params if p.name.endswith("router.scale")]
    table = plain(a) | {"model.layers.0.layer_scalar": ("BF16", (1,)), "vision_tower.std_bias": ("BF16", (9,))}
    assert len(names) == 2
    assert count(tensors(table), a).parameters == a.parameters


def test_words_that_do_not_tell_how_many_weights_they_are() -> None:
    """AQLM: codes of 16 bits for 8 weights each, and what they stand for."""

    def aqlm(m: str, outputs: int, inputs: int) -> Table:
        books: Table = {f"{m}.codebooks": ("F16", (1, 65536, 1, 8)), f"{m}.scales": ("F16", (outputs, 1, 1, 1))}
        return {f"{m}.codes": ("I16", (outputs, inputs // 8, 1)), **books}

    a = infer(section("aqlm", nbits_per_codebook=16))
    found = count(tensors(packed(a, aqlm)), a)
    assert not found.told
    # 14 matrices with a book of 1 MiB each; 2 bytes for 8 weights; a scale of 2 bytes for each of 4,096 outputs
    rest = 2 * (2 * 1000 * 256 + 5 * 256)
    assert sum(found.sizes) == 14 * 2**20 + 1_179_648 // 4 + 4_096 * 2 + rest


def test_a_plain_checkpoint() -> None:
    a = infer(LLAMA)
    found = count(tensors(plain(a)), a)
    assert (found.parameters, found.beyond, sum(found.sizes)) == (a.parameters, 0, 2 * a.parameters)


def test_mxfp4_experts_of_gpt_oss() -> None:
    config = {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "vocab_size": 100,
        "quantization_config": {"quant_method": "mxfp4"},
    }
    a = infer(config)
    table: Table = {}
    for name, (dtype, shape) in plain(a).items():
        if name.endswith(("gate_up_proj", "down_proj")):  # (experts, inputs, outputs) stored as (experts, outputs, …)
            experts, inputs, outputs = shape
            table[f"{name}_blocks"] = ("U8", (experts, outputs, inputs // 32, 16))
            table[f"{name}_scales"] = ("U8", (experts, outputs, inputs // 32))
        else:
            table[name] = (dtype, shape)
    assert count(tensors(table), a).parameters == a.parameters


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F8_E5M2", "F4", "F6_E2M3"])
def test_new_dtypes_are_no_crash(dtype: str) -> None:
    a = infer(LLAMA)
    table = plain(a) | {"model.layers.0.mlp.up_proj.weight": (dtype, (512, 256))}
    assert count(tensors(table), a).parameters == a.parameters


OLD = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (32,)),
    "transformer.h.0.attn.bias": ("U8", (1, 1, 1024, 1024)),
    "transformer.h.0.attn.masked_bias": ("F32", ()),
    "transformer.h.0.attn.causal_mask": ("BOOL", (1, 1, 64, 64)),
    "gpt_neox.layers.1.attention.bias": ("BOOL", (1, 1, 2048, 2048)),
    "transformer.h.1.attn.attention.bias": ("U8", (1, 1, 8, 8)),
    "bert.embeddings.position_ids": ("I64", (1, 512)),
    "norm.running_mean": ("F32", (8,)),
    "norm.num_batches_tracked": ("I64", ()),
}


@pytest.mark.parametrize("name", OLD)
def test_buffers_of_old_checkpoints_are_no_parameters(name: str) -> None:
    a = infer(LLAMA)
    assert count(tensors({**plain(a), name: OLD[name]}), a).parameters == a.parameters


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_proj.bias", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"],
)
def test_a_bias_is_a_parameter(name: str) -> None:
    a = infer(LLAMA)
    assert count(tensors({**plain(a), name: ("F32", (32, 8))}), a).parameters == a.parameters + 256


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.embed_tokens.weight",  # DeepSeek's, GLM's: layers after the last one
        "mtp.layers.0.mlp.up_proj.weight",  # Qwen3-Next's
        "model.mtp.layers.0.input_proj.weight",
    ],
)
def test_layers_for_multi_token_prediction_are_not_built(name: str) -> None:
    a = infer(LLAMA)
    found = count(tensors({**plain(a), name: ("BF16", (30, 10))}), a)
    assert (found.parameters, found.beyond) == (a.parameters, 300)
    assert sum(found.sizes) == 2 * a.parameters


def test_a_head_that_is_tied_and_stored_all_the_same() -> None:
    a = infer({**LLAMA, "tie_word_embeddings": True})
    copy: Table = {"lm_head.weight": ("BF16", (1000, 256))}
    found = count(tensors({**plain(a), **copy}), a)
    assert (found.parameters, sum(found.sizes)) == (a.parameters, 2 * a.parameters)
    assert count(tensors({**plain(infer(LLAMA)), **copy}), infer(LLAMA)).parameters == infer(LLAMA).parameters


BERT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    ("config", "copies"),
    [
        (
            {**BERT, "model_type": "bert", "architectures": ["BertForMaskedLM"]},
            ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"],
        ),
        (
            {**BERT, "model_type": "roberta", "architectures": ["RobertaForMaskedLM"]},
            ["lm_head.decoder.weight", "lm_head.decoder.bias"],
        ),
        (
            {
                "model_type": "t5",
                "architectures": ["T5ForConditionalGeneration"],
                "d_model": 64,
                "d_ff": 96,
                "d_kv": 16,
                "num_layers": 2,
                "num_heads": 4,
                "vocab_size": 100,
            },
            ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"],
        ),
        (
            {
                "model_type": "bart",
                "architectures": ["BartForConditionalGeneration"],
                "d_model": 64,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "vocab_size": 100,
            },
            ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"],
        ),
    ],
)
def test_copies_of_tied_tensors(config: dict[str, Any], copies: list[str]) -> None:
    a = infer(config)
    table = plain(a)
    assert count(tensors(table), a).parameters == a.parameters
    assert not set(copies) & set(table)
    twice = {**table, **{name: ("F32", (100,) if name.endswith("bias") else (100, 64)) for name in copies}}
    assert count(tensors(twice), a).parameters == a.parameters


def test_nothing_stored_is_nothing() -> None:
    found = count([], infer(LLAMA))
    assert (found.parameters, found.beyond, found.sizes) == (0, 0, ())
