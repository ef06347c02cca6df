"""Models on the meta device: which class is built, what its tensors are called, and what is refused."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hfvram.errors import HfvramError
from hfvram.model import meta
from hfvram.model.layers import Param

TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TINY |= {"pad_token_id": 0}
LLAMA = {"model_type": "llama", **TINY, "num_key_value_heads": 2}


def failure(values: Any, class_name: str | None = None) -> HfvramError:
    with pytest.raises(HfvramError) as error:
        meta.build(values, class_name, "bf16")
    return error.value


@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    if module == "transformers":
        pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, module, None)
    error = failure(LLAMA)
    assert error.kind == "missing_extra"
    assert module in error.message
    assert "pip install 'hfvram[exact]'" in error.message


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"text_config": {"n_layer": 5000}}, "n_layer"),
        ({"hidden_size": 1 << 25}, "hidden_size"),
        ({"conv_dim": [1] * 100_000}, "conv_dim"),
    ],
)
def test_absurd_sizes_are_found_before_anything_is_built(values: dict[str, Any], words: str) -> None:
    with pytest.raises(HfvramError, match=words) as error:
        meta.check(values)
    assert error.value.kind == "bad_config"


def test_nesting_has_a_bound() -> None:
    nested: dict[str, Any] = {}
    for _ in range(200):
        nested = {"a": nested}
    with pytest.raises(HfvramError, match="nested"):
        meta.check(nested)


def test_sizes_of_real_models_pass() -> None:
    meta.check({"num_hidden_layers": 126, "n_routed_experts": 512, "max_position_embeddings": 10_485_760})
    meta.check({"rope_theta": 1e12, "time_step_limit": [0.0, float("inf")], "vocab_size": 262_208})


@pytest.mark.slow
def test_a_model_takes_no_memory_and_keeps_its_dtype() -> None:
    start = time.perf_counter()
    model = meta.build({**LLAMA, "num_hidden_layers": 100, "hidden_size": 8192}, None, "fp16")
    assert {(p.device.type, str(p.dtype)) for p in model.parameters()} == {("meta", "torch.float16")}
    assert time.perf_counter() - start < 30
    assert type(model).__name__ == "LlamaForCausalLM"


CLASSES: list[tuple[dict[str, Any], str | None, str]] = [
    (LLAMA, None, "LlamaForCausalLM"),
    (LLAMA, "LlamaModel", "LlamaModel"),
    ({**LLAMA, "architectures": ["LlamaForSequenceClassification"]}, None, "LlamaForSequenceClassification"),
    ({**LLAMA, "architectures": ["RemoteLlamaForCausalLM", "LlamaModel"]}, None, "LlamaModel"),
    ({**LLAMA, "architectures": ["os", "AutoModel", "LlamaConfig", "__doc__"]}, None, "LlamaForCausalLM"),
    ({"model_type": "bert", **TINY}, None, "BertModel"),
    ({"model_type": "bert", **TINY, "is_decoder": True}, None, "BertLMHeadModel"),
    ({"model_type": "t5", "vocab_size": 64, "num_layers": 1}, None, "T5ForConditionalGeneration"),
    ({"model_type": "vit", "num_hidden_layers": 1}, None, "ViTModel"),
    ({"model_type": "qwen3_5", "text_config": TINY}, None, "Qwen3_5ForConditionalGeneration"),
    ({"model_type": "qwen3_5", "text_config": TINY}, "Qwen3_5ForCausalLM", "Qwen3_5ForCausalLM"),
    ({**LLAMA, "quantization_config": {"quant_method": "nonesuch"}}, None, "LlamaForCausalLM"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("values", "class_name", "built"), CLASSES)
def test_the_class_is_the_configurations_own(values: dict[str, Any], class_name: str | None, built: str) -> None:
    assert type(meta.build(values, class_name, "bf16")).__name__ == built


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "class_name", "kind"),
    [
        ({"model_type": "nonesuch"}, None, "unknown_architecture"),
        ({"model_type": ["llama"]}, None, "unknown_architecture"),
        ({}, None, "unknown_architecture"),
        (LLAMA, "NoSuchModel", "unknown_architecture"),
        (LLAMA, "os", "unknown_architecture"),
        (LLAMA, "AutoModelForCausalLM", "unknown_architecture"),
        (LLAMA, "LlamaConfig", "unknown_architecture"),
        (LLAMA, "_LazyModule", "unknown_architecture"),
        (LLAMA, "GPT2LMHeadModel", "unknown_architecture"),
        ({**LLAMA, "hidden_size": "wide"}, None, "bad_config"),
        ({**LLAMA, "num_attention_heads": 0}, None, "bad_config"),
        ({**LLAMA, "hidden_act": "nonesuch"}, None, "bad_config"),
    ],
)
def test_what_cannot_be_built_is_one_line(values: dict[str, Any], class_name: str | None, kind: str) -> None:
    error = failure(values, class_name)
    assert error.kind == kind
    assert "\n" not in error.message


@pytest.mark.slow
def test_parameters_once_with_their_kinds() -> None:
    values = {**LLAMA, "num_hidden_layers": 1, "attention_bias": True, "tie_word_embeddings": False}
    params = meta.params(meta.build(values, None, "bf16"))
    assert params[:5] == (
        Param("model.embed_tokens.weight", (64, 32), "embedding"),
        Param("model.layers.0.self_attn.q_proj.weight", (32, 32), "linear"),
        Param("model.layers.0.self_attn.q_proj.bias", (32,), "bias"),
        Param("model.layers.0.self_attn.k_proj.weight", (16, 32), "linear"),
        Param("model.layers.0.self_attn.k_proj.bias", (16,), "bias"),
    )
    by_name = {p.name: p for p in params}
    assert by_name["lm_head.weight"] == Param("lm_head.weight", (64, 32), "head")
    assert by_name["model.norm.weight"].kind == "norm"
    assert by_name["model.rotary_emb.inv_freq"] == Param("model.rotary_emb.inv_freq", (4,), "buffer", "fp32")
    assert len(by_name) == len(params)


@pytest.mark.slow
def test_a_tied_head_is_the_embedding() -> None:
    names = [p.name for p in meta.params(meta.build({**LLAMA, "tie_word_embeddings": True}, None, "bf16"))]
    assert "lm_head.weight" not in names
    # CamemBERT registers its head before the encoder.
    camembert = {"model_type": "camembert", **TINY}
    names = [p.name for p in meta.params(meta.build(camembert, "CamembertForMaskedLM", "bf16"))]
    assert "roberta.embeddings.word_embeddings.weight" in names
    assert "lm_head.decoder.weight" not in names


@pytest.mark.slow
def test_experts_convolutions_and_dtypes_of_their_own() -> None:
    jamba = {"model_type": "jamba", **TINY, "num_key_value_heads": 2, "num_experts": 3}
    kinds = {p.name.removeprefix("model.layers.1."): p.kind for p in meta.params(meta.build(jamba, None, "bf16"))}
    assert kinds["feed_forward.experts.gate_up_proj"] == "experts"
    assert kinds["feed_forward.router.weight"] == "linear"
    assert kinds["mamba.conv1d.weight"] == "conv"
    assert kinds["mamba.A_log"] == "other"
    deberta = meta.params(meta.build({"model_type": "deberta", **TINY}, None, "bf16"))
    assert {p.dtype for p in deberta if p.name.endswith("q_bias")} == {"fp32"}


CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
class OwnConfig(PretrainedConfig):
    model_type = "own"
    width = 8
class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(config.width, config.width)
        self.post_init()
"""


