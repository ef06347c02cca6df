"""The built-in catalogue: exact published counts, ids, completions, and that it is quick."""

import importlib
import json
import re
import time
from pathlib import Path

import pytest

from hfvram.read import catalogue
from hfvram.read.catalogue import completions, lookup

FACTS = [json.loads(line) for line in (Path(__file__).parents[1] / "scripts" / "catalogue_facts.jsonl").open()]
IDS = [line["id"] for line in FACTS]

# exact counts that the checkpoints' own headers or the papers give, by dtype
PUBLISHED = {
    "mistralai/Mixtral-8x7B-v0.1": {"BF16": 46_702_792_704},
    "mistralai/Mixtral-8x22B-Instruct-v0.1": {"BF16": 140_630_071_296},
    "mistralai/Mistral-7B-v0.1": {"BF16": 7_241_732_096},
    "meta-llama/Llama-2-7b-hf": {"F16": 6_738_415_616},
    "meta-llama/Meta-Llama-3-8B-Instruct": {"BF16": 8_030_261_248},
    "meta-llama/Llama-3.1-405B": {"BF16": 405_853_388_800},
    "meta-llama/Llama-3.3-70B-Instruct": {"BF16": 70_553_706_496},
    "openai-community/gpt2": {"F32": 124_439_808},
    "openai/gpt-oss-20b": {"BF16": 1_804_459_584, "F4": 19_110_297_600},
    "google-t5/t5-base": {"F32": 222_903_552},
    "google-bert/bert-base-uncased": {"F32": 109_514_298},
    "openai/whisper-large-v3": {"F16": 1_543_490_560},
    "state-spaces/mamba-2.8b-hf": {"F32": 2_768_345_600},
    "bigscience/bloom": {"BF16": 176_247_271_424},
}

# what the documentation promises, one or more of each family
# fmt: off
NAMED = [
    "mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x22B-v0.1", "mistralai/Mistral-7B-v0.1",
    "mistralai/Mistral-Nemo-Base-2407", "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf",
    "meta-llama/Llama-2-70b-hf", "meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B",
    "meta-llama/Llama-3.1-405B", "meta-llama/Llama-3.2-1B", "Qwen/Qwen2.5-7B", "Qwen/Qwen3-8B", "Qwen/Qwen3-30B-A3B",
    "deepseek-ai/DeepSeek-V2-Lite", "deepseek-ai/DeepSeek-V3", "openai/gpt-oss-20b", "google/gemma-2-9b",
    "google/gemma-3-4b-it", "microsoft/Phi-3-mini-4k-instruct", "microsoft/phi-4", "allenai/OLMoE-1B-7B-0924",
    "state-spaces/mamba-130m-hf", "AntonV/mamba2-130m-hf", "mistralai/Mamba-Codestral-7B-v0.1", "tiiuae/falcon-7b",
    "tiiuae/falcon-mamba-7b", "ai21labs/Jamba-v0.1", "Zyphra/Zamba2-7B", "ibm-granite/granite-3.3-8b-instruct",
    "openai-community/gpt2", "gpt2", "google-bert/bert-base-uncased", "google-t5/t5-base", "openai/whisper-tiny",
]
# fmt: on


@pytest.mark.parametrize("model_id", PUBLISHED)
def test_published_counts(model_id: str) -> None:
    entry = lookup(model_id)
    assert entry is not None
    assert entry.id == model_id
    assert dict(entry.parameters_by_dtype) == PUBLISHED[model_id]


def test_fp8_counts_are_those_of_the_header_less_the_prediction_layer() -> None:
    entry = lookup("deepseek-ai/DeepSeek-V3")
    assert entry is not None
    # the header's 680,571,043,840 F8 elements, less layer 61 that only predicts further tokens: latent attention
    # (7168·1536 + 1536·24576 + 7168·576 + 512·32768 + 16384·7168) and 257 experts of 3·7168·2048
    attention = 7168 * 1536 + 1536 * 24576 + 7168 * 576 + 512 * 32768 + 16384 * 7168
    assert entry.parameters_by_dtype["F8_E4M3"] == 680_571_043_840 - attention - 257 * 3 * 7168 * 2048


def test_named_models_are_there() -> None:
    assert [n for n in NAMED if lookup(n) is None] == []


@pytest.mark.parametrize("model_id", IDS)
def test_every_entry_is_whole(model_id: str) -> None:
    entry = lookup(model_id)
    assert entry is not None
    assert isinstance(entry.config["model_type"], str)
    assert entry.config["architectures"]
    assert all(n > 0 for n in entry.parameters_by_dtype.values())
    assert set(entry.parameters_by_dtype) <= {"F32", "BF16", "F16", "F8_E4M3", "F4"}
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", entry.date)


def test_file_and_facts_hold_the_same_models() -> None:
    assert sorted(catalogue._data()["models"]) == sorted(IDS)
    assert len(IDS) >= 100


def test_facts_and_published_counts_agree() -> None:
    for line in FACTS:
        entry = lookup(line["id"])
        assert entry is not None
        if "published" in line:
            assert sum(entry.parameters_by_dtype.values()) == line["published"], line["id"]


def test_unknown_and_inexact_ids_are_not_found() -> None:
    for name in ("", "nobody/nothing", "mistralai/Mixtral-8x7B", "GPT2", "../gpt2", "like", "models"):
        assert lookup(name) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mistralai/Mixtral-8x7B", ["mistralai/Mixtral-8x7B-v0.1"]),
        ("MistralAI/mixtral-8x7b-V0.1", ["mistralai/Mixtral-8x7B-v0.1"]),
        ("mistralai/Mixtral-8x7B-Instruct", ["mistralai/Mixtral-8x7B-Instruct-v0.1"]),
        ("meta-llama/Llama-2-7b", ["meta-llama/Llama-2-7b-hf"]),
        ("mistralai/Mistral-7B", ["mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.3"]),
        ("meta-llama/llama-3.1-8b", ["meta-llama/Llama-3.1-8B"]),  # not its -Instruct
        ("google/gemma-2", []),  # sizes are not versions
        ("microsoft/phi", []),
        ("mistralai/Mixtral-8x7B-v0.1", []),
        ("", []),
    ],
)
def test_completions(text: str, expected: list[str]) -> None:
    assert completions(text) == expected


def test_gated_models_say_so() -> None:
    llama, mixtral = lookup("meta-llama/Llama-3.1-8B"), lookup("mistralai/Mixtral-8x7B-v0.1")
    assert llama is not None
    assert mixtral is not None
    assert (llama.gated, mixtral.gated) == (True, False)


def test_reading_takes_milliseconds() -> None:
    took = []
    for _ in range(5):
        importlib.reload(catalogue)
        start = time.perf_counter()
        catalogue.lookup("gpt2")
        took.append(time.perf_counter() - start)
    assert min(took) < 0.005


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_id", ["openai-community/gpt2", "openai/gpt-oss-20b", "Zyphra/Zamba2-1.2B", "google/flan-t5-small"]
)
def test_counts_come_out_of_the_meta_device(model_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    script = importlib.import_module("catalogue")
    line = next(f for f in FACTS if f["id"] == model_id)
    entry = lookup(model_id)
    assert entry is not None
    assert script.counts_by_dtype(line["config"]) == entry.parameters_by_dtype
