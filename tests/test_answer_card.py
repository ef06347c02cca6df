"""A card's figures: every one is the estimate of the request that it stands for."""

import json
from pathlib import Path

import pytest
from estimates import llama_folder

import hfvram
from hfvram.answer.card import Card, card, contexts
from hfvram.answer.gpus import find_gpu

QWEN = "Qwen/Qwen3-8B"


@pytest.fixture(scope="module")
def qwen() -> Card:
    return card(QWEN, offline=True)


def device(ctx: int, **options: object) -> int:
    return hfvram.estimate(QWEN, offline=True, ctx=ctx, **options).device_bytes


def test_the_table_is_what_the_command_line_answers(qwen: Card) -> None:
    assert qwen.contexts == (4096, 8192, 32768, 40960)
    assert [m.numbers for m in qwen.memory] == [
        "bf16, as stored",
        "int8 (bitsandbytes)",
        "nf4, 4 bits (bitsandbytes)",
    ]
    for row, quant in zip(qwen.memory, ("none", "int8", "nf4"), strict=True):
        assert row.device_bytes == tuple(device(ctx, quant=quant) for ctx in qwen.contexts)


def test_the_longest_context_fits_and_one_more_does_not(qwen: Card) -> None:
    for h in qwen.holds:
        gpu, _ = find_gpu(h.gpu)
        assert h.memory_bytes == gpu.memory_bytes
        for most, quant in zip(h.contexts, ("none", "int8", "nf4"), strict=True):
            assert most is not None
            shared = {"quant": quant, "compute_capability": gpu.capability}
            assert most == 0 or device(most, **shared) <= gpu.memory_bytes
            assert most == 40960 or device(most + 1, **shared) > gpu.memory_bytes
    assert [h.and_larger for h in qwen.holds] == [False] * (len(qwen.holds) - 1) + [True]


def test_training_is_what_the_command_line_answers_by_formula(qwen: Card) -> None:
    assert [(t.name, t.gpu) for t in qwen.training] == [
        ("full", "H100 SXM 80GB"),
        ("LoRA", "RTX 4090"),
        ("QLoRA", "RTX 4090"),
    ]
    for t, mode in zip(qwen.training, ("train", "lora", "qlora"), strict=True):
        assert t.options == f"--mode {mode} --ctx 2048 --gradient-checkpointing"
        options = {"mode": mode, "gradient_checkpointing": True, "method": "formula"}
        assert t.device_bytes == device(2048, **options)


def test_what_no_single_gpu_holds_is_split_over_several() -> None:
    name = "CohereLabs/c4ai-command-r-plus"
    several = card(name, offline=True).holds[-1]
    assert (several.gpus, several.gpu) == (4, "H100 SXM 80GB")
    most, *others = several.contexts
    assert most
    assert others == [None, None]  # bitsandbytes is not split
    for gpus, ctx, fits in ((4, most, True), (2, 4096, False)):
        e = hfvram.estimate(name, offline=True, ctx=ctx, gpus=gpus, tp=gpus, compute_capability="9.0")
        assert (e.device_bytes <= several.memory_bytes) is fits


def test_numbers_that_save_nothing_are_left_out_and_said() -> None:
    c = card("mistralai/Mixtral-8x7B-v0.1", offline=True)
    assert [m.numbers for m in c.memory] == ["bf16, as stored"]
    assert any("hardly less" in note for note in c.notes)


def test_a_model_of_a_folder_is_named_without_its_path(tmp_path: Path) -> None:
    c = card(llama_folder(tmp_path))
    assert (c.id, c.on_hub) == ("llama", False)
    assert c.notes == ()
    assert card(f"{tmp_path}/llama/config.json").id == "llama"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    lora = {
        "peft_type": "LORA",
        "r": 8,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": str(tmp_path / "llama"),
    }
    (adapter / "adapter_config.json").write_text(json.dumps(lora))
    assert (card(str(adapter)).id, card(str(adapter)).on_hub) == ("adapter", False)


def test_where_a_model_was_read_is_in_the_notices_alone(qwen: Card) -> None:
    assert any("catalogue" in warning for warning in qwen.warnings)
    assert not any("catalogue" in note for note in qwen.notes)


def test_columns() -> None:
    assert contexts(10_000_000) == (4096, 131072, 1 << 20, 10_000_000)
    assert contexts(4096) == (4096,)
    assert contexts(8192) == (4096, 8192)


@pytest.mark.parametrize("model", ["google-bert/bert-base-uncased", "google-t5/t5-small", "openai/whisper-tiny"])
def test_models_that_generate_no_text_have_a_card_too(model: str) -> None:
    c = card(model, offline=True)
    assert c.memory
    assert c.holds[-1].contexts[0]


@pytest.mark.slow
def test_a_model_of_which_only_the_code_is_known_has_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    xlnet = {"model_type": "xlnet", "architectures": ["XLNetLMHeadModel"], "d_model": 64, "n_layer": 1, "n_head": 4}
    (tmp_path / "config.json").write_text(json.dumps(xlnet | {"d_inner": 128, "vocab_size": 1000, "dtype": "float32"}))
    monkeypatch.setattr("hfvram.answer.card.CONTEXTS", (64,))
    monkeypatch.setattr("hfvram.answer.card.TRIED", 128)
    c = card(str(tmp_path))
    assert (c.method, c.contexts, c.limit, c.exactly) == ("simulate", (64, 128), None, False)
    assert c.holds[0].contexts[0] == 128  # XLNet says −1 for no limit
