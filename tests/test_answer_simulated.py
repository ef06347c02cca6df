"""The exact engine's answer: what it names at the peak, and that it is the same when it comes from the disk."""

import os
from pathlib import Path

import pytest
from estimates import llama_folder

import hfvram
from hfvram.answer import simulated
from hfvram.show.explain import largest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("hf_home")]

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden" / "simulate-explain.txt"
PINNED = transformers.__version__.startswith("5.17.") and torch.__version__.startswith("2.13.")
ASKED = {
    "train": {"mode": "train", "ctx": 2048, "batch": 2},
    "train with checkpointing, mixed precision": {
        "mode": "train",
        "ctx": 2048,
        "batch": 2,
        "dtype": "fp32",
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
    },
    "train, short, loop over parameters": {"mode": "train", "ctx": 16, "batch": 1, "optimizer": "adamw_torch"},
    "lora": {"mode": "lora", "ctx": 2048, "batch": 2},
    "inference": {"mode": "inference", "ctx": 2048, "batch": 2, "method": "simulate"},
}


@pytest.mark.skipif(not PINNED, reason="what stands there is another version's")
def test_what_stands_at_the_peak_in_words(tmp_path: Path) -> None:
    folder, shown = llama_folder(tmp_path), ""
    for name, options in ASKED.items():
        e = hfvram.estimate(folder, **options)
        shown += "\n".join([f"{name}: {e.peak_phase}", *largest(e.largest_tensors, 100)]) + "\n\n"
    if os.environ.get("HFVRAM_GOLDEN"):
        GOLDEN.write_text(shown)
    assert shown == GOLDEN.read_text()


def test_the_answer_is_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = llama_folder(tmp_path)
    options = {"mode": "train", "ctx": 64}
    first = hfvram.estimate(folder, **options)
    monkeypatch.setattr(simulated, "at_peak", None)  # nothing can be worked out anew
    again = hfvram.estimate(folder, **options)
    assert again == first
    assert [t.bytes for t in again.largest_tensors] == sorted((t.bytes for t in again.largest_tensors), reverse=True)
    assert len(again.largest_tensors) == 10
