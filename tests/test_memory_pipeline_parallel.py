"""Stages of a pipeline by formula: a small Llama's by hand, whole models that stages add up to, and Megatron's rule."""

from typing import Any

import pytest
from test_memory_training_moe import MIXTRAL
from test_memory_training_train import GROUPED, SMALL, live, sequence

import hfvram
from hfvram.answer.supported import check
from hfvram.errors import HfvramError
from hfvram.memory import formula
from hfvram.memory.pipeline_parallel import stages
from hfvram.memory.theory import microbatches_in_flight
from hfvram.memory.timeline import Timeline
from hfvram.memory.training.train import timeline
from hfvram.model.infer import infer
from hfvram.request import Request

LLAMA = GROUPED | {"model_type": "llama", "num_hidden_layers": 8}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama, tied": LLAMA | {"tie_word_embeddings": True},
    "llama, uneven": LLAMA | {"num_hidden_layers": 27},
    "gpt2": {"model_type": "gpt2", "vocab_size": 256, "n_embd": 64, "n_layer": 6, "n_head": 4, "n_positions": 128},
    "bloom": {"model_type": "bloom", "vocab_size": 256, "hidden_size": 64, "n_layer": 5, "n_head": 4},
    "gemma2": LLAMA | {"model_type": "gemma2", "head_dim": 16, "sliding_window": 16},
    "granite": LLAMA | {"model_type": "granite", "embedding_multiplier": 12.0},
    "gpt_neox": SMALL | {"model_type": "gpt_neox", "num_hidden_layers": 5},
    "mixtral": MIXTRAL | {"num_hidden_layers": 5},
    "mamba": {"model_type": "mamba", "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 6, "state_size": 16},
}
ROWS = 32
H = ROWS * 64 * 2
"""Hidden states of 32 tokens in bf16."""


def asked(**options: Any) -> Request:
    base = {"mode": "train", "ctx": 32, "dtype": "bf16", "quant": "none", "method": "formula", "optimizer": "sgd"}
    return Request.from_dict(base | options)


def run(config: dict[str, Any], **options: Any) -> list[Timeline]:
    """A timeline for each stage."""
    request = asked(**options)
    return [timeline(infer(config), request, stage=stage) for stage in stages(request)]


def weights(t: Timeline) -> int:
    return sum(n for n, tag in t.standing.tensors if tag.category == "weights")


def saved(t: Timeline) -> dict[str, int]:
    return {name.removesuffix(" (saved activations)"): n for name, n in live(t, "backward").items()}


