"""What `torch.cuda` answers where there is one GPU: which it is, what it holds so far; streams do nothing."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Self
from unittest.mock import patch

import torch

from hfvram.memory.allocator import Allocator
from hfvram.memory.device import device_bytes, kernels_bytes
from hfvram.memory.exact.run import Run


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU as `torch.cuda.get_device_properties` has it."""

    name: str
    total_bytes: int
    capability: tuple[int, int]


class Event:
    """An event that is over at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cuda", 0)

    def record(self, stream: Any = None) -> None:
        """Nothing runs."""

    wait = record

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def query(self) -> bool:
        return True

    def elapsed_time(self, end_event: Any) -> float:
        """In no time."""
        return 0.0


class Stream(Event):
    """A stream on which nothing waits."""

    cuda_stream = stream_id = priority = 0
    device_index = 0

    def wait_stream(self, stream: Any) -> None:
        """There is nothing to wait for."""

    wait_event = wait_stream

    def is_capturing(self) -> bool:
        """No graph is made: optimizers ask."""
        return False

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """The other stream was the same one."""


class Statistics:
    """The allocator so far: a run's timeline goes through it as far as it is written, whenever somebody asks.

    `reset_peak_memory_stats` starts these peaks anew, not the run's own.
    """

    def __init__(self, run: Run) -> None:
        self.timeline = run.timeline
        self.allocator = Allocator()
        self.seen = self.restarts = self.allocated_peak = self.reserved_peak = 0

    def now(self) -> Allocator:
        """The allocator after the last event."""
        for restart in self.timeline.restarts[self.restarts :]:
            self._upto(restart)
            self.allocator.empty_cache()
            self._anew()
            self.restarts += 1
        self._upto(len(self.timeline.events))
        return self.allocator

    def _upto(self, stop: int) -> None:
        events, self.seen = self.timeline.events[self.seen : stop], stop
        peak, _ = self.allocator.run(events, self.timeline.sizes, self.timeline.streams)
        self.allocated_peak = max(self.allocated_peak, peak)
        self.reserved_peak = max(self.reserved_peak, self.allocator.reserved)

    def _anew(self) -> None:
        self.allocated_peak, self.reserved_peak = self.allocator.allocated, self.allocator.reserved

    def reset(self) -> None:
        """The peaks start anew."""
        self.now()
        self._anew()

    def stats(self) -> dict[str, int]:
        """Under the names that `torch.cuda.memory_stats` gives them."""
        allocator = self.now()
        return {
            "allocated_bytes.all.current": allocator.allocated,
            "allocated_bytes.all.peak": self.allocated_peak,
            "reserved_bytes.all.current": allocator.reserved,
            "reserved_bytes.all.peak": self.reserved_peak,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }


@contextlib.contextmanager
def one_gpu(run: Run, device: Device) -> Iterator[None]:
    """Let `torch.cuda` and `torch.accelerator` answer as on a machine with this one GPU."""
    statistics, stream = Statistics(run), Stream()
    major, minor = device.capability
    properties = SimpleNamespace(
        name=device.name, total_memory=device.total_bytes, major=major, minor=minor, warp_size=32
    )

    def stat(name: str) -> Any:
        return lambda device=None: statistics.stats()[name]

    def free_and_total(index: Any = None) -> tuple[int, int]:
        taken = device_bytes(statistics.now().reserved, kernels_bytes("train", sharded=False))
        return max(0, device.total_bytes - taken), device.total_bytes

    def summary(device: Any = None, abbreviated: bool = False) -> str:
        found = statistics.stats()
        return "dry run: " + ", ".join(f"{name} {n:,}" for name, n in found.items() if "bytes" in name)

    def nothing() -> Any:
        """A function of its own that does nothing: Dynamo's tables refuse one function under two names."""
        return lambda *args, **kwargs: None

    def memory() -> dict[str, Any]:
        return {
            "memory_allocated": stat("allocated_bytes.all.current"),
            "max_memory_allocated": stat("allocated_bytes.all.peak"),
            "memory_reserved": stat("reserved_bytes.all.current"),
            "max_memory_reserved": stat("reserved_bytes.all.peak"),
            "memory_stats": lambda device=None: statistics.stats(),
            "reset_peak_memory_stats": lambda device=None: statistics.reset(),
            "empty_cache": nothing(),
        }

    moved = torch.nn.Module.to

    @functools.wraps(moved)
    def to(module: Any, *args: Any, **kwargs: Any) -> Any:
        """A bare number is a GPU's: without one PyTorch refuses it before any tensor is moved."""
        args = tuple(torch.device("cuda", a) if type(a) is int else a for a in args)
        if type(kwargs.get("device")) is int:
            kwargs["device"] = torch.device("cuda", kwargs["device"])
        return moved(module, *args, **kwargs)

    with (
        patch.multiple(
            torch.cuda,
            **memory(),
            memory_summary=summary,
            mem_get_info=free_and_total,
            is_available=lambda: True,
            is_initialized=lambda: True,
            init=nothing(),
            device_count=lambda: 1,
            current_device=lambda: 0,
            set_device=nothing(),
            _exchange_device=lambda device: 0,  # under `torch.cuda.device`
            _maybe_exchange_device=lambda device: 0,
            synchronize=nothing(),
            ipc_collect=nothing(),
            is_bf16_supported=lambda including_emulation=True: including_emulation or run.gpu.bf16,
            get_device_name=lambda device=None: properties.name,
            get_device_properties=lambda device=None: properties,
            get_device_capability=lambda device=None: (major, minor),
            get_rng_state=lambda device="cuda": torch.zeros(16, dtype=torch.uint8, device="cpu"),
            set_rng_state=nothing(),
            Stream=Stream,
            Event=Event,
            current_stream=lambda device=None: stream,
            default_stream=lambda device=None: stream,
            set_stream=nothing(),
            is_current_stream_capturing=lambda: False,
        ),
        patch.multiple(
            torch.accelerator,
            **memory(),
            is_available=lambda: True,
            device_count=lambda: 1,
            current_accelerator=lambda check_available=False: torch.device("cuda"),
            current_device_index=lambda: 0,
            current_stream=lambda device=None: stream,
            set_device_index=nothing(),
            synchronize=nothing(),
        ),
        patch.object(torch.nn.Module, "to", to),
        # On the class, since a loader pins in a thread of its own, where no mode is.
        patch.object(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor),
        patch.object(torch.Tensor, "record_stream", nothing()),
    ):
        yield
