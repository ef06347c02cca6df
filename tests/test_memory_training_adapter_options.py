"""Rank-stabilized LoRA, DoRA, embeddings as targets, modules trained whole, frozen parts: by hand, and against PEFT."""

from typing import Any

import pytest

from hfvram.errors import HfvramError
from hfvram.memory.allocator import replay
from hfvram.memory.training.train import timeline
from hfvram.model.infer import infer
from hfvram.request import Request
from tests.test_memory_training_adapters import adapted
from tests.test_memory_training_train import LLAMA, MODELS, live, sequence


def test_rank_stabilized_is_another_factor() -> None:
    assert sequence(adapted(rslora=True)) == sequence(adapted())


def test_modules_trained_whole_by_hand() -> None:
    """The head, 256 × 64, in bf16 beside the adapters' r·(64 + 64) in fp32; the original stays."""
    t = adapted(lora_targets="q_proj", modules_to_save="lm_head")
    rank = 2 * 8 * (64 + 64)
    assert t.trainable_parameters == rank + 256 * 64
    assert t.gradients_bytes == 4 * rank + 2 * 256 * 64
    assert live(t, "forward")["modules trained whole"] == 2 * 256 * 64
    assert t.standing.bytes_by_tag == adapted(lora_targets="q_proj").standing.bytes_by_tag
    assert adapted(modules_to_save=["mlp"]).trainable_parameters == (
        adapted(lora_targets="q_proj,k_proj,v_proj,o_proj").trainable_parameters + 2 * 3 * 64 * 96
    )


def test_magnitudes_and_embeddings_by_hand() -> None:
    """DoRA has one number more an output; an embedding of 256 × 64 has r·(256 + 64)."""
    assert adapted(dora=True, lora_targets="q_proj").trainable_parameters == 2 * (8 * (64 + 64) + 64)
    t = adapted(dora=True, lora_targets="q_proj")
    assert live(t, "backward")["DoRA, scaled output (saved activations)"] > 0
    assert adapted(lora_targets="embed_tokens").trainable_parameters == 8 * (256 + 64)


def test_frozen_parts_by_hand() -> None:
    whole, part = adapted(mode="train"), adapted(mode="train", freeze="embed_tokens,mlp")
    assert whole.trainable_parameters - part.trainable_parameters == 256 * 64 + 2 * 3 * 64 * 96
    assert part.gradients_bytes == 2 * part.trainable_parameters
    assert replay(part).allocated_bytes < replay(whole).allocated_bytes
    assert adapted(mode="train", freeze=r".*layers\.1\..*").trainable_parameters < whole.trainable_parameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mode": "train", "freeze": "nothing"},
            "--freeze nothing matches nothing: valid are down_proj, embed_tokens, gate_proj",
        ),
        ({"mode": "train", "freeze": ".*nothing"}, "matches nothing: valid are"),
        ({"mode": "train", "freeze": "(mlp"}, "no regular expression"),
        ({"mode": "train", "freeze": "weight"}, "leaves nothing to train"),
        ({"mode": "train", "freeze": "mlp", "gpus": 2}, "no formula"),
        ({"dora": True, "gpus": 2, "fsdp": "full_shard"}, "no formula"),
        ({"lora_targets": "embed_tokens", "gpus": 2, "fsdp": "full_shard"}, "no formula"),
        ({"modules_to_save": "classifier"}, "--modules-to-save classifier matches nothing: valid are"),
        ({"modules_to_save": "norm"}, "also the end of"),
        ({"modules_to_save": "mlp", "mode": "qlora"}, "is packed, and can't be trained"),
        ({"dora": True, "lora_targets": "embed_tokens"}, "--dora around model.embed_tokens.weight"),
        ({"dora": True, "lora_dropout": 0.1, "mixed_precision": "bf16", "dtype": "fp32"}, "no formula"),
    ],
    ids=str,
)
def test_what_can_not_be_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(HfvramError, match=message) as caught:
        adapted(**options)
    assert caught.value.kind == "usage"