@pytest.mark.parametrize(("pp", "m"), [(2, 1), (2, 4), (4, 2), (4, 8)])
def test_what_each_stage_keeps_for_its_microbatches(pp: int, m: int) -> None:
    """8 layers of h 64, f 96, 4 heads and 2 KV heads of 16, V 256; before a stage's first backward pass."""
    for i, t in enumerate(run(LLAMA, pp=pp, grad_accum=m)):
        kept, flying, last = saved(t), min(pp - i, m), i == pp - 1
        layers = flying * (8 // pp)
        assert kept["feed-forward, product"] == layers * ROWS * 96 * 2
        assert kept["keys and values"] == layers * ROWS * 2 * 16 * 2
        assert kept["normalization in fp32"] == (2 * layers + last) * ROWS * 64 * 4
        assert kept.get("hidden states of the stage before", 0) == (i > 0) * flying * H
        assert kept.get("embeddings", 0) == 0  # nothing needs them once the first norm has its own copy
        assert kept.get("logits", 0) == last * ROWS * 256 * 2
        # What is sent stays, too: the last layer's output, which the next layer on this stage would have let go.
        assert kept.get("hidden states", 0) == (not last) * flying * H


def test_with_checkpointing_a_stage_keeps_inputs_and_what_it_sent() -> None:
    for i, t in enumerate(run(LLAMA, pp=4, grad_accum=8, gradient_checkpointing=True)):
        kept, flying, last = saved(t), 4 - i, i == 3
        assert kept.get("hidden states of the stage before", 0) == (i > 0) * flying * H
        # Two layers: between them one tensor, and one that is sent.
        assert kept["hidden states"] == (1 if last else 2) * flying * H
        assert "feed-forward, product" not in kept


def test_a_gradient_comes_for_what_was_sent_and_goes_for_what_was_received() -> None:
    first, middle, last = run(LLAMA, pp=3, grad_accum=1)
    for t, received, returned in ((first, 0, 1), (middle, 1, 1), (last, 1, 0)):
        names = [t.tags[h].name for h in t.events[t.restarts[-1] :] if h >= 0]
        assert names.count("hidden states of the stage before (saved activations)") == 2 * received  # two steps
        assert names.count("gradients of the stage after") == 2 * returned


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_stages_add_up_to_the_model(name: str, pp: int) -> None:
    architecture = infer(MODELS[name])
    found = run(MODELS[name], pp=pp, grad_accum=2)
    twice = architecture.text.before[0].numel if not architecture.head else 0  # a tied table on first and last
    parameters = architecture.parameters + twice
    assert sum(weights(t) for t in found) == weights(timeline(architecture, asked())) + 2 * twice
    assert sum(t.gradients_bytes for t in found) == 2 * parameters
    assert all(t.trainable_parameters == architecture.parameters for t in found)


@pytest.mark.parametrize("name", MODELS)
def test_the_first_stage_has_the_most_activations_and_more_stages_less_weights(name: str) -> None:
    before = None
    for pp in (2, 3, 4):
        found = run(MODELS[name], pp=pp, grad_accum=8, batch=2)
        most = [max(n for _, n in t.phases().values()) for t in found[:-1]]
        if MODELS[name].get("num_hidden_layers", 8) % pp == 0:
            assert most == sorted(most, reverse=True)
        assert most[0] == max(most)
        heaviest = max(weights(t) for t in found)
        assert before is None or heaviest <= before
        before = heaviest


@pytest.mark.parametrize("m", [1, 2, 3, 4, 8, 64])
def test_microbatches_in_flight_are_megatrons(m: int) -> None:
    one = saved(run(LLAMA, pp=4, grad_accum=1)[0])["feed-forward, product"]
    first = saved(run(LLAMA, pp=4, grad_accum=m)[0])["feed-forward, product"]
    assert first == one * microbatches_in_flight(4, microbatches=m)


def test_later_microbatches_add_nothing_but_with_gpipe() -> None:
    """One more than are in flight is written in full, and so are two: what comes after them repeats."""
    for stage in range(4):
        peaks = {run(LLAMA, pp=4, grad_accum=m)[stage].fullest_bytes() for m in (4 - stage + 1, 4 - stage + 2, 40)}
        assert len(peaks) == 1
    few, many = (run(LLAMA, pp=4, grad_accum=m, pp_schedule="gpipe")[0] for m in (4, 8))
    assert saved(many)["feed-forward, product"] == 2 * saved(few)["feed-forward, product"]


@pytest.mark.parametrize(("pp", "v", "m"), [(2, 2, 2), (2, 4, 8), (4, 2, 4), (4, 2, 16)])
def test_what_chunks_keep(pp: int, v: int, m: int) -> None:
    """Of 8 layers a rank has v times 8 ÷ (pp·v), and as many microbatches of each in flight as Megatron-LM warms up by
    (and one); of those the last rank's head is passed once, the others' chunks send all that they make."""
    for i, t in enumerate(run(LLAMA, pp=pp, pp_chunks=v, grad_accum=m)):
        flying = min((pp - i - 1) * 2 + (v - 1) * pp + 1, m * v)
        kept, layers, last = saved(t), 8 // (pp * v), i == pp - 1
        assert kept["feed-forward, product"] == flying * layers * ROWS * 96 * 2
        # Passes through the last chunk of the last rank, which end in the loss: of every group of pp·v the last pp.
        heads = last * sum(k % (pp * v) // pp == v - 1 for k in range(flying))
        assert kept["normalization in fp32"] == (2 * layers * flying + heads) * ROWS * 64 * 4
        assert kept["hidden states"] == (flying - heads) * H
        # Passes through the first chunk of the first rank start from token ids.
        starts = (i == 0) * sum(k % (pp * v) // pp == 0 for k in range(flying))
        assert kept.get("hidden states of the stage before", 0) == (flying - starts) * H


@pytest.mark.parametrize("name", ["llama", "llama, tied", "mamba"])
@pytest.mark.parametrize(("pp", "v"), [(2, 2), (2, 1)])
def test_chunks_add_up_to_the_model(name: str, pp: int, v: int) -> None:
    config = MODELS[name] | {"num_hidden_layers": 8}
    architecture = infer(config)
    found = run(config, pp=pp, pp_chunks=v, grad_accum=2)
    twice = architecture.text.before[0].numel if not architecture.head else 0
    assert sum(weights(t) for t in found) == weights(timeline(architecture, asked())) + 2 * twice
    assert sum(t.gradients_bytes for t in found) == 2 * (architecture.parameters + twice)


def test_a_first_rank_of_chunks_holds_more() -> None:
    """1 + (p − 1)/(p·v) times as much as without (Korthikanti et al., arXiv 2205.05198, section 4.2.3)."""
    one, two = (saved(run(LLAMA, pp=4, pp_chunks=v, grad_accum=8)[0])["feed-forward, product"] for v in (1, 2))
    assert two == one * (1 + (4 - 1) / (4 * 2)) == one * 11 / 8


def test_later_microbatches_add_nothing_to_chunks() -> None:
    for rank in range(2):
        peaks = {run(LLAMA, pp=2, pp_chunks=2, grad_accum=m)[rank].fullest_bytes() for m in (6, 8, 40)}
        assert len(peaks) == 1


def test_chunks_share_gradients_with_their_copies() -> None:
    """DDP's buckets and ZeRO's shards are of all chunks of a rank."""
    options: dict[str, Any] = {"pp": 2, "pp_chunks": 2, "grad_accum": 4, "optimizer": "adamw_torch"}
    for one, t in zip(run(LLAMA, **options), run(LLAMA, gpus=8, **options), strict=True):
        assert saved(t)["gradients in DDP's buckets"] == one.gradients_bytes
    for one, t in zip(run(LLAMA, zero=1, **options), run(LLAMA, zero=1, gpus=8, **options), strict=True):
        assert t.optimizer_bytes < one.optimizer_bytes / 3


@pytest.mark.parametrize("options", [{}, {"pp_chunks": 2}], ids=str)
def test_adapters_of_all_stages(options: dict[str, Any]) -> None:
    """Stages' adapters add up to the model's; a stage keeps what its own weights' gradients would need no more."""
    base: dict[str, Any] = {"mode": "lora", "lora_r": 4, "grad_accum": 4, "optimizer": "adamw_torch"}
    (alone,) = formula.shares(infer(LLAMA), asked(**base))
    found = [s.timeline for s in formula.shares(infer(LLAMA), asked(pp=2, **base, **options))]
    assert {t.trainable_parameters for t in found} == {alone.timeline.trainable_parameters}
    assert sum(t.gradients_bytes for t in found) == alone.timeline.gradients_bytes
    assert sum(t.optimizer_bytes for t in found) == alone.timeline.optimizer_bytes
    check(asked(pp=2, **base, **options))


def test_a_padding_mask_is_every_stages() -> None:
    """b·s·8 of tokens, and b·s·s booleans of each microbatch that is in flight, as a bias of bf16 in each layer."""
    for i, t in enumerate(run(LLAMA, pp=2, grad_accum=4, batch=2, padding=True)):
        kept = saved(t)
        assert kept["padding mask"] == 2 * 32 * 8
        assert kept["attention mask as a bias"] == (2 - i) * 4 * 2 * 32 * 32 * 2


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True, "dtype": "fp32", "mixed_precision": "bf16"}])
def test_layers_that_repeat_are_counted_as_often_as_they_stand(options: dict[str, Any]) -> None:
    request = asked(pp=2, grad_accum=4, **options)
    architecture = infer(LLAMA | {"num_hidden_layers": 17})
    for stage in stages(request):
        short, whole = (timeline(architecture, request, whole=w, stage=stage) for w in (False, True))
        assert sequence(short) == sequence(whole)
        assert short.gradients_bytes == whole.gradients_bytes


