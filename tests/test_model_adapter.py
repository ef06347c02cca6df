"""Adapters: LoRA's tensors by configuration, against published counts and PEFT itself, and from an adapter's files."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest

from hfvram.errors import HfvramError
from hfvram.model.adapter import defaults, with_adapter
from hfvram.model.architecture import Architecture
from hfvram.model.infer import infer
from hfvram.read.checkpoint import Adapter, StoredTensor

LLAMA2_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
LLAMA32_3B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


def adapted(values: dict[str, Any], **config: Any) -> Architecture:
    return with_adapter(infer(values), Adapter("me/adapter", {"peft_type": "LORA", "r": 8, **config}, None))


def added(values: dict[str, Any], **config: Any) -> int:
    """Parameters of the adapter."""
    return sum(p.numel for p in adapted(values, **config).adapter)


def test_published_counts() -> None:
    """`print_trainable_parameters()` as printed in PEFT's and others' documentation."""
    assert added(LLAMA2_7B) == 4_194_304  # q and v: 32 · 2 · 8 · (4096 + 4096)
    assert added(LLAMA32_3B, r=32) == 9_175_040  # 28 · 32 · ((3072 + 3072) + (3072 + 1024))
    # QLoRA's setting: 32 · 16 · (4 · 8192 + 3 · (4096 + 11008))
    assert added(LLAMA2_7B, r=16, target_modules="all-linear") == 39_976_960


def test_it_stands_in_fp32_beside_the_model() -> None:
    a = adapted(TINY, r=2, target_modules=["q_proj"])
    # three layers: A 2 × 64 and B 64 × 2
    assert [(p.shape, p.kind, p.dtype) for p in a.adapter] == [
        ((2, 64), "adapter", "fp32"),
        ((64, 2), "adapter", "fp32"),
    ] * 3
    assert a.parameters == infer(TINY).parameters + 3 * 256


def test_ranks_by_name() -> None:
    targets = ["q_proj", "v_proj"]  # q 64 → 64, v 64 → 32
    assert added(TINY, r=1, target_modules=targets) == 3 * (128 + 96)
    assert added(TINY, r=1, target_modules=targets, rank_pattern={"v_proj": 5}) == 3 * (128 + 5 * 96)
    assert added(TINY, r=1, target_modules=targets, rank_pattern={"layers.1.self_attn.q_proj": 4}) == 3 * 224 + 3 * 128
    assert (
        added(TINY, r=1, target_modules=targets, rank_pattern={r"layers\.[01]\..*q_proj": 4}) == 3 * 224 + 2 * 3 * 128
    )
    assert added(TINY, r=1, target_modules=targets, rank_pattern={"(": 4}) == 3 * 224
    assert added(TINY, r=1, target_modules=targets, rank_pattern={"proj": 4}) == 3 * 224


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ({"target_modules": ["self_attn.q_proj"]}, 3 * 128),
        ({"target_modules": ["model.layers.1.self_attn.q_proj"]}, 128),
        ({"target_modules": r".*\.(q|v)_proj"}, 3 * 224),
        ({"target_modules": r"q_proj"}, None),  # a text is matched as a whole
        ({"target_modules": ["proj"]}, None),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}, 2 * 128),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, 128),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}, 3 * 128),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*layers\.1.*"}, 2 * 128),
        ({"target_modules": ["q_proj"], "use_dora": True}, 3 * (128 + 64)),
        ({"target_modules": ["v_proj"], "lora_bias": True}, 3 * (96 + 32)),
        ({"target_modules": ["embed_tokens"]}, 100 + 64),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, 3 * 128 + 6400),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]}, 3 * 128 + 6400 + 64),
    ],
)
def test_targets(config: dict[str, Any], parameters: int | None) -> None:
    if parameters is not None:
        assert added(TINY, r=1, **config) == parameters
        return
    with pytest.raises(HfvramError) as caught:
        adapted(TINY, r=1, **config)
    assert caught.value.kind == "usage"
    assert "match no module of LlamaForCausalLM" in caught.value.message


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"peft_type": "IA3"}, "usage"),
        ({"peft_type": ""}, "usage"),
        ({"peft_type": 7}, "bad_config"),
        ({"r": -1}, "bad_config"),
        ({"r": None}, "bad_config"),
        ({"r": 10**30}, "bad_config"),
        ({"target_modules": "("}, "bad_config"),
        ({"target_modules": ["q_proj", 7]}, "bad_config"),
        ({"target_modules": {"a": 1}}, "bad_config"),
        ({"rank_pattern": ["q_proj"]}, "bad_config"),
        ({"rank_pattern": {"q_proj": "x"}}, "bad_config"),
        ({"layers_to_transform": "all"}, "bad_config"),
        ({"target_parameters": "experts.gate_up_proj"}, "bad_config"),
    ],
)
def test_refused(config: dict[str, Any], kind: str) -> None:
    with pytest.raises(HfvramError) as caught:
        adapted(TINY, **config)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "(([a-z._0-9]+)+)+!"},
        {"target_modules": ["q_proj"], "rank_pattern": {"(([a-z._0-9]+)+)+!": 4}},
        {"target_modules": ["q_proj"], "rank_pattern": {f"layers.{i}.self_attn.q_proj": 4 for i in range(4000)}},
        {"target_modules": ["q_proj"], "exclude_modules": "(a|aa|l|m|o)*!"},
    ],
)
def test_hostile_patterns_are_over_at_once(config: dict[str, Any]) -> None:
    start = time.process_time()
    with contextlib.suppress(HfvramError):
        adapted(LLAMA2_7B, **config)
    assert time.process_time() - start < 5


def test_an_adapters_own_tensors_lead() -> None:
    stored = (StoredTensor("a.lora_A.weight", "BF16", (8, 64), 1024), StoredTensor("vera_lambda_b", "F32", (64,), 256))
    a = with_adapter(infer(TINY), Adapter("me/adapter", {"peft_type": "VERA"}, stored))
    assert [(p.name, p.shape, p.dtype) for p in a.adapter] == [
        ("a.lora_A.weight", (8, 64), "fp32"),
        ("vera_lambda_b", (64,), "fp32"),
    ]


def test_defaults_are_the_families_own() -> None:
    assert defaults("llama") == ["q_proj", "v_proj"]
    assert defaults("gpt2") == ["c_attn"]
    assert defaults("t5") == ["q", "v"]


MIXTRAL = {"num_local_experts": 2, **TINY, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
MODELS = [
    TINY,
    {**TINY, "tie_word_embeddings": True},
    {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 32},
    MIXTRAL,
    {
        "model_type": "bert",
        "architectures": ["BertForSequenceClassification"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 100,
    },
    {"model_type": "t5", "d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 100},
]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"target_modules": "all-linear"},
    {"target_modules": "all-linear", "use_dora": True},
    {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
    {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"},
    {"rank_pattern": {r"\d+.*(q_proj|c_attn|query|q)": 3}},
    {"layers_to_transform": [1]},
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
@pytest.mark.parametrize("values", MODELS, ids=lambda v: str(v["model_type"]))
def test_against_peft(values: dict[str, Any], settings: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    import torch

    from hfvram.model import meta

    if values["model_type"] == "mixtral" and settings.get("target_modules") == "all-linear":
        pytest.skip("PEFT makes target_parameters of it: see the next test")
    model = meta.build(values, None, "fp32").to_empty(device="cpu")
    asked = dict(settings)
    if "target_modules" not in asked:
        asked["target_modules"] = defaults(values["model_type"])
    with torch.device("cpu"):
        built = peft.get_peft_model(model, peft.LoraConfig(r=4, **asked))
    theirs = sum(p.numel() for name, p in built.named_parameters() if "lora" in name or "modules_to_save" in name)
    assert added(values, r=4, **settings) == theirs


@pytest.mark.slow
def test_experts_against_peft() -> None:
    """PEFT turns "all-linear" into this for models whose experts are fused, and saves it so."""
    peft = pytest.importorskip("peft")
    import torch

    from hfvram.model import meta

    model = meta.build(MIXTRAL, None, "fp32").to_empty(device="cpu")
    settings = {
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": ["gate_up_proj", "down_proj", "gate.weight"],
        "rank_pattern": {r".*\.gate_up_proj": 8},
    }
    with torch.device("cpu"):
        built = peft.get_peft_model(model, peft.LoraConfig(r=4, **settings))
    theirs = sum(p.numel() for name, p in built.named_parameters() if "lora" in name)
    # a layer: 4 · (128 + 96); the router 4 · (64 + 2); two experts 2 · 8 · (64 + 192) and 2 · 4 · (96 + 64)
    assert theirs == 3 * (896 + 264 + 4096 + 1280)
    assert added(MIXTRAL, r=4, **settings) == theirs


@pytest.mark.slow
def test_default_targets_are_pefts() -> None:
    constants = pytest.importorskip("peft.utils.constants")
    table = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    ours = {kind: defaults(kind) for kind in table if kind not in ("gemma4", "blip-2", "chatglm", "btlm", "layoutlm")}
    gone = ("RefinedWeb", "rwkv")  # types that transformers no longer has
    assert {k: v for k, v in ours.items() if not k.startswith(gone)} == {
        k: table[k] for k in ours if not k.startswith(gone)
    }


def test_an_adapter_folder_end_to_end(tmp_path: Path) -> None:
    import hfvram

    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(TINY))
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    plain = hfvram.estimate(str(tmp_path / "base"), ctx=64)
    both = hfvram.estimate(str(tmp_path), ctx=64)
    for method in ("formula", "simulate"):
        with pytest.raises(hfvram.HfvramError, match="this is an adapter, valid is its base model"):
            hfvram.estimate(str(tmp_path), ctx=64, mode="lora", method=method)
    more = 3 * 4 * (64 + 64)
    assert both.model.parameters == plain.model.parameters + more
    assert both.weights_bytes == plain.weights_bytes + 4 * more
    assert sum(i.bytes for i in both.items if i.name == "adapter") == 4 * more
