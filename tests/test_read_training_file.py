"""Training files in the shapes that their projects document (fixtures/training, in words of our own)."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hfvram.errors import HfvramError
from hfvram.read.training_file import KINDS, one, read
from hfvram.request import Request

FOLDER = Path(__file__).parents[1] / "fixtures" / "training"
LLAMA = "meta-llama/Llama-3.1-8B"


@pytest.mark.parametrize(
    ("file", "kind", "model", "options"),
    [
        # trl sft --config: SFTConfig's own defaults are bf16 autocast and checkpointing
        (
            "trl-sft.yaml",
            "TrainingArguments or TRL",
            "Qwen/Qwen3-8B",
            {"mode": "lora", "ctx": 4096, "batch": 4, "grad_accum": 2, "optimizer": "adamw_torch", "lora_r": 64}
            | {"lora_dropout": 0.1, "lora_targets": ("q_proj", "k_proj", "v_proj", "o_proj"), "dtype": "bf16"}
            | {"attention": "flash_attention_2", "mixed_precision": "bf16", "gradient_checkpointing": True},
        ),
        (
            "trainer.json",
            "TrainingArguments or TRL",
            None,
            {"mode": "train", "batch": 2, "grad_accum": 16, "optimizer": "adamw_torch", "mixed_precision": "bf16"}
            | {"gradient_checkpointing": True, "zero": 3, "zero_bucket": "auto", "offload": ("optimizer",)},
        ),
        (
            "axolotl-qlora.yml",
            "Axolotl",
            LLAMA,
            {"mode": "qlora", "ctx": 2048, "batch": 2, "grad_accum": 4, "optimizer": "paged_adamw_8bit", "lora_r": 32}
            | {"lora_dropout": 0.05, "lora_targets": "all-linear", "quant": "nf4", "double_quant": True}
            | {"dtype": "bf16", "mixed_precision": "bf16", "gradient_checkpointing": True, "adapter_dtype": "fp32"}
            | {"attention": "flash_attention_2"},
        ),
        # FSDP keeps what is trained in fp32 under mixed precision; 4 shards of 2 tensor parallel ranks are 8 GPUs
        (
            "axolotl-fsdp.yml",
            "Axolotl",
            "Qwen/Qwen3-8B",
            {"mode": "train", "ctx": 8192, "batch": 1, "grad_accum": 1, "optimizer": "adamw_torch_fused"}
            | {"dtype": "fp32", "mixed_precision": "bf16", "gradient_checkpointing": True, "tp": 2, "gpus": 8}
            | {"fsdp": "full_shard", "attention": "flash_attention_2"},
        ),
        # LLaMA-Factory checkpoints unless told not to, and targets all linear layers
        (
            "llama-factory-lora.yaml",
            "LLaMA-Factory",
            "Qwen/Qwen3-4B-Instruct-2507",
            {"mode": "lora", "ctx": 2048, "batch": 1, "grad_accum": 8, "lora_r": 8, "lora_targets": "all-linear"}
            | {"dtype": "bf16", "mixed_precision": "bf16", "adapter_dtype": "fp32", "gradient_checkpointing": True}
            | {"optimizer": "adamw_torch_fused"},
        ),
        (
            "llama-factory-full.yaml",
            "LLaMA-Factory",
            "Qwen/Qwen3-8B",
            {"mode": "train", "ctx": 4096, "batch": 2, "grad_accum": 4, "dtype": "fp32", "mixed_precision": "bf16"}
            | {
                "gradient_checkpointing": True,
                "optimizer": "adamw_torch_fused",
                "zero": 3,
                "zero_bucket": "auto",
                "offload": ("optimizer",),
            },
        ),
        (
            "accelerate-fsdp.yaml",
            "accelerate",
            None,
            {"mode": "train", "gpus": 16, "mixed_precision": "bf16", "dtype": "fp32", "fsdp": "full_shard"}
            | {"offload": ("params",), "gradient_checkpointing": True},
        ),
        (
            "accelerate-deepspeed.yaml",
            "accelerate",
            None,
            {"mode": "train", "gpus": 8, "mixed_precision": "bf16", "zero": 2, "offload": ("optimizer",)}
            | {"grad_accum": 4},
        ),
        (
            "zero3.json",
            "DeepSpeed",
            None,
            {"mode": "train", "zero": 3, "zero_bucket": "auto", "offload": ("optimizer",)},
        ),
    ],
)
def test_what_each_project_documents(file: str, kind: str, model: str | None, options: dict[str, Any]) -> None:
    path = str(FOLDER / file)
    assert one(path)[0] == kind
    found = read([path], {})
    assert (found.model, dict(found.options)) == (model, options)
    assert not [note for note in found.notes if note.startswith(("not understood", "contradiction"))]
    assert found.notes[0].startswith(f"{file} is read as {kind}: ")
    Request.from_dict(found.options)  # words and types are the request's


def written(folder: Path, text: str, name: str = "f.yaml") -> str:
    file = folder / name
    file.write_text(text)
    return str(file)


def said(folder: Path, text: str, **given: Any) -> tuple[dict[str, Any], str]:
    found = read([written(folder, text)], given)
    return dict(found.options), "\n".join(found.notes)


def test_unknown_keys_and_those_that_are_not_counted_are_listed(tmp_path: Path) -> None:
    _, notes = said(
        tmp_path, "base_model: a/b\nmicro_batch_size: 1\nmy_key: 3\nplugins: [liger]\nfsdp_config: {odd: 1}\n"
    )
    assert "not understood of f.yaml: fsdp_config.odd, my_key" in notes
    assert "understood of f.yaml, but not counted: plugins" in notes


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("per_device_train_batch_size: 1\nbf16: true\nfp16: true\n", "bf16 and fp16 are both true"),
        ("use_peft: true\nload_in_4bit: true\nload_in_8bit: true\n", "load_in_4bit and load_in_8bit"),
        ("lora_r: 8\nmodel_name_or_path: a/b\n", "use_peft is not true: all parameters are trained"),
        ("base_model: a/b\nadapter: qlora\nload_in_4bit: false\n", "adapter qlora wants load_in_4bit"),
        ("finetuning_type: full\nquantization_bit: 4\n", "quantization_bit with full"),
        ("distributed_type: NO\nnum_processes: 4\n", "num_processes 4 with distributed_type NO"),
        ("base_model: a/b\ndeepspeed: {zero_optimization: {stage: 2}}\nfsdp: [full_shard]\n", "deepspeed and fsdp"),
        ("zero_optimization: {stage: 1}\nbf16: {enabled: true}\nfp16: {enabled: true}\n", "both enabled"),
    ],
)
def test_a_file_that_contradicts_itself_is_told(text: str, note: str, tmp_path: Path) -> None:
    assert note in said(tmp_path, text)[1]


def test_files_together(tmp_path: Path) -> None:
    """The training file wins over how it is run, and every difference is named."""
    train = written(tmp_path, "model_name_or_path: a/b\nper_device_train_batch_size: 4\nbf16: true\n", "train.yaml")
    ds = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 2, "train_batch_size": 64}
    zero = written(tmp_path, json.dumps(ds), "ds.json")
    run = written(tmp_path, "distributed_type: MULTI_GPU\nnum_processes: 8\nmixed_precision: fp16\n", "run.yaml")
    found = read([zero, run, train], {})
    assert {k: found.options[k] for k in ("batch", "gpus", "zero", "mixed_precision", "grad_accum")} == {
        "batch": 4, "gpus": 8, "zero": 2, "mixed_precision": "bf16", "grad_accum": 2,
    }  # fmt: skip
    assert "contradiction: ds.json has batch 2, but another file 4; 4 is taken" in found.notes
    assert "contradiction: run.yaml has mixed precision fp16, but another file bf16; bf16 is taken" in found.notes


def test_train_batch_size_is_micro_batch_times_accumulation_times_gpus(tmp_path: Path) -> None:
    ds = written(tmp_path, '{"train_batch_size": 32, "gradient_accumulation_steps": 2}', "ds.json")
    assert read([ds], {"gpus": "4"}).options["batch"] == 4
    odd = read([ds], {"gpus": "4", "batch": "3"})
    assert "contradiction: ds.json has train_batch_size 32, batch × accumulation × GPUs is 24" in odd.notes
    assert any("over all GPUs, and no file says how many" in note for note in read([ds], {}).notes)


def test_the_command_line_wins(tmp_path: Path) -> None:
    path = str(FOLDER / "axolotl-qlora.yml")
    found = read([path], {"ctx": "8k", "mode": "train"})
    assert not {"ctx", "mode", "quant", "lora_r", "adapter_dtype"} & set(found.options)
    assert "the command line says ctx, mode" in found.notes[0]
    assert dict(read([path], {"mode": "inference"}).options) == {
        "ctx": 2048, "dtype": "bf16", "attention": "flash_attention_2", "quant": "nf4", "double_quant": True,
    }  # fmt: skip
    assert "fsdp" not in read([str(FOLDER / "accelerate-fsdp.yaml")], {"zero": "3"}).options


def test_a_deepspeed_file_that_is_named_but_not_there(tmp_path: Path) -> None:
    text = "base_model: a/b\nmicro_batch_size: 1\ndeepspeed: ds/none.json\n"
    with pytest.raises(HfvramError, match=r"names the DeepSpeed file ds/none\.json, which is not there") as raised:
        said(tmp_path, text)
    assert raised.value.kind == "io"
    assert "zero" not in said(tmp_path, text, zero="2")[0]
    with pytest.raises(HfvramError, match="is no local file"):
        said(tmp_path, text.replace("ds/none.json", "https://example.com/ds.json"))
    written(tmp_path, "micro_batch_size: 1\nbase_model: x\n", "other.yaml")
    with pytest.raises(HfvramError, match="is no DeepSpeed file but Axolotl"):
        said(tmp_path, text.replace("ds/none.json", "other.yaml"))


@pytest.mark.parametrize("text", ["name: my\nversion: 3\n", "model: a/b\nmodel_class: llm\nmicro_batch_size: 1\n"])
def test_a_file_of_no_known_kind_says_which_there_are(text: str, tmp_path: Path) -> None:
    with pytest.raises(HfvramError) as raised:
        said(tmp_path, text)
    assert raised.value.kind == "usage"
    assert all(kind in raised.value.message for kind in KINDS)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("base_model: a/b\nmicro_batch_size: two\n", "f.yaml: micro_batch_size 'two' is not a whole number"),
        ("base_model: [a]\nmicro_batch_size: 1\n", "base_model list is not text"),
        ("per_device_train_batch_size: -1\n", "-1 is not a whole number"),
        ("use_peft: maybe\n", "'maybe' is not true or false"),
        ("use_peft: true\nlora_dropout: 1.5\n", "1.5 is not in 0 ≤ p < 1"),
        ("zero_optimization: 3\ntrain_batch_size: auto\n", "zero_optimization 3 is not a mapping"),
        ("zero_optimization: {stage: 7}\n", "zero_optimization.stage 7 is not one of 0, 1, 2, 3"),
    ],
)
def test_values_of_the_wrong_type_are_a_usage_error(text: str, wanted: str, tmp_path: Path) -> None:
    with pytest.raises(HfvramError, match=wanted) as raised:
        said(tmp_path, text)
    assert raised.value.kind == "usage"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "gradient_checkpointing: true\ngradient_checkpointing_kwargs: {every_n_layers: 2, offload: true}\n",
            {"checkpoint_every": 2, "offload": ("activations",)},
        ),
        # TRL: 4-bit weights get adapters in bf16, full training starts from fp32
        ("use_peft: true\nload_in_4bit: true\nmax_length: 512\n", {"adapter_dtype": "bf16", "double_quant": False}),
        ("dataset_name: d\nmodel_name_or_path: a/b\n", {"dtype": "fp32", "mixed_precision": "bf16", "ctx": 1024}),
        ("use_peft: true\n", {"lora_targets": "default", "lora_r": 16}),
        ("finetuning_type: full\npure_bf16: true\n", {"dtype": "bf16", "mixed_precision": "no"}),
        ("finetuning_type: lora\nquantization_bit: 4\nbf16: true\n", {"mode": "qlora", "double_quant": True}),
        ("finetuning_type: full\ndisable_gradient_checkpointing: true\n", {"gradient_checkpointing": False}),
        ("finetuning_type: full\nstage: dpo\nper_device_train_batch_size: 3\n", {"batch": 6}),
        ("base_model: a\nbf16: full\nmicro_batch_size: 1\n", {"dtype": "bf16", "mixed_precision": "no"}),
        ("base_model: a\nadapter: lora\nload_in_8bit: true\n", {"mode": "qlora", "quant": "int8", "dtype": "fp32"}),
        ("base_model: a\ngradient_checkpointing: offload\n", {"offload": ("activations",)}),
        ("fsdp: full_shard auto_wrap offload\nbf16: true\n", {"fsdp": "full_shard", "offload": ("params",)}),
        ("fsdp: true\nfsdp_config: {reshard_after_forward: false}\noptim: sgd\n", {"fsdp": "shard_grad_op"}),
        (
            "distributed_type: FSDP\nfsdp_config: {fsdp_sharding_strategy: 4, fsdp_version: 1}\n",
            {"fsdp": "hybrid_shard"},
        ),
        ("distributed_type: MULTI_GPU\nmixed_precision: no\nnum_processes: 2\n", {"mixed_precision": "no", "gpus": 2}),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}', {"offload": ("params=nvme",)}),
        ('{"train_batch_size": 8, "optimizer": {"type": "AdamW"}}', {"optimizer": "adamw_torch_fused"}),
    ],
)
def test_what_words_mean(text: str, expected: dict[str, Any], tmp_path: Path) -> None:
    options, _ = said(tmp_path, text)
    assert {name: options.get(name) for name in expected} == expected


MARKERS = [m for module in KINDS.values() for m in module.MARKERS] + [
    "fsdp",
    "fsdp_config",
    "deepspeed",
    "bf16",
    "adapter",
]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 10**12)
    | st.floats(allow_nan=False)
    | st.sampled_from(["auto", "a/b", ""]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["stage", "device", "x"]), inner),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(MARKERS), VALUES, max_size=6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
def test_any_values_are_options_of_a_request_or_an_error(tmp_path: Path, values: dict[str, Any]) -> None:
    file = tmp_path / "f.json"
    file.write_text(json.dumps(values))
    try:
        found = read([str(file)], {})
    except HfvramError:
        return
    options = {k: v for k, v in found.options.items() if k != "optimizer"}
    Request.from_dict(options)
