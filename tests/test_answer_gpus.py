"""GPU names as people and drivers write them. Capacities: PyTorch's out-of-memory messages, llama.cpp's Metal log."""

import stat

import pytest

from hfvram.answer.gpus import Gpu, find_gpu, gpus, recommend
from hfvram.errors import HfvramError
from hfvram.memory.generation import GENERATIONS
from hfvram.request import CHOICES
from hfvram.units import GiB, MiB


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("H100 80GB", "H100 SXM 80GB"),
        ("h100-80g", "H100 SXM 80GB"),
        ("h100 nvl", "H100 NVL 94GB"),
        ("H100 PCIe", "H100 PCIe 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("NVIDIA GH200 480GB", "GH200 96GB"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("RTX 4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("RTX 4090 24GB", "RTX 4090"),
        ("4090 laptop gpu", "RTX 4090 Laptop"),
        ("A6000", "RTX A6000"),
        ("AMD Instinct MI300X OAM", "MI300X"),
        ("7900xtx", "RX 7900 XTX"),
        ("W7900", "PRO W7900"),
        ("M3 Max 128GB", "M3 Max 128GB"),
        ("Arc A770", "Arc A770"),
        ("T4", "T4"),
    ],
)
def test_a_name_that_means_one_size_is_found_without_a_notice(text: str, name: str) -> None:
    gpu, notice = find_gpu(text)
    assert (gpu.name, notice) == (name, None)


@pytest.mark.parametrize(
    ("text", "name", "other"),
    [
        ("H100", "H100 SXM 80GB", "H100 NVL 94GB"),
        ("a100", "A100 80GB", "A100 40GB"),
        ("V100", "V100 16GB", "V100 32GB"),
        ("rtx 3060", "RTX 3060 12GB", "RTX 3060 8GB"),
        ("RTX 6000", "RTX 6000 Ada", "Quadro RTX 6000"),
        ("m2 ultra", "M2 Ultra 192GB", "M2 Ultra 64GB"),
    ],
)
def test_an_ambiguous_name_takes_the_most_common_variant_and_says_so(text: str, name: str, other: str) -> None:
    gpu, notice = find_gpu(text)
    assert gpu.name == name
    assert notice
    assert name in notice
    assert other in notice


def test_every_gpu_of_the_table_is_found_by_its_own_name_and_aliases() -> None:
    for gpu in gpus():
        for name in (gpu.name, *gpu.aliases):
            if name != "RTX 6000":  # the one name that two cards bear
                assert find_gpu(name) == (gpu, None)


@pytest.mark.parametrize(("text", "size"), [("24GB", 24 * 10**9), ("24GiB", 24 * GiB), (" 1.5 TB ", 1_500 * 10**9)])
def test_a_size_is_a_gpu(text: str, size: int) -> None:
    assert find_gpu(text) == (Gpu(text.strip(), size), None)


def test_capacities_are_what_the_runtime_reports() -> None:
    # "GPU 0 has a total capacity of 79.10 GiB" is torch's message on an H100 of which nvidia-smi says 81559 MiB.
    assert find_gpu("H100 80GB")[0].memory_bytes == int(79.10 * GiB) < 81559 * MiB
    # llama.cpp on a Mac of 36 GB: recommendedMaxWorkingSetSize = 28991.03 MB; of 16 GB: 11453.25 MB
    assert find_gpu("M3 Pro 36GB")[0].memory_bytes // 10**4 == 2899102
    assert find_gpu("M1 16GB")[0].memory_bytes // 10**4 == 1145324


@pytest.mark.parametrize("text", ["RTX 9090", "", "0GB", "-24GB", "4090 48GB", "rtx", "A100 13GB", "\x1b[31m"])
def test_an_unknown_name_is_a_usage_error_in_one_line(text: str) -> None:
    with pytest.raises(HfvramError) as error:
        find_gpu(text)
    assert error.value.kind == "usage"
    assert error.value.message.isprintable()


def test_an_unknown_name_brings_the_nearest() -> None:
    with pytest.raises(HfvramError, match=r"nearest are .*RTX 4090"):
        find_gpu("RTX 4900")


def test_recommended_are_the_smallest_that_hold_it() -> None:
    names = [g.name for g in recommend(int(50 * GiB))]
    # GiB: Intel 63.97, AMD 63.98, Apple 72 (three quarters of 96), NVIDIA data centre 79.10, workstation 94.97
    assert names == ["Max 1550", "MI250X", "M2 Max 96GB", "H100 SXM 80GB", "RTX PRO 6000"]
    assert all(g.memory_bytes >= 50 * GiB for g in recommend(50 * GiB))
    assert recommend(10**15) == ()


def test_local_asks_nvidia_smi(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "NVIDIA H200, 143771, 611, 3000"\n')
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    gpu, notice = find_gpu("local")
    assert gpu.memory_bytes == (143771 - 611) * MiB
    assert notice
    assert "2.93 GiB of NVIDIA H200" in notice


def test_local_without_a_gpu_is_no_gpu(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HfvramError) as error:
        find_gpu("local")
    assert error.value.kind == "no_gpu"


@pytest.mark.parametrize(
    ("name", "capability"),
    [  # NVIDIA's list, developer.nvidia.com/cuda-gpus
        ("T4", "7.5"),
        ("V100 32GB", "7.0"),
        ("A100 80GB", "8.0"),
        ("A30", "8.0"),
        ("A10", "8.6"),
        ("RTX 3090", "8.6"),
        ("RTX 4090", "8.9"),
        ("L40S", "8.9"),
        ("H200", "9.0"),
        ("B200", "10.0"),
        ("B300", "10.3"),
        ("RTX 5090", "12.0"),
        ("DGX Spark", "12.1"),
        ("MI300X", None),
        ("M3 Max 128GB", None),
    ],
)
def test_compute_capability(name: str, capability: str | None) -> None:
    assert find_gpu(name)[0].capability == capability


def test_every_nvidia_gpu_has_a_compute_capability_that_is_known() -> None:
    assert (
        {g.capability for g in gpus() if g.vendor == "nvidia"} <= set(GENERATIONS) == set(CHOICES["compute_capability"])
    )
    assert all(GENERATIONS[g.capability].name == g.generation for g in gpus() if g.capability)
    assert not any(g.capability for g in gpus() if g.vendor != "nvidia")