@pytest.mark.slow
def test_remote_code_runs_only_when_it_is_trusted(tmp_path: Path, hf_home: Path) -> None:
    values = {"model_type": "own", "width": 16, "quantization_config": {"quant_method": "nonesuch"}}
    values["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    (tmp_path / "own.py").write_text(CODE)
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert failure(values).kind == "unknown_architecture"
    model = meta.build(values, None, "bf16", trust_remote_code=True, path=str(tmp_path))
    assert meta.params(model) == (Param("layer.weight", (16, 16)), Param("layer.bias", (16,), "bias"))


def test_a_configuration_names_no_kernels() -> None:
    """transformers fetches kernels of other names from the Hub, and runs them."""
    values = {"attn_implementation": "a/b", "_attn_implementation": "c/d", "_experts_implementation_internal": "e/f"}
    nested = {"model_type": "llama", "text_config": dict(values), "hidden_size": 64, **values}
    assert meta.without_kernels(nested) == {"model_type": "llama", "text_config": {}, "hidden_size": 64}
    model = meta.build({"model_type": "llama", "num_hidden_layers": 1, **values}, None, "bf16")
    assert model.config._attn_implementation == "sdpa"
    eager = meta.build({"model_type": "llama", "num_hidden_layers": 1, **values}, None, "bf16", attention="eager")
    assert eager.config._attn_implementation == "eager"
