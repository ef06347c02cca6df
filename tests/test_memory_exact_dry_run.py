"""A dry run of code that knows nothing of it: by hand to the byte, as the engine has it, and with people's habits."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hfvram
from hfvram.errors import HfvramError

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from torch import autocast, nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

pytestmark = pytest.mark.slow

WORKSPACES = 2 * 32 << 20
"""cuBLAS's on Hopper, forward's and backward's."""


def train(model: Any, optimizer: Any, x: Any, y: Any) -> None:
    for _ in range(2):
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def mlp() -> Any:
    return nn.Sequential(nn.Linear(128, 512, bias=False), nn.ReLU(), nn.Linear(512, 128, bias=False))


WEIGHTS = 2 * 128 * 512 * 4
INPUTS = 2 * 32 * 128 * 4


def test_a_step_of_adamw_by_hand() -> None:
    """By default `foreach`: in the step stand weights, gradients, two states, and the root of one of them at once."""
    with hfvram.dry_run() as run:
        model = mlp()
        train(model, torch.optim.AdamW(model.parameters()), torch.randn(32, 128), torch.randn(32, 128))
    assert run.by_category() == {
        "workspace": WORKSPACES,
        "optimizer": 3 * WEIGHTS,
        "weights": WEIGHTS,
        "gradients": WEIGHTS,
        "inputs": INPUTS,
        "activations": 4,  # the loss, which its variable still names
        "rounding": 508,
    }
    assert run.peak_allocated_bytes == WORKSPACES + 5 * WEIGHTS + INPUTS + 512
    assert run.peak_phase == "optimizer step"


def test_a_backward_pass_by_hand() -> None:
    """SGD, many rows: the peak is ReLU's backward pass, where its output and both sides' gradients stand (rows × 512).

    The gradient of the second product's weights is there, the first's is not; the loss and its gradient are numbers.
    What the model gave, and the first product's output, nobody needs any more.
    """
    rows = 2048
    with hfvram.dry_run() as run:
        model = mlp()
        train(model, torch.optim.SGD(model.parameters()), torch.randn(rows, 128), torch.randn(rows, 128))
    assert run.peak_phase == "backward"
    assert run.by_category() == {
        "workspace": WORKSPACES,
        "activations": 3 * rows * 512 * 4 + 2 * 4,
        "inputs": 2 * rows * 128 * 4,
        "weights": WEIGHTS,
        "gradients": WEIGHTS // 2,
        "rounding": 2 * 508,
    }
    assert [(t.path, t.what, t.operator) for t in run.at_peak(5)[2:]] == [
        ("1", "saved activations", "relu"),
        ("2", "gradients of activations", "mm"),
        ("1", "gradients of activations", "threshold_backward"),
    ]


def test_accounts_are_the_same_as_the_engine_has_them() -> None:
    transformers = pytest.importorskip("transformers")
    from hfvram.memory.allocator import replay
    from hfvram.memory.exact.simulate import simulate
    from hfvram.request import Request

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 256}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    for low, again in ((False, False), (True, True)):
        asked = {"mode": "train", "ctx": 512, "batch": 2, "quant": "none", "method": "simulate"}
        asked |= {"dtype": "fp32" if low else "bf16", "mixed_precision": "bf16" if low else "no"}
        request = Request.from_dict(asked | {"gradient_checkpointing": again})
        peaks = replay(simulate({"model_type": "llama"} | sizes, None, request))
        with hfvram.dry_run() as run:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, use_cache=False))
            model = model.to("cuda", torch.float32 if low else torch.bfloat16).train()
            if again:
                model.gradient_checkpointing_enable()
            ids = torch.randint(256, (2, 512), device="cuda")
            run.start_over()
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            for _ in range(2):
                with torch.autocast("cuda", torch.bfloat16, enabled=low):
                    out = model(input_ids=ids, labels=ids)
                out.loss.backward()
                del out
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        assert run.peak_allocated_bytes == peaks.allocated_bytes
        assert run.peak_reserved_bytes == peaks.reserved_bytes


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Any) -> Any:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.mlp(x)


