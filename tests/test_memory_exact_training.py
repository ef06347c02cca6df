"""Two training steps on meta: against what an H100 held, and what stands at the peak by hand."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from hfvram.errors import HfvramError
from hfvram.memory.allocator import replay
from hfvram.memory.exact.simulate import simulate
from hfvram.memory.timeline import Timeline
from hfvram.request import Request

pytestmark = pytest.mark.slow

TRUTH = Path(__file__).parents[1] / "fixtures" / "measured" / "h100.jsonl"
CASES = {case["id"]: case for case in map(json.loads, TRUTH.read_text().splitlines())}
LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
PARAMETERS = 2 * 256 * 64 + 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64) + 64
LINEAR = PARAMETERS - 2 * 256 * 64 - 5 * 64
"""What Muon and low-rank optimizers treat: all but embedding, head and norms."""


def trained(config: dict[str, Any] = LLAMA, **options: Any) -> Timeline:
    options = {"mode": "train", "ctx": 64, "dtype": "bf16", "quant": "none", "method": "simulate"} | options
    return simulate(config, None, Request.from_dict(options))


@pytest.mark.parametrize(
    ("name", "reserved"),
    [
        ("llama32_1b.train.batch1.seq2048.ckpt", 1e-3),
        ("llama32_1b.train.batch2.seq2048.dtypefp32.amp.ckpt", 1e-4),
        ("bert_large.train.batch16.seq512.dtypefp32.amp", 1e-3),
        ("qwen25_15b.train.batch1.seq4096", 1e-4),
        ("llama32_1b.train.batch1.seq1024.optimadafactor", 1e-4),
        ("llama32_1b.lora.r64.batch1.seq1024", 1e-3),
        ("mistral_7b.qlora.quantnf4.r16.batch1.seq2048.ckpt.optimpaged_adamw_8bit", 1e-4),
    ],
)
def test_the_peaks_of_an_h100(name: str, reserved: float) -> None:
    case = CASES[name]
    request = {"quant": "none", **case["request"], "method": "simulate"}
    timeline = simulate(case["config"], None, Request.from_dict(request))
    peaks, measured = replay(timeline), case["measured"]
    assert peaks.allocated_bytes == pytest.approx(measured["peak_allocated_bytes"], rel=1e-4)
    assert peaks.reserved_bytes == pytest.approx(measured["peak_reserved_bytes"], rel=reserved)
    assert timeline.trainable_parameters == measured["trainable_parameters"]


def test_gradients_and_states_are_counted_whole() -> None:
    timeline = trained()
    assert timeline.trainable_parameters == PARAMETERS
    assert timeline.gradients_bytes == 2 * PARAMETERS
    steps = 4 * (2 + 1 + 2 * 9)  # one fp32 number a tensor
    assert timeline.optimizer_bytes == 4 * PARAMETERS + steps


def test_what_stands_has_names_that_people_use() -> None:
    timeline = trained(gradient_checkpointing=True)
    names = Counter(tag.name for tag in timeline.tags)
    assert {"gradients", "gradients of activations", "optimizer states: exp_avg", "gradient clipping"} <= set(names)
    assert {"model.layers.* (saved activations)", "model.layers.*.mlp.act_fn (recomputed)"} <= set(names)
    assert [phase for _, phase in timeline.marks[:4]] == ["forward", "backward", "clipping", "optimizer step"]


def test_checkpointing_keeps_the_inputs_of_layers_alone() -> None:
    def saved(timeline: Timeline) -> int:
        return sum(
            s for s, t in zip(timeline.sizes, timeline.tags, strict=True) if "saved" in t.name and "mlp" in t.name
        )

    assert saved(trained()) > 0
    assert saved(trained(gradient_checkpointing=True)) == 0


def test_accumulated_gradients_stand_through_the_next_forward() -> None:
    timeline = trained(grad_accum=8)
    forwards = [at for at, phase in timeline.marks if phase == "forward"]
    assert len(forwards) == 4  # the third of a step would be as its second
    standing = timeline.live(forwards[1])
    grads = sum(timeline.sizes[h] for h in standing if timeline.tags[h].category == "gradients")
    assert grads == 2 * PARAMETERS


def test_fp16_weights_have_no_loss_scale() -> None:
    with pytest.raises(HfvramError, match="can't train fp16 weights"):
        trained(dtype="fp16", mixed_precision="fp16")
    assert trained(dtype="fp32", mixed_precision="fp16").gradients_bytes == 4 * PARAMETERS


def test_an_encoder_without_a_loss_trains_on_its_output() -> None:
    config = {"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"intermediate_size": 128, "vocab_size": 256, "architectures": ["BertModel"]}
    assert trained(config).gradients_bytes > 0


@pytest.mark.parametrize("optimizer", ["muon", "galore_adamw", "apollo_adamw"])
def test_optimizers_that_tell_linear_layers_apart(optimizer: str) -> None:
    timeline = trained(optimizer=optimizer)
    rest = 4 * (PARAMETERS - LINEAR)
    if optimizer == "muon":
        want = rest + 2 * LINEAR + 4 * 7  # a momentum; the rest are embedding, head and five norms, each with a step
    else:  # ranks are over 64: the projection is as wide as the matrix, q: 64 × 64, k: 32 × 32, up: 64 × 64
        low = 2 * 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
        want = rest + 2 * low + 2 * 2 * (2 * 64 * 64 + 2 * 32 * 32 + 3 * 64 * 64)
    assert timeline.optimizer_bytes == want


@pytest.mark.parametrize(("labels", "label_bytes"), [(1, 2), (3, 8)])
def test_a_class_that_judges_whole_sequences_has_a_label_for_each(labels: int, label_bytes: int) -> None:
    request = Request.from_dict({"mode": "train", "ctx": 64, "batch": 3, "dtype": "bf16", "quant": "none"})
    timeline = simulate(LLAMA | {"num_labels": labels}, "LlamaForSequenceClassification", request)
    given = [size for size, tag in zip(timeline.sizes, timeline.tags, strict=True) if tag.category == "inputs"]
    assert sorted(given) == [3 * label_bytes, 3 * 64 * 8]