@pytest.mark.parametrize("options", [{}, {"zero": 1}, {"zero": 1, "mixed_precision": "bf16", "dtype": "fp32"}], ids=str)
def test_stages_whose_copies_share_gradients(options: dict[str, Any]) -> None:
    """DDP has a bucket for each gradient of a stage, ZeRO-1 a part of its optimizer's states."""
    alone = run(LLAMA, pp=2, grad_accum=4, **{k: v for k, v in options.items() if k == "zero"}, optimizer="adamw_torch")
    shared = run(LLAMA, pp=2, gpus=8, grad_accum=4, **options, optimizer="adamw_torch")
    for one, t in zip(alone, shared, strict=True):
        if options:
            assert t.optimizer_bytes < one.optimizer_bytes / 3
        else:
            assert saved(t)["gradients in DDP's buckets"] == one.gradients_bytes
            assert t.optimizer_bytes == one.optimizer_bytes


@pytest.mark.parametrize("name", ["llama", "llama, tied", "gpt2"])
def test_stages_of_narrower_layers(name: str) -> None:
    """Two ranks of tensor parallelism in each of two stages: all that they hold is one rank's part, over the stages."""
    architecture = infer(MODELS[name])
    (alone,) = formula.shares(architecture, asked(tp=2))
    found = [s.timeline for s in formula.shares(architecture, asked(tp=2, pp=2, grad_accum=4))]
    wide = run(MODELS[name], pp=2, grad_accum=4)
    table = 0 if architecture.head else architecture.text.before[0].numel // 2
    assert sum(weights(t) for t in found) == weights(alone.timeline) + 2 * table
    assert all(t.trainable_parameters == architecture.parameters for t in found)
    for t, whole in zip(found, wide, strict=True):
        assert weights(t) < weights(whole)
        kept = "feed-forward, product" if name != "gpt2" else "feed-forward, activation function"
        assert 2 * saved(t)[kept] == saved(whole)[kept]
        kept = "hidden states of the stage before"
        assert saved(t).get(kept) == saved(whole).get(kept)  # hidden states are whole on each rank