def test_layers_that_differ_are_stretched_as_if_written() -> None:
    deep = infer(LLAMA | {"num_hidden_layers": 12})
    for options in (
        {"dora": True},
        {"modules_to_save": ["mlp"]},
        {"mode": "train", "freeze": r".*layers\.[0-8]\..*"},
        {"mode": "train", "freeze": r".*layers\.[3-9]\..*", "gradient_checkpointing": True},
    ):
        request = Request.from_dict({"mode": "lora", "ctx": 32, "dtype": "bf16", "quant": "none"} | options)
        short, whole = (timeline(deep, request, whole=whole) for whole in (False, True))
        assert sequence(short) == sequence(whole)
        assert short.trainable_parameters == whole.trainable_parameters


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rslora": True}),
    ("llama", {"modules_to_save": ["lm_head"]}),
    ("qwen2", {"modules_to_save": ["lm_head", "embed_tokens"], "grad_accum": 2}),
    ("gemma2", {"modules_to_save": ["lm_head"], "mode": "qlora"}),
    ("gemma2", {"modules_to_save": ["embed_tokens"], "mode": "qlora", "gradient_checkpointing": True}),
    ("llama", {"modules_to_save": ["mlp"], "gradient_checkpointing": True, "optimizer": "muon"}),
    ("gpt2", {"modules_to_save": ["wte", "c_fc"]}),
    ("llama", {"dora": True}),
    ("llama", {"dora": True, "lora_dropout": 0.1, "gradient_checkpointing": True}),
    ("gpt2", {"dora": True}),
    ("gpt2", {"dora": True, "lora_dropout": 0.1}),
    ("gpt2", {"dora": True, "dtype": "fp32", "mixed_precision": "bf16"}),
    ("qwen2", {"dora": True, "adapter_dtype": "bf16", "lora_targets": "q_proj,lm_head"}),
    ("llama", {"lora_targets": "embed_tokens"}),
    ("llama", {"lora_targets": "embed_tokens", "adapter_dtype": "bf16", "optimizer": "muon", "lora_dropout": 0.1}),
    ("gemma2", {"lora_targets": "embed_tokens,q_proj", "gradient_checkpointing": True}),
    ("gemma2", {"lora_targets": "embed_tokens,q_proj", "mode": "qlora"}),
    ("gpt2", {"lora_targets": "wte", "dtype": "fp32", "mixed_precision": "bf16"}),
    ("llama", {"mode": "train", "freeze": "embed_tokens"}),
    ("llama", {"mode": "train", "freeze": "layers.0", "gradient_checkpointing": True}),
    ("qwen2", {"mode": "train", "freeze": ["self_attn", "norm"]}),
    ("gemma2", {"mode": "train", "freeze": r".*(mlp|layernorm).*", "gradient_checkpointing": True}),
    ("gpt2", {"mode": "train", "freeze": r".*bias"}),
    ("gpt_neox", {"mode": "train", "freeze": "weight"}),
    ("bloom", {"mode": "train", "freeze": "bias", "optimizer": "adafactor"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_event_by_event_as_pefts_own_code(name: str, options: dict[str, Any]) -> None:
    pytest.importorskip("peft")
    from hfvram.memory.exact.simulate import simulate

    request = {"mode": "lora", "ctx": 32, "dtype": "bf16", "quant": "none", "lora_r": 8, "method": "simulate"} | options
    if request["mode"] == "qlora":
        request["quant"] = "nf4"
    exact = simulate(MODELS[name], None, Request.from_dict(request))
    formula = adapted(MODELS[name], on_meta=True, **options)
    assert sequence(formula) == sequence(exact)
    for fact in ("gradients_bytes", "optimizer_bytes", "managed_bytes", "trainable_parameters"):
        assert getattr(formula, fact) == getattr(exact, fact)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "train", "freeze": "nothing"}, "--freeze nothing matches nothing"),
        ({"modules_to_save": ["classifier"]}, "--modules-to-save classifier matches nothing"),
        ({"modules_to_save": ["mlp"], "mode": "qlora", "quant": "nf4"}, "is packed"),
    ],
    ids=str,
)
def test_the_exact_engine_says_the_same(options: dict[str, Any], message: str) -> None:
    pytest.importorskip("peft")
    from hfvram.memory.exact.simulate import simulate

    request = {"mode": "lora", "ctx": 32, "dtype": "bf16", "quant": "none", "method": "simulate"} | options
    with pytest.raises(HfvramError, match=message) as caught:
        simulate(LLAMA, None, Request.from_dict(request))
    assert caught.value.kind == "usage"


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODELS))
def test_trainable_parameters_are_pefts(name: str) -> None:
    """Of every type: all linear layers, names, a regular expression, and a module trained whole."""
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(MODELS[name])
    lm = AutoConfig.for_model(config.pop("model_type"), **config)
    last = next(p.name.split(".")[-2] for p in infer(MODELS[name]).text.layers[0].all_params() if p.kind == "linear")
    whole = infer(MODELS[name]).text.before[0].name.split(".")[-2]
    for targets, saved in (("all-linear", []), ([last], []), (rf".*\.1\..*{last}", []), ("all-linear", [whole])):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(lm)
            wanted = peft.LoraConfig(r=8, target_modules=targets, modules_to_save=saved or None, task_type="CAUSAL_LM")
            trained = peft.get_peft_model(model, wanted).get_nb_trainable_parameters()[0]
        t = adapted(MODELS[name], lora_targets=targets, modules_to_save=saved)
        assert t.trainable_parameters == trained, (targets, saved)
