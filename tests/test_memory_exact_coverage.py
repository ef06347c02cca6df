"""One model of each task and of each question that depends on data, and docs/coverage.md agrees with itself."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hfvram.memory.timeline import Standing, Timeline
from hfvram.request import Request

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hfvram.memory.exact.inputs import candidates  # noqa: E402
from hfvram.memory.exact.simulate import simulate  # noqa: E402
from hfvram.memory.exact.tracker import Tracker  # noqa: E402
from hfvram.model import meta  # noqa: E402

pytestmark = pytest.mark.slow

COVERAGE = Path(__file__).parents[1] / "docs" / "coverage.md"
RECORDED = {"built": 458, "inference": 425, "training": 432}
"""How many classes ran when this was last written: fewer would be a loss."""
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96, "intermediate_size": 64}
DECODER = SMALL | {"num_key_value_heads": 2}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": 96}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
WHISPER = BART | {"max_source_positions": 40, "max_target_positions": 24, "num_mel_bins": 8, "pad_token_id": 0}
SOUND = SMALL | {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
SOUND |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BLIP = {
    "vision_config": VISION | {"image_size": 32, "patch_size": 16},
    "text_config": SMALL | {"encoder_hidden_size": 32},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "causal": ("LlamaForCausalLM", DECODER | {"model_type": "llama"}),
    "causal, experts in a loop": (
        "LongcatFlashForCausalLM",
        {"model_type": "longcat_flash", "hidden_size": 32, "num_layers": 1, "num_attention_heads": 4, "vocab_size": 96}
        | {"ffn_hidden_size": 64, "expert_ffn_hidden_size": 16, "n_routed_experts": 4, "zero_expert_num": 2}
        | {"moe_topk": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
        | {"v_head_dim": 8, "head_dim": 8},
    ),
    "causal, counts of tokens for each expert": (
        "AriaTextForCausalLM",
        DECODER | {"model_type": "aria_text", "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    ),
    "causal, a list of counts": (
        "JetMoeForCausalLM",
        SMALL
        | {"model_type": "jetmoe", "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}
        | {"kv_channels": 8},
    ),
    "seq2seq": ("BartForConditionalGeneration", BART | {"model_type": "bart"}),
    "seq2seq, experts by name": (
        "SwitchTransformersForConditionalGeneration",
        {"model_type": "switch_transformers", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        | {
            "num_decoder_layers": 2,
            "num_experts": 4,
            "vocab_size": 96,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
        },
    ),
    "masked": ("BertForMaskedLM", SMALL | {"model_type": "bert"}),
    "image-text-to-text, pictures needed": ("BlipForConditionalGeneration", BLIP | {"model_type": "blip"}),
    "speech-to-text": ("WhisperForConditionalGeneration", WHISPER | {"model_type": "whisper"}),
    "ctc": ("Wav2Vec2ForCTC", SOUND | {"model_type": "wav2vec2"}),
}


def run(name: str, mode: str, **options: Any) -> Timeline:
    class_name, config = MODELS[name]
    asked: dict[str, Any] = {"mode": mode, "ctx": 24, "dtype": "bf16", "quant": "none", "method": "simulate"}
    if mode == "inference":
        generates = meta.build(config, class_name, "bf16").can_generate()
        asked |= {"phase": "generate", "new_tokens": 4} if generates else {"phase": "encode"}
    return simulate(config, class_name, Request.from_dict(asked | options))


@pytest.mark.parametrize("name", MODELS)
def test_each_task_generates_or_reads(name: str) -> None:
    timeline = run(name, "inference")
    assert {tag.category for tag in timeline.tags} >= {"weights", "inputs", "activations"}


@pytest.mark.parametrize("name", MODELS)
def test_each_task_trains(name: str) -> None:
    timeline = run(name, "train")
    assert timeline.gradients_bytes > 0
    assert [phase for _, phase in timeline.marks].count("optimizer step") == 2


def test_sound_comes_as_frames_of_the_whole_window() -> None:
    # mel bins × twice the positions, as the second convolution halves them, in two bytes
    assert 8 * 80 * 2 in inputs_bytes(run("speech-to-text", "inference"))
    # a decoder learns as many tokens as it has positions for: 24 asked, 24 there, of eight bytes
    assert 24 * 8 in inputs_bytes(run("speech-to-text", "train", ctx=64))


def inputs_bytes(timeline: Timeline) -> list[int]:
    return [s for s, tag in zip(timeline.sizes, timeline.tags, strict=True) if tag.category == "inputs"]


def test_text_alone_is_tried_first() -> None:
    text = {"input_ids": (2, 24)}
    for name in ("causal", "seq2seq", "masked"):
        class_name, config = MODELS[name]
        assert candidates(meta.build(config, class_name, "bf16"), Request(ctx=24, batch=2)) == [text]
    class_name, config = MODELS["image-text-to-text, pictures needed"]
    pictured = {"pixel_values": (2, 3, 32, 32)} | text
    assert candidates(meta.build(config, class_name, "bf16"), Request(ctx=24, batch=2))[0] == pictured


def seen() -> Tracker:
    return Tracker(Timeline(Standing(())))


def test_routing_is_balanced() -> None:
    with seen():
        chosen = torch.empty((40, 2), dtype=torch.long, device="meta")
        mask = torch.nn.functional.one_hot(chosen, num_classes=8).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        assert hit.shape == (8, 1)
        assert torch.where(mask[3])[0].shape == (10,)  # 40 tokens · 2 choices / 8 experts
        counts = torch.histc(chosen.float(), bins=8, min=0, max=7)
        assert counts.long().cpu().tolist() == [10] * 8
        assert torch.bincount(chosen[:, 0], minlength=3).tolist() == [14, 13, 13]  # they add up


def test_few_tokens_reach_few_experts() -> None:
    with seen():
        mask = torch.nn.functional.one_hot(torch.empty((1, 2), dtype=torch.long, device="meta"), num_classes=8)
        assert torch.greater(mask.permute(2, 1, 0).sum(dim=(-1, -2)), 0).nonzero().shape == (2, 1)
        assert torch.where(mask.permute(2, 1, 0)[5])[0].shape == (1,)


def test_masks_select_what_they_are_assumed_to_be() -> None:
    with seen():
        x, ids = torch.empty((6, 4), device="meta"), torch.empty(6, dtype=torch.long, device="meta")
        assert x[ids == 7].shape == (0, 4)  # an ordinary token
        assert x[ids != -100].shape == (6, 4)
        assert x[torch.ones(6, dtype=torch.bool, device="meta")].shape == (6, 4)
        assert x.masked_select(torch.zeros((6, 4), dtype=torch.bool, device="meta")).shape == (0,)
        full = torch.ones(6, dtype=torch.long, device="meta")
        full[2] = 0
        assert full.sum().item() == 0  # something was written into it: nothing is known any more
        assert torch.unique(ids).shape == (1,)
        assert ids.tolist() == [0] * 6


def test_a_masks_positions_are_allocated() -> None:
    with seen() as watch:
        x = torch.empty((100, 4), device="meta")
        x[torch.ones(100, dtype=torch.bool, device="meta")]
    assert watch.timeline.sizes[-2:] == [100 * 8, 100 * 4 * 4]


def rows(heading: str) -> list[list[str]]:
    """Cells of the table below a heading."""
    section = COVERAGE.read_text().partition(heading)[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def test_the_summary_counts_what_the_table_lists() -> None:
    stages = ("build", "inference", "training")
    failed: Counter[tuple[str, str]] = Counter()
    for _, task, at, _ in rows("## What doesn't run\n"):
        for stage in stages if at == "build" else at.split(", "):
            failed[task, stage] += 1
            failed["all", stage] += 1
    summary = rows("# What the exact engine runs")
    assert [r[0] for r in summary][-1] == "all"
    for task, *cells in summary:
        for stage, cell in zip(stages, cells, strict=True):
            ran, total = map(int, re.findall(r"\d+", cell))
            assert total - ran == failed[task, stage], (task, stage)


def test_no_class_is_lost() -> None:
    _, *cells = rows("# What the exact engine runs")[-1]
    ran = {stage: int(cell.split()[0]) for stage, cell in zip(RECORDED, cells, strict=True)}
    assert all(ran[stage] >= RECORDED[stage] > 0 for stage in RECORDED), ran


def test_every_registered_class_is_counted() -> None:
    from transformers.models.auto import modeling_auto as auto

    tasks = (
        "CAUSAL_LM",
        "SEQ_TO_SEQ_CAUSAL_LM",
        "MASKED_LM",
        "IMAGE_TEXT_TO_TEXT",
        "MULTIMODAL_LM",
        "SPEECH_SEQ_2_SEQ",
    )
    names = [n for t in (*tasks, "CTC") for n in getattr(auto, f"MODEL_FOR_{t}_MAPPING_NAMES").values()]
    versions = re.search(r"transformers ([\d.]+)", COVERAGE.read_text())
    import transformers

    if versions is None or versions[1].rstrip(".") != transformers.__version__:
        pytest.skip("written with another version")
    total = sum(1 if isinstance(n, str) else len(n) for n in names)
    assert rows("# What the exact engine runs")[-1][1].endswith(f"of {total}")


def test_the_script_scales_completes_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(COVERAGE.parents[1] / "scripts"))
    import coverage_attempts as attempts

    cut, whole, *_ = attempts.configurations("llama")
    assert cut == ({"model_type": "llama", "num_hidden_layers": attempts.DEPTH}, "")
    assert whole == ({"model_type": "llama"}, "")
    case = attempts.Case("causal", "nemotron", "NemotronForCausalLM")  # whose default has no number of key heads
    assert attempts.attempt(case, "build") == {"why": "", "how": "with `num_key_value_heads`, `pad_token_id`"}
    lost = attempts.attempt(attempts.Case("causal", "llama", "NoSuchClass"), "build")
    assert lost["why"] == "transformers has no class 'NoSuchClass' for 'llama'"
