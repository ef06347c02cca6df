"""The tracker: what it sees on meta is what it sees of real tensors, and what it answers where meta has no values."""

import gc
import inspect
from itertools import pairwise
from typing import Any

import pytest

from hfvram.memory.timeline import Standing, Timeline
from hfvram.model import meta

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hfvram.memory.exact.meta_kernels import MetaKernels  # noqa: E402
from hfvram.memory.exact.tracker import Tracker  # noqa: E402

pytestmark = pytest.mark.slow

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DENSE = SMALL | {"intermediate_size": 56}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "dense": DENSE | {"model_type": "llama", "num_key_value_heads": 4},
    "grouped queries": DENSE | {"model_type": "qwen2", "num_key_value_heads": 2},
    "window, soft cap": DENSE | {"model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    "biases": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}
    | {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "experts, grouped": DENSE | {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 4},
    "experts, batched": DENSE | {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 4},
    "encoder and decoder": {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 56, "num_layers": 2, "num_heads": 4}
    | {"vocab_size": 96, "dropout_rate": 0.0, "decoder_start_token_id": 0},
    "mamba without its kernels": SMALL | {"model_type": "mamba", "state_size": 4},
    "mamba 2 without its kernels": SMALL
    | {"model_type": "mamba2", "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "encoder": DENSE | NO_DROPOUT | {"model_type": "bert"},
    "pictures": DENSE
    | NO_DROPOUT
    | {"model_type": "vit", "image_size": 16, "patch_size": 4}
    | {"architectures": ["ViTForImageClassification"]},
}
"""Dropout is off, as its mask is CUDA's on meta; so is fused attention, of which every device has its own.

Experts in a loop are left out: it runs over those that were chosen, which depends on values that meta tensors have not.
"""


def tracker(device: str = "meta") -> Tracker:
    return Tracker(Timeline(Standing(())), device)


def seen(model: Any, device: str, optimizer: str = "adamw") -> dict[str, list[int]]:
    """Of a forward pass, a backward pass and a step: sizes of allocations, frees as the complement of their number.

    Left out are scalars (`torch.tensor(2.0)` is made in host memory, which for the CPU is its own), and cuBLAS's
    workspaces, which the tracker adds.
    """
    watch = tracker(device)
    if model.main_input_name == "pixel_values":
        given = {"pixel_values": torch.zeros((2, 3, 16, 16), device=device)}
    else:
        given = {"input_ids": torch.zeros((2, 24), dtype=torch.long, device=device)}
        if "labels" in inspect.signature(model.forward).parameters:
            given["labels"] = given["input_ids"]
    for tensor in (*model.parameters(), *model.buffers(), *given.values()):
        watch.add(tensor)
    parameters = list(model.parameters())
    updates = {
        "adamw": lambda: torch.optim.AdamW(parameters, foreach=False),
        "adamw, foreach": lambda: torch.optim.AdamW(parameters, foreach=True),
        "sgd": lambda: torch.optim.SGD(parameters, momentum=0.9, foreach=False),
    }[optimizer]()
    timeline = watch.timeline
    gc.collect()
    gc.disable()
    try:
        with watch:
            ends = {"built": len(timeline.events)}
            out = model(**given)
            loss = out[0].sum()  # the model's loss, of one that has none its output
            del out
            ends["forward"] = len(timeline.events)
            torch.autograd.backward([loss])
            del loss
            ends["backward"] = len(timeline.events)
            updates.step()
            ends["step"] = len(timeline.events)
    finally:
        gc.enable()
    sizes, names = timeline.sizes, list(ends)
    number: dict[int, int] = {}
    found = {}
    for before, phase in pairwise(names):
        events = timeline.events[ends[before] : ends[phase]]
        events = [e for e in events if sizes[max(e, ~e)] > 8 and timeline.tags[max(e, ~e)].category != "workspace"]
        for event in events:
            number.setdefault(max(event, ~event), len(number))
        found[phase] = [sizes[e] if e >= 0 else ~number[~e] for e in events]
    return found


def both(name: str, **options: Any) -> list[dict[str, list[int]]]:
    """What is seen of one model on meta, and of one that really computes."""
    config = MODELS[name]
    class_name = (config.get("architectures") or [None])[0]
    values = meta.configuration(config)
    values._attn_implementation = "eager"
    models = (
        meta.build(config, class_name, "fp32", attention="eager"),
        meta.class_of(values, class_name)._from_config(values),
    )
    found = []
    for model in models:
        model.train()
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = False
        if "experts" in name:
            model.set_experts_implementation("grouped_mm" if "grouped" in name else "batched_mm")
        if options.get("checkpointing"):
            model.gradient_checkpointing_enable()
        found.append(seen(model, next(model.parameters()).device.type, options.get("optimizer", "adamw")))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_meta_is_what_real_tensors_are(name: str) -> None:
    on_meta, real = both(name)
    assert {phase: len(events) > 50 for phase, events in real.items()} == dict.fromkeys(real, True)
    assert on_meta == real


@pytest.mark.parametrize(
    "options", [{"checkpointing": True}, {"optimizer": "adamw, foreach"}, {"optimizer": "sgd"}], ids=str
)
def test_so_it_is_however_it_is_trained(options: dict[str, Any]) -> None:
    on_meta, real = both("grouped queries", **options)
    assert on_meta == real


def test_storages_are_counted_once_and_die() -> None:
    watch = tracker()
    with watch:
        a = torch.empty((4, 256), device="meta")
        b = a[1:].t()
        c = a + 1
        del a
        assert watch.timeline.sizes == [4096, 4096]
        del b
        assert watch.timeline.events == [0, 1, ~0]
        del c
    assert watch.timeline.events == [0, 1, ~0, ~1]


def test_a_mask_is_all_ones_unless_padded() -> None:
    for unpadded in (True, False):
        watch = tracker()
        watch.unpadded = unpadded
        with watch:
            mask = torch.ones((2, 8), dtype=torch.long, device="meta")
            assert bool(mask.all()) is unpadded
            assert bool(mask.sum() == mask.numel()) is unpadded
            assert bool(torch.isfinite(torch.ones((2, 8, 4), device="meta")).all())
            assert not torch.isinf(torch.ones((2, 8, 4), device="meta")).any()
            assert mask[0, 0].item() == 1
            assert torch.empty((2, 8), dtype=torch.long, device="meta")[0, 0].item() == 0


def test_workspaces_come_with_the_first_product_of_each_thread() -> None:
    watch = tracker()
    with watch:
        x = torch.empty((8, 8), device="meta")
        x @ x
        torch.addmm(x[0], x, x)
        torch.addmm(x[0], x, x)
        watch.backward = True
        x @ x
    held = [s for s in watch.timeline.sizes if s >= 1 << 20]
    assert held == [32 << 20, 1 << 20, 32 << 20]


def test_softmax_backward_multiplies_into_a_tensor_of_its_own() -> None:
    watch = tracker()
    with watch:
        x = torch.empty((16, 64), device="meta", requires_grad=True)
        torch.autograd.backward([torch.softmax(x, -1).sum()])
    assert [t.name for t in watch.timeline.tags].count("kernel scratch") == 1


def test_modules_are_named_with_stars_for_numbers() -> None:
    assert tracker().tag("model.layers.12.mlp.experts.3.up_proj").name == "model.layers.*.mlp.experts.*.up_proj"


class TestMetaKernels:
    """The second answer is like the first."""

    def calls(self) -> list[tuple[Any, tuple[Any, ...]]]:
        aten = torch.ops.aten
        x, y = torch.empty((3, 5), device="meta"), torch.empty((5, 3), device="meta")
        flags = torch.empty((3, 5), dtype=torch.bool, device="meta")
        return [
            (aten.add.Tensor, (x, 1)),
            (aten.add.Tensor, (x, y.t())),
            (aten.mul.Tensor, (flags, x)),
            (aten.mm.default, (x, y)),
            (aten.cat.default, ([x, x], 1)),
            (aten._to_copy.default, (x,)),
            (aten.native_layer_norm.default, (x, [5], None, None, 1e-5)),
            (aten.topk.default, (x, 2)),
            (aten.transpose.int, (x, 0, 1)),
            (aten._unsafe_view.default, (x, [15])),
            (aten.split.Tensor, (x, 2)),
        ]

    def test_outputs(self) -> None:
        kernels = MetaKernels()
        for func, args in self.calls():
            shown = [self.form(out) for out in (kernels(func, args, {}), kernels(func, args, {}), func(*args))]
            assert shown[0] == shown[1] == shown[2], func

    def test_views_share_and_new_tensors_do_not(self) -> None:
        kernels = MetaKernels()
        x = torch.empty((3, 5), device="meta")
        own = x.untyped_storage()._cdata
        for _ in range(2):
            assert kernels(torch.ops.aten._unsafe_view.default, (x, [15]), {}).untyped_storage()._cdata == own
            assert kernels(torch.ops.aten.add.Tensor, (x, 1), {}).untyped_storage()._cdata != own
            assert kernels(torch.ops.aten.add_.Tensor, (x, 1), {}) is x

    def test_dtypes_are_told_apart(self) -> None:
        kernels = MetaKernels()
        for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
            assert kernels(torch.ops.aten.neg.default, (torch.empty(4, dtype=dtype, device="meta"),), {}).dtype == dtype
        whole = torch.empty(4, dtype=torch.int64, device="meta")
        assert kernels(torch.ops.aten.mul.Tensor, (whole, 2), {}).dtype == torch.int64
        assert kernels(torch.ops.aten.mul.Tensor, (whole, 2.0), {}).dtype == torch.float32

    def test_refuses_what_the_kernel_refuses(self) -> None:
        kernels = MetaKernels()
        x = torch.empty((3, 5), device="meta")
        for _ in range(2):
            with pytest.raises(RuntimeError):
                kernels(torch.ops.aten.mm.default, (x, x), {})

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_groups_are_multiplied_in_other_dtypes_than_meta_knows(self, dtype: Any) -> None:
        kernels, grouped = MetaKernels(), torch.ops.aten._grouped_mm.default
        offsets = torch.empty(4, dtype=torch.int32, device="meta")
        for a, b in (((32, 16), (4, 16, 8)), ((16, 32), (32, 8))):  # tokens by experts; an expert's gradient
            forms = []
            for kind in (torch.bfloat16, dtype):
                x, y = torch.empty(a, dtype=kind, device="meta"), torch.empty(b, dtype=kind, device="meta")
                y = y.transpose(-2, -1).contiguous().transpose(-2, -1)
                forms.append(kernels(grouped, (x, y, offsets), {}))
            assert forms[0].shape == forms[1].shape
            assert forms[0].stride() == forms[1].stride()
            assert forms[1].dtype == dtype

    def form(self, out: Any) -> Any:
        if isinstance(out, torch.Tensor):
            return out.shape, out.stride(), out.dtype, out.storage_offset()
        return [self.form(o) for o in out]