class Classifier(nn.Module):
    """Patches of a picture by a convolution, attention over them, a class."""

    def __init__(self, again: str = "") -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 8, stride=8)
        self.blocks = nn.ModuleList(Block(64) for _ in range(3))
        self.head = nn.Linear(64, 1000)
        self.again = again

    def forward(self, x: Any) -> Any:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.again == "reentrant") if self.again else block(x)
        return self.head(x.mean(1))


def loop(again: str = "") -> hfvram.DryRun:
    """As trainers have it: a loader, autocast and its scaler, two accumulated batches, clipping, a schedule, a log."""
    data = torch.utils.data.TensorDataset(torch.zeros(64, 3, 128, 128), torch.zeros(64, dtype=torch.long))
    with hfvram.dry_run() as run:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = torch.compile(Classifier(again)).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        scaler = torch.amp.GradScaler("cuda")
        criterion = nn.CrossEntropyLoss()
        region = autocast("cuda", torch.float16)
        log = []
        for number, (x, y) in enumerate(torch.utils.data.DataLoader(data, 16, shuffle=True), 1):
            x, y = x.to(device, non_blocking=True), y.to(device)
            with region:
                loss = criterion(model(x), y) / 2
            scaler.scale(loss).backward()
            log += [loss.item(), *loss.detach().cpu().reshape(1).tolist(), float(loss)]
            if number % 2 == 0:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                schedule.step()
                optimizer.zero_grad()
    assert log == [0.0] * 12
    return run


@pytest.mark.parametrize("again", ["", "reentrant", "not reentrant"])
def test_a_trainers_loop_around_a_module_of_ones_own(again: str) -> None:
    run = loop(again)
    parameters = sum(p.numel() for p in Classifier().parameters())
    found = run.by_category()
    assert found["weights"] == 4 * parameters
    assert found["optimizer"] == 2 * 4 * parameters  # the counts of steps are in host memory
    assert found["inputs"] >= 16 * 3 * 128 * 128 * 4
    assert run.peak_phase == "backward"
    assert sum(item.bytes for item in run.items()) == run.peak_allocated_bytes
    at_peak = {(t.path, t.what) for t in run.at_peak(100)}
    assert ("patches", "saved activations") in at_peak
    assert ("blocks.2.mlp.0", "saved activations" if not again else "recomputed activations") in at_peak
    assert (("blocks.0.mlp.0", "saved activations") in at_peak) is not bool(again)
    assert ("head", "optimizer states: exp_avg") in at_peak
    assert max(t.bytes for t in run.at_peak(1)) == 32 << 20
    phases = [name for _, name in run.timeline.marks]
    assert phases.count("backward") == 4
    assert phases.count("optimizer step") == 2
    # attention is fused in half precision, in what is recomputed too: no scores of 16 × 4 heads × 256²
    assert 16 * 4 * 256 * 256 * 2 not in run.timeline.sizes


def test_transformers_trainer_runs_in_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
    data = [{"input_ids": [1] * 64, "labels": [1] * 64}] * 16
    with hfvram.dry_run() as run:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4))
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=2, gradient_accumulation_steps=2, bf16=True, report_to=[], save_strategy="no"
        )
        transformers.Trainer(model, arguments, train_dataset=data).train()
    parameters = 2 * 256 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    assert run.by_category()["weights"] == 4 * parameters
    states = {t.what: t for t in run.at_peak(1000) if t.what.startswith("optimizer states")}
    assert {"optimizer states: exp_avg", "optimizer states: exp_avg_sq"} <= set(states)
    assert [name for _, name in run.timeline.marks].count("backward") == 4


def test_checkpointing_saves() -> None:
    plain, again = (loop(how).by_category()["activations"] for how in ("", "not reentrant"))
    assert again < 0.6 * plain


def test_phases_can_be_named() -> None:
    with hfvram.dry_run() as run:
        run.mark("set-up")
        model = mlp()
        x = torch.zeros(4096, 128)
        run.mark("validation")
        with torch.no_grad():
            model(x)
        assert run.peak_phase == "validation: forward"
        run.mark("training")
        model(x).sum().backward()
    assert run.peak_phase == "training: backward"
    assert run.timeline.marks[0][1] == "set-up"


