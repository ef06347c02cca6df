"""The tracker: what it sees on meta is what it sees of real tensors, and what it answers where meta has no values."""

import gc
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
LLAMA = SMALL | {"model_type": "llama", "intermediate_size": 56, "num_key_value_heads": 2}
MODELS = [
    LLAMA,
    LLAMA | {"model_type": "qwen2"},
    {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64},
    LLAMA | {"model_type": "gemma2", "head_dim": 8, "sliding_window": 8},
    SMALL | {"model_type": "bert", "intermediate_size": 64},
]


def tracker(device: str = "meta") -> Tracker:
    return Tracker(Timeline(Standing(())), device)


def seen(model: Any, device: str) -> list[int]:
    """Sizes of allocations, and frees as the complement of their number, of one forward pass.

    Scalars are left out: `torch.tensor(2.0)` is made in host memory, which for the CPU is its own.
    """
    watch = tracker(device)
    ids = torch.zeros((2, 24), dtype=torch.long, device=device)
    for tensor in (*model.parameters(), *model.buffers(), ids):
        watch.add(tensor)
    gc.collect()
    start = len(watch.timeline.events)
    gc.disable()
    try:
        with torch.no_grad(), watch:
            out = model(input_ids=ids)
        del out
    finally:
        gc.enable()
    sizes = watch.timeline.sizes
    events = [e for e in watch.timeline.events[start:] if sizes[max(e, ~e)] > 8]
    number = {handle: i for i, handle in enumerate(dict.fromkeys(max(e, ~e) for e in events))}
    return [sizes[e] if e >= 0 else ~number[~e] for e in events]


@pytest.mark.parametrize("config", MODELS, ids=lambda c: c["model_type"])
def test_meta_is_what_real_tensors_are(config: dict[str, Any]) -> None:
    on_meta = meta.build(config | {"_attn_implementation": "eager"}, None, "fp32").eval()
    values = meta.configuration(config | {"_attn_implementation": "eager"})
    real = meta.class_of(values, None)._from_config(values).eval()
    events = seen(on_meta, "meta")
    assert len(events) > 100
    assert events == seen(real, "cpu")


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
