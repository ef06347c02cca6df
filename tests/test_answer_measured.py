"""Measuring, as far as a CPU takes it: the same request runs, and what is kept has the bytes that were predicted.

No GPU has run this: the one function that reads CUDA's counters (`cuda_reading`) is put in the tests' own hands.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hfvram.answer.measured import Measurement, measure
from hfvram.errors import HfvramError
from hfvram.memory.measure.meter import Meter, Reading
from hfvram.request import Request
from hfvram.show.cli import main
from hfvram.show.measure import append, gpu_text

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    "max_position_embeddings": 512, "dtype": "float32", "tie_word_embeddings": False,
}  # fmt: skip


def counting() -> Callable[[], Reading]:
    """Readings that tell which one they are: the n-th has a peak of n KiB."""
    count = 0

    def read() -> Reading:
        nonlocal count
        count += 1
        sizes = {"allocated_bytes": count, "peak_allocated_bytes": count << 10, "reserved_bytes": count}
        return Reading(**sizes, peak_reserved_bytes=count << 11, device_bytes=count << 12)

    return read


def run(folder: Path, config: dict[str, Any] = LLAMA, **options: Any) -> Measurement:
    model = folder / "tiny"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(config))
    request = Request.from_dict({"method": "simulate", **options})
    return measure(str(model), request, device="cpu", read=counting())


@pytest.mark.parametrize(
    "options",
    [
        {"ctx": 64, "batch": 2},
        {"ctx": 32, "phase": "prefill"},
        {"ctx": 32, "new_tokens": 20, "cache": "static"},
        {"ctx": 32, "phase": "encode", "padding": True, "batch": 2},
        {"mode": "train", "ctx": 32, "batch": 2, "gradient_checkpointing": True},
        {"mode": "train", "ctx": 16, "optimizer": "sgd_momentum", "freeze": "embed_tokens", "padding": True},
        {"mode": "train", "ctx": 16, "optimizer": "adafactor", "dtype": "bf16"},
        {"mode": "train", "ctx": 16, "optimizer": "muon"},
        {"mode": "lora", "ctx": 16, "lora_targets": "q_proj,v_proj", "mixed_precision": "bf16", "grad_accum": 2},
        {"mode": "lora", "ctx": 16, "dora": True, "lora_r": 4, "modules_to_save": "lm_head", "dtype": "bf16"},
    ],
)
def test_what_stands_has_the_bytes_that_were_predicted(options: dict[str, Any], tmp_path: Path) -> None:
    found = run(tmp_path, **options)
    items = {b.name: (b.predicted_bytes, b.measured_bytes) for b in found.beside if b.kind == "item"}
    assert set(items) >= {"weights"} | ({"gradients"} if options.get("mode") else set())
    assert {name: pair for name, pair in items.items() if pair[0] != pair[1]} == {}
    assert found.measured.parameters == found.estimate.model.parameters
    assert found.measured.trainable_parameters in (None, found.estimate.model.trainable_parameters)


def test_phases_of_a_training_and_its_line(tmp_path: Path) -> None:
    """One reading at the start, one once it is built, then nine: four of each step, and the end."""
    found = run(tmp_path, mode="train", ctx=16)
    m = found.measured
    marks = ["fwd0", "bwd0", "clip0", "step0", "fwd1", "bwd1", "clip1", "step1", "train"]
    assert (list(m.phases), list(m.allocated)) == (marks, ["built", *marks])
    assert (m.peak_allocated_bytes, m.peak_reserved_bytes, m.device_bytes) == (11 << 10, 11 << 11, 11 << 12)
    assert m.context_bytes == 1 << 12
    phases = {b.name: b for b in found.beside if b.kind == "phase"}
    assert list(phases) == ["forward", "backward", "clipping", "optimizer step"]
    assert (phases["forward"].measured_bytes, phases["forward"].predicted_bytes is not None) == (7 << 10, True)
    line = found.line()
    truth = json.loads((ROOT / "fixtures" / "measured" / "h100.jsonl").read_text().splitlines()[60])
    assert set(line) == set(truth)
    assert set(line["measured"]) == set(truth["measured"])
    assert set(line["measured"]["peaks"]) == set(truth["measured"]["peaks"])
    assert line["config"] == LLAMA
    Request.from_dict(line["request"])
    append(str(tmp_path / "kept.jsonl"), line)
    append(str(tmp_path / "kept.jsonl"), line)
    kept = (tmp_path / "kept.jsonl").read_text().splitlines()
    assert [json.loads(text)["id"] for text in kept] == ["tiny.train.batch1.seq16"] * 2


def test_the_table(tmp_path: Path) -> None:
    found = run(tmp_path, ctx=16)
    text = gpu_text(found, set(), 80)
    assert "tiny (inference, ctx 16, batch 1)" in text
    assert any(
        " ".join(line.split()).startswith("weights") and line.rstrip().endswith("exact") for line in text.splitlines()
    )
    assert set(json.loads(gpu_text(found, {"json"}, 80))) == {
        "figures", "measured", "environment", "estimate", "warnings", "error",
    }  # fmt: skip


def test_a_phase_that_comes_again_keeps_its_highest_peak() -> None:
    peaks = iter([5, 9, 3])

    def read() -> Reading:
        p = next(peaks)
        return Reading(
            allocated_bytes=1, peak_allocated_bytes=p, reserved_bytes=1, peak_reserved_bytes=p, device_bytes=1
        )

    meter = Meter(read)
    for phase in ("start", "fwd0", "fwd0"):
        meter.mark(phase)
    assert (meter.marks["fwd0"].peak_allocated_bytes, meter.running_peaks("start")) == (9, {"fwd0": 9})


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["measure", "no/such-model", "--json"]) == 1
    out, err = capsys.readouterr()
    assert (json.loads(out)["error"]["kind"], err.count("\n")) == ("no_gpu", 1)
    assert "no CUDA GPU on this machine" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gpus": 2}, "measured is one GPU"),
        ({"mode": "train", "zero": 1}, "measured is one GPU"),
        ({"engine": "vllm"}, "--read-log reads its log"),
        ({"quant": "fp8"}, "fp8 is not measured"),
        ({"mode": "train", "optimizer": "galore_adamw", "ctx": 8}, "galore_adamw is not measured"),
    ],
)
def test_what_is_not_measured_is_a_usage_error(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(HfvramError, match=words) as raised:
        run(tmp_path, **options)
    assert raised.value.kind == "usage"


def test_a_quantized_checkpoint_has_no_weights_to_pack(tmp_path: Path) -> None:
    own = LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
    with pytest.raises(HfvramError, match="--quant none measures its model"):
        run(tmp_path, own, ctx=8)


def test_memory_that_runs_out_is_one_line(tmp_path: Path) -> None:
    import torch

    given = counting()

    def read() -> Reading:
        found = given()
        if found.allocated_bytes == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")
        return found

    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(HfvramError, match=r"ran out after built: CUDA out of memory\. Tried to") as raised:
        measure(str(tmp_path), Request(ctx=16), device="cpu", read=read)
    assert raised.value.kind == "no_gpu"