def test_shares_name_stages_and_join_those_alike() -> None:
    def named(**options: Any) -> list[tuple[str, int]]:
        return [(s.name, s.gpus) for s in formula.shares(infer(LLAMA), asked(**options))]

    assert named(pp=4, grad_accum=8, gpus=8) == [(f"stage {i} of 4", 2) for i in (1, 2, 3, 4)]
    alike = [("stage 1 of 4", 1), ("stages 2 to 3 of 4", 2), ("stage 4 of 4", 1)]
    assert named(pp=4, grad_accum=1) == alike
    assert named(pp=4, grad_accum=8, pp_schedule="gpipe") == alike


def test_the_fullest_stage_leads() -> None:
    found = hfvram.estimate("gpt2", offline=True, mode="train", ctx=64, pp=3, grad_accum=6)
    assert found.method == "formula"
    assert [r.name for r in found.ranks] == ["stage 1 of 3", "stage 2 of 3", "stage 3 of 3"]
    assert found.device_bytes == max(r.device_bytes for r in found.ranks)
    assert "±10 %" in found.interval.basis
    assert any("--batch is one microbatch" in said for said in found.warnings)
    assert {i.certainty for i in found.items if i.category == "activations"} == {"derived"}


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        (LLAMA, {"pp": 9}, "--pp 9 is more than the 8 layers: valid are 1 to 8"),
        (LLAMA, {"pp": 2, "pp_chunks": 3, "grad_accum": 2}, "8 layers are not divisible by 2·3: valid are 1, 2, 4"),
        (LLAMA, {"pp": 3, "pp_chunks": 2, "grad_accum": 3}, "8 layers are not divisible by 3·2: valid are 1"),
        (LLAMA, {"pp": 2, "pp_chunks": 2}, "--grad-accum 1 microbatches are not divisible by --pp 2: valid are 2, 4"),
        (MIXTRAL | {"output_router_logits": True}, {"pp": 2}, "--pp has no formula for MixtralForCausalLM with"),
        (SMALL | {"model_type": "bert", "architectures": ["BertForMaskedLM"]}, {"pp": 2}, "no formula for BertFor"),
    ],
    ids=["more stages than layers", "chunks", "no chunks", "microbatches", "a loss of all stages", "an encoder"],
)
def test_models_that_no_formula_splits(config: dict[str, Any], options: dict[str, Any], said: str) -> None:
    with pytest.raises(HfvramError, match=said) as caught:
        formula.shares(infer(config), asked(**options))
    assert caught.value.kind == "usage"


@pytest.mark.parametrize(
    ("options", "valid"),
    [
        ({"fsdp": "full_shard"}, "valid are --zero 1 and DDP"),
        ({"zero": 2}, "valid are --zero 1 and DDP"),
        ({"method": "simulate"}, "valid is --method formula"),
        ({"tp": 2, "gpus": 8}, "valid is --gpus 4 without --zero"),
        ({"tp": 2, "zero": 1}, "valid is --gpus 4 without --zero"),
        ({"pp_chunks": 2, "pp_schedule": "gpipe"}, "valid is --pp-schedule 1f1b"),
        ({"pp": 1, "pp_chunks": 2}, "valid is --pp 2 and more"),
        ({"offload": ["activations"], "gradient_checkpointing": True}, "--offload activations is not supported yet"),
    ],
    ids=str,
)
def test_what_no_pipeline_goes_with(options: dict[str, Any], valid: str) -> None:
    with pytest.raises(HfvramError, match=valid) as caught:
        check(asked(**{"pp": 2} | options))
    assert caught.value.kind == "usage"