def test_where_things_are() -> None:
    held = torch.ones(4)
    with hfvram.dry_run() as run:
        assert torch.zeros(3).is_meta
        assert torch.zeros(3, device="cuda:1").is_meta
        assert held.cuda().is_meta
        assert held.to("cuda", torch.bfloat16).dtype == torch.bfloat16
        assert not torch.zeros(3, device="cpu").is_meta
        assert not torch.randperm(3, generator=torch.Generator()).is_meta
        with torch.device("cuda"):
            assert torch.zeros(3).is_meta
        model = nn.Linear(3, 2)
        assert next(model.parameters()).is_meta
        read = model(torch.zeros(5, 3)).detach()
        assert read.cpu().tolist() == [[0.0, 0.0]] * 5
        assert read.to("cpu", torch.float64).dtype == torch.float64
        assert read.half().numpy().shape == (5, 2)
    events = len(run.timeline.events)
    assert not torch.zeros(3).is_meta
    assert not torch.is_autocast_enabled("cuda")
    assert "meta" not in torch.utils._foreach_utils._get_foreach_kernels_supported_devices()
    assert not torch.nn.modules.module._global_forward_pre_hooks
    del model, read
    assert len(run.timeline.events) == events


def test_what_was_built_before_counts_once_it_is_called() -> None:
    model = mlp().to("meta")
    with hfvram.dry_run() as run:
        model(torch.zeros(1, 128))
    assert run.by_category()["weights"] == WEIGHTS
    host = mlp()
    with hfvram.dry_run() as run:
        host.to("cuda")(torch.zeros(1, 128))
    assert run.by_category()["weights"] == WEIGHTS


def test_autocast_is_half_precision_by_default_and_names_do_not_matter() -> None:
    for region in (lambda: autocast("cuda"), lambda: torch.autocast("cuda"), lambda: torch.amp.autocast("cuda")):
        with hfvram.dry_run():
            model = nn.Linear(8, 8)
            with region():
                assert model(torch.zeros(2, 8)).dtype == torch.float16
                with torch.autocast("cuda", enabled=False):
                    assert model(torch.zeros(2, 8)).dtype == torch.float32
            assert autocast("cuda", torch.bfloat16)(model)(torch.zeros(2, 8)).dtype == torch.bfloat16


def test_an_error_of_ones_own_is_ones_own_and_leaves_nothing_behind() -> None:
    run = hfvram.dry_run()
    with pytest.raises(RuntimeError, match="same reduction dim"), run:
        mlp()(torch.zeros(2, 129))
    assert run.peak_allocated_bytes > 0
    assert not torch.zeros(3).is_meta
    with pytest.raises(HfvramError, match="over once"), run:
        pass


def test_the_gpu_decides_about_kernels() -> None:
    sizes = {}
    for gpu in ("H100", "A100"):
        with hfvram.dry_run(gpu) as run:
            nn.Linear(8, 8, bias=False)(torch.zeros(2, 8))
        sizes[gpu] = run.by_category()["workspace"]
    assert sizes == {"H100": 32 << 20, "A100": (4096 * 2 + 16 * 8) << 10}
    with pytest.raises(HfvramError, match="not known"):
        hfvram.dry_run("H1000000")


def within(region: Any) -> Any:
    with region:
        return torch.zeros(3)


def on_a_side_stream() -> Any:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        made = torch.zeros(3)
    made.record_stream(side)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    return made.is_meta


