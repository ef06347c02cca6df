"""Training files on the whole road: command line, Python, batch."""

import json
from pathlib import Path

import pytest

import hfvram
from hfvram.errors import HfvramError
from hfvram.show.batch import answer_line
from hfvram.show.cli import main

FOLDER = Path(__file__).parents[1] / "fixtures" / "training"
TRL = str(FOLDER / "trl-sft.yaml")


@pytest.fixture(autouse=True)
def offline(hf_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_the_three_doors_ask_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--from", TRL, "--ctx", "1k", "--method", "formula", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"]["id"] == "Qwen/Qwen3-8B"
    assert told["request"] | {"lora_r": 64, "ctx": 1024, "batch": 4, "mode": "lora", "dtype": "bf16"} == told["request"]
    assert told["warnings"][0].startswith("trl-sft.yaml is read as TrainingArguments or TRL: model Qwen/Qwen3-8B")
    assert told["warnings"][0].endswith("the command line says ctx")
    mine = hfvram.estimate(from_=TRL, ctx=1024, method="formula")
    assert mine.to_dict() == told
    line = json.dumps({"id": 1, "from": [TRL], "ctx": 1024, "method": "formula"}).encode()
    assert answer_line(line) == {"id": 1, **told}


def test_the_same_as_its_options_by_hand() -> None:
    asked = {"mode": "lora", "ctx": 4096, "batch": 4, "grad_accum": 2, "optimizer": "adamw_torch", "lora_r": 64}
    asked |= {"lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj"], "lora_dropout": 0.1, "dtype": "bf16"}
    asked |= {"attention": "flash_attention_2", "mixed_precision": "bf16", "gradient_checkpointing": True}
    by_hand = hfvram.estimate("Qwen/Qwen3-8B", method="formula", **asked)
    assert hfvram.estimate(from_=TRL, method="formula").peak_reserved_bytes == by_hand.peak_reserved_bytes


@pytest.mark.parametrize(
    ("files", "more"),
    [
        (("axolotl-qlora.yml",), ()),
        (("llama-factory-lora.yaml",), ()),
        (("llama-factory-full.yaml",), ("--gpus", "8")),
        (("trainer.json",), ("Qwen/Qwen3-8B", "--ctx", "2k", "--gpus", "8")),
        (("accelerate-fsdp.yaml", "trl-sft.yaml"), ()),
        (("trl-sft.yaml", "accelerate-deepspeed.yaml"), ()),
        (("zero3.json",), ("gpt2", "--gpus", "2")),
    ],
)
def test_every_kind_is_answered(
    files: tuple[str, ...], more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    named = [word for file in files for word in ("--from", str(FOLDER / file))]
    code = main([*named, *more, "--method", "formula", "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    told = json.loads(out)
    assert told["peak_allocated_bytes"] > told["activations_bytes"] > 0
    assert all(any(f"{file} is read as" in w for w in told["warnings"]) for file in files)


def test_a_model_on_the_line_and_grids_win(capsys: pytest.CaptureFixture[str]) -> None:
    main(["gpt2", "--from", TRL, "--lora-targets", "all-linear", "--ctx", "512,1k", "--method", "formula", "--json"])
    out, err = capsys.readouterr()
    assert [a["request"]["ctx"] for a in json.loads(out)] == [512, 1024]
    assert "the model is gpt2, in place of the file's Qwen/Qwen3-8B" in err


def test_peft_chooses_targets_where_a_file_names_none(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text("model_name_or_path: Qwen/Qwen3-8B\nuse_peft: true\n")
    found = hfvram.estimate(from_=str(file), method="formula")
    assert found.request.lora_targets == ("q_proj", "v_proj")
    # 36 layers of rank 16: q 4096 → 4096 and v 4096 → 1024
    assert found.model.trainable_parameters == 36 * 16 * (4096 + 4096 + 4096 + 1024)


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        ("[" * 5000, 2, "nested deeper"),
        ("name: x\n", 2, "none of the kinds"),
        ("use_peft: true\n", 2, "which model?"),
        (None, 1, "No such file"),
    ],
)
def test_errors_are_one_line(
    content: str | None, code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "t.yaml"
    if content is not None:
        file.write_text(content)
    assert main(["--from", str(file)]) == code
    err = capsys.readouterr().err
    assert (words in err, err.count("\n")) == (True, 1)


def test_keys_are_a_path_or_a_list_of_paths() -> None:
    with pytest.raises(HfvramError, match="a path, or a list of paths"):
        hfvram.estimate(from_=3)
    assert answer_line(b'{"from": 3}')["error"]["kind"] == "usage"
