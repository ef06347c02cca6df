"""LoRA and QLoRA by PEFT on meta: what is added, frozen and cast, by hand."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from hfvram.errors import HfvramError  # noqa: E402
from hfvram.memory.exact.adapters import targets  # noqa: E402
from hfvram.memory.exact.simulate import simulate  # noqa: E402
from hfvram.memory.timeline import Timeline  # noqa: E402
from hfvram.request import Request  # noqa: E402

pytestmark = pytest.mark.slow

LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}


def adapted(**options: Any) -> Timeline:
    options = {"mode": "lora", "ctx": 64, "dtype": "bf16", "quant": "none", "method": "simulate", "lora_r": 8} | options
    return simulate(LLAMA, None, Request.from_dict(options))


def test_all_linear_layers_but_the_head() -> None:
    a_layer = 8 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    timeline = adapted()
    assert timeline.trainable_parameters == 2 * a_layer
    assert timeline.gradients_bytes == 4 * 2 * a_layer  # adapters of a bf16 model are fp32


@pytest.mark.parametrize(
    ("targets", "a_layer"),
    [
        ("q_proj", 8 * 128),
        (["q_proj", "v_proj"], 8 * (128 + 96)),
        (r".*\.1\.self_attn\.(q|v)_proj", 8 * (128 + 96) / 2),
        (r".*mlp.*_proj", 8 * 3 * 192),
    ],
)
def test_targets_are_a_name_names_or_an_expression(targets: Any, a_layer: float) -> None:
    assert adapted(lora_targets=targets).trainable_parameters == 2 * a_layer


@pytest.mark.parametrize(("dtype", "bytes_"), [("fp32", 4), ("bf16", 2), ("fp16", 2)])
def test_the_dtype_of_adapters(dtype: str, bytes_: int) -> None:
    timeline = adapted(adapter_dtype=dtype, lora_targets="q_proj")
    assert timeline.gradients_bytes == 2 * 8 * 128 * bytes_


def test_dropout_keeps_a_mask() -> None:
    def saved(timeline: Timeline) -> int:
        at = next(at for at, phase in timeline.marks if phase == "backward")
        return sum(timeline.sizes[h] for h in timeline.live(at))

    dropped = saved(adapted(lora_dropout=0.1, lora_targets="q_proj"))
    # The product keeps its fp32 input with and without; new is a boolean a value. Nothing needs a gradient of the first
    # layer's input, so that its mask goes.
    assert dropped - saved(adapted(lora_targets="q_proj")) == 64 * 64


def test_targets_that_match_nothing_are_told() -> None:
    with pytest.raises(HfvramError, match=r"--lora-targets: Target modules.* Valid are all-linear, .*q_proj"):
        adapted(lora_targets="query")


def test_qlora_casts_what_is_not_quantized_to_fp32() -> None:
    timeline = adapted(mode="qlora")
    start = timeline.live(timeline.restarts[-1])
    weights = [(timeline.tags[h].name, timeline.sizes[h]) for h in start if timeline.tags[h].category == "weights"]
    assert ("model.embed_tokens", 256 * 64 * 4) in weights
    assert ("lm_head", 256 * 64 * 4) in weights
    assert ("model.norm", 64 * 4) in weights
    assert ("model.layers.*.mlp.up_proj", 64 * 128 // 2) in weights


def test_a_run_leaves_torch_as_it_was() -> None:
    adapted(gradient_checkpointing=True)
    assert torch.autocast.__name__ == "autocast"
    assert "entered" not in torch.utils.checkpoint._recomputation_hook.__enter__.__name__


def test_a_model_of_sound_is_wrapped_as_it_is() -> None:
    whisper = {"model_type": "whisper", "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 512}
    whisper |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128}
    whisper |= {"decoder_ffn_dim": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    options = {"mode": "lora", "ctx": 64, "dtype": "bf16", "quant": "none", "lora_r": 8, "lora_targets": ["q_proj"]}
    timeline = simulate(whisper | {"decoder_start_token_id": 1}, None, Request.from_dict(options))
    assert timeline.trainable_parameters == (2 + 2 * 2) * 8 * (64 + 64)  # self and cross attention in the decoder


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(", "no regular expression"),
        ("(.*)*x$", "none within another"),
        (r"(a*a)+\.b", "none within another"),
        (r"((a{2,})b)*", "none within another"),
        (".*.*.*.*.*x", "up to 4 repeats"),
    ],
)
def test_patterns_that_may_never_end_are_refused(pattern: str, said: str) -> None:
    with pytest.raises(HfvramError, match=said) as caught:
        targets(pattern)
    assert caught.value.kind == "usage"


@pytest.mark.parametrize("pattern", [r".*\.(q|v)_proj", r".*layers\.\d+\.mlp\..*", r"model\.layers\.(1|2)\d*\..*_proj"])
def test_patterns_that_people_write_are_taken(pattern: str) -> None:
    assert targets(pattern) == pattern