def timed() -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def held() -> tuple[int, ...]:
    """A layer of 100 × 100: 40,000 B, in blocks of 512 B 40,448; for a moment twice as much comes on top."""
    layer = nn.Linear(100, 100, bias=False, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    torch.zeros(2, 100, 100)
    cuda = torch.cuda
    found = cuda.memory_allocated(), cuda.max_memory_allocated(), cuda.memory_reserved(), cuda.max_memory_reserved()
    cuda.reset_peak_memory_stats()
    assert cuda.max_memory_allocated() == found[0]
    assert f"{found[0]:,}" in cuda.memory_summary()
    del layer
    assert cuda.memory_allocated() == 0
    return found


def pinned_batches() -> int:
    data = torch.utils.data.TensorDataset(torch.zeros(8, 2, device="cpu"))
    return sum(len(x) for (x,) in torch.utils.data.DataLoader(data, 2, pin_memory=True, num_workers=1))


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (lambda: torch.cuda.get_device_name(0), "NVIDIA A100 80GB"),
        (lambda: torch.cuda.get_device_properties("cuda:0").total_memory, int(79.14 * 2**30)),
        (lambda: (torch.cuda.get_device_properties(0).major, torch.cuda.get_device_properties(0).minor), (8, 0)),
        (lambda: torch.cuda.get_device_capability(), (8, 0)),
        (lambda: torch.cuda.mem_get_info()[1], int(79.14 * 2**30)),
        (lambda: 0 < torch.cuda.mem_get_info()[0] < int(79.14 * 2**30), True),
        (lambda: (torch.cuda.device_count(), torch.cuda.current_device()), (1, 0)),
        (lambda: (torch.accelerator.device_count(), torch.accelerator.current_accelerator().type), (1, "cuda")),
        (lambda: torch.cuda.is_bf16_supported(including_emulation=False), True),
        (lambda: within(torch.cuda.device(0)).is_meta, True),
        (on_a_side_stream, True),
        (timed, 0.0),
        (held, (40448, 40448 + 80384, 2 << 20, 2 << 20)),
        (lambda: nn.Linear(3, 2).to(0).weight.is_meta, True),
        (lambda: nn.Linear(3, 2).to(device=0, dtype=torch.bfloat16).weight.dtype, torch.bfloat16),
        (lambda: torch.zeros(3, device="cpu").pin_memory().to(0, non_blocking=True).is_meta, True),
        (lambda: torch.zeros(3, pin_memory=True).device.type, "cpu"),
        (pinned_batches, 8),
        (lambda: torch.cuda.get_rng_state().dtype, torch.uint8),
    ],
)
def test_what_scripts_ask_of_cuda(asked: Any, answer: Any) -> None:
    before = torch.cuda.device_count, torch.cuda.Stream, torch.Tensor.pin_memory, nn.Module.to
    with hfvram.dry_run("A100"):
        assert asked() == answer
    assert before == (torch.cuda.device_count, torch.cuda.Stream, torch.Tensor.pin_memory, nn.Module.to)


def test_what_cuda_says_is_what_the_run_says() -> None:
    with hfvram.dry_run() as run:
        assert "H100" in torch.cuda.get_device_name()
        model = mlp()
        run.start_over()
        for _ in range(2):
            train(model, torch.optim.AdamW(model.parameters()), torch.randn(32, 128), torch.randn(32, 128))
            assert torch.cuda.max_memory_allocated() == run.peak_allocated_bytes
            assert torch.cuda.max_memory_reserved() == run.peak_reserved_bytes


def test_a_dry_run_within_another_is_refused() -> None:
    with hfvram.dry_run() as run:
        with pytest.raises(HfvramError, match="under way already"), hfvram.dry_run():
            pass
        nn.Linear(2, 2)(torch.zeros(1, 2))
    assert run.peak_allocated_bytes
    with hfvram.dry_run():
        assert torch.zeros(1).is_meta


@pytest.mark.parametrize(
    ("absent", "said"),
    [("transformers", "ran"), ("torch", "dry_run needs torch: pip install 'hfvram[exact]'")],
)
def test_only_torch_is_needed(absent: str, said: str, tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules[{absent!r}] = None
import hfvram
assert "torch" not in sys.modules or sys.modules["torch"] is None
try:
    with hfvram.dry_run():
        import torch
        torch.nn.Linear(2, 2)(torch.zeros(1, 2)).sum().backward()
    print("ran")
except hfvram.HfvramError as error:
    assert error.kind == "missing_extra"
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.stdout.strip(), done.stderr) == (said, "")
