"""GPUs by name, with the memory that a process can use on them.

For NVIDIA and AMD that is the total that the runtime reports, `torch.cuda.mem_get_info()[1]`, the "total capacity" of
PyTorch's out-of-memory message: nvidia-smi's total less what it calls reserved (H100: 81,559 MiB less about 550). It
differs by some tens of MiB between drivers; the table has a usual or lower one. Cards with ECC have it as delivered.

A new GPU is one word in `_TABLE`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Literal, cast

from hfvram.errors import HfvramError, printable
from hfvram.units import GiB, MiB, gib, parse_bytes

Vendor = Literal["nvidia", "amd", "apple", "intel", ""]
Tier = Literal["data centre", "workstation", "consumer", ""]


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of GPU (a dual one counts as the two that software sees)."""

    name: str
    memory_bytes: int
    vendor: Vendor = ""
    tier: Tier = ""
    generation: str = ""
    aliases: tuple[str, ...] = ()
    capability: str | None = None
    """CUDA's compute capability, which decides what runs (`memory/generation.py`)."""


# Heading: vendor, tier, generation, and NVIDIA's compute capability. Line: GiB that a process can use, and GPUs with
# it, with `= other name`. Of one name's variants the most common stands first. Figures: PyTorch's out-of-memory
# messages in public issues; compute capabilities: developer.nvidia.com/cuda-gpus.
_TABLE = """
nvidia, data centre, Blackwell 10.0
178.35 B200, B100
nvidia, data centre, Blackwell 10.3
267.69 B300
nvidia, data centre, Blackwell 10.0
184.31 GB200
nvidia, data centre, Blackwell 10.3
276.50 GB300
nvidia, data centre, Hopper 9.0
79.10 H100 SXM 80GB, H100 PCIe 80GB, H800
93.09 H100 NVL 94GB
139.80 H200
94.50 GH200 96GB = GH200 480GB
139.80 GH200 144GB
95.00 H20
nvidia, data centre, Ada 8.9
21.95 L4
44.39 L40S, L40, L20
nvidia, data centre, Ampere 8.0
79.14 A100 80GB, A800
39.38 A100 40GB
23.49 A30
nvidia, data centre, Ampere 8.6
44.34 A40
21.98 A10, A10G
14.54 A16, A2
nvidia, data centre, Turing 7.5
14.56 T4
nvidia, data centre, Volta 7.0
15.77 V100 16GB
31.73 V100 32GB
nvidia, data centre, Pascal 6.0
15.89 P100
nvidia, data centre, Pascal 6.1
23.87 P40
7.43 P4
nvidia, workstation, Blackwell 12.0
94.97 RTX PRO 6000
47.30 RTX PRO 5000
31.34 RTX PRO 4500
23.40 RTX PRO 4000
nvidia, workstation, Blackwell 12.1
119.60 GB10 = DGX Spark
nvidia, workstation, Ada 8.9
47.37 RTX 6000 Ada = RTX 6000
31.49 RTX 5000 Ada
23.50 RTX 4500 Ada
19.54 RTX 4000 Ada
15.57 RTX 2000 Ada
nvidia, workstation, Ampere 8.6
47.41 RTX A6000
23.56 RTX A5000, RTX A5500
19.57 RTX A4500
15.62 RTX A4000
11.63 RTX A2000 12GB
5.67 RTX A2000 6GB
nvidia, workstation, Turing 7.5
47.25 Quadro RTX 8000
23.45 Quadro RTX 6000
15.55 Quadro RTX 5000
nvidia, consumer, Blackwell 12.0
31.36 RTX 5090
23.40 RTX 5090 Laptop
15.47 RTX 5080, RTX 5070 Ti, RTX 5060 Ti 16GB, RTX 5080 Laptop
11.49 RTX 5070, RTX 5070 Ti Laptop
7.53 RTX 5060 Ti 8GB, RTX 5060, RTX 5050, RTX 5070 Laptop, RTX 5060 Laptop, RTX 5050 Laptop
nvidia, consumer, Ada 8.9
23.64 RTX 4090, RTX 4090 D
15.57 RTX 4080, RTX 4080 Super, RTX 4070 Ti Super, RTX 4060 Ti 16GB, RTX 4090 Laptop
11.61 RTX 4070, RTX 4070 Super, RTX 4070 Ti, RTX 4080 Laptop
7.63 RTX 4060 Ti 8GB, RTX 4060, RTX 4070 Laptop, RTX 4060 Laptop
5.64 RTX 4050 Laptop
nvidia, consumer, Ampere 8.6
23.56 RTX 3090, RTX 3090 Ti
15.64 RTX 3080 Ti Laptop, RTX 3080 Laptop 16GB
11.63 RTX 3060 12GB, RTX 3080 Ti
9.64 RTX 3080 10GB
11.63 RTX 3080 12GB
7.66 RTX 3070, RTX 3070 Ti, RTX 3060 Ti, RTX 3060 8GB, RTX 3050 8GB, RTX 3080 Laptop 8GB, RTX 3070 Laptop
5.67 RTX 3050 6GB, RTX 3060 Laptop
3.68 RTX 3050 Laptop
nvidia, consumer, Turing 7.5
23.46 Titan RTX
10.57 RTX 2080 Ti
7.61 RTX 2080 Super, RTX 2080, RTX 2070 Super, RTX 2070, RTX 2060 Super
5.61 RTX 2060 6GB, GTX 1660 Ti, GTX 1660 Super, GTX 1660
11.55 RTX 2060 12GB
3.63 GTX 1650
nvidia, consumer, Volta 7.0
11.77 Titan V
nvidia, consumer, Pascal 6.1
11.90 Titan Xp
10.90 GTX 1080 Ti
7.92 GTX 1080, GTX 1070 Ti, GTX 1070
5.93 GTX 1060 6GB
3.94 GTX 1050 Ti
2.94 GTX 1060 3GB
amd, data centre, CDNA 4
287.98 MI355X, MI350X
amd, data centre, CDNA 3
191.98 MI300X
255.98 MI325X
amd, data centre, CDNA 2
63.98 MI250X = MI250, MI210
amd, data centre, CDNA
31.98 MI100
amd, workstation, RDNA 4
31.86 AI PRO R9700
amd, workstation, RDNA 3
44.98 PRO W7900
29.98 PRO W7800
amd, consumer, RDNA 4
15.92 RX 9070 XT, RX 9070, RX 9060 XT 16GB
7.92 RX 9060 XT 8GB
amd, consumer, RDNA 3
23.98 RX 7900 XTX
19.98 RX 7900 XT
15.98 RX 7900 GRE, RX 7800 XT, RX 7600 XT
11.98 RX 7700 XT
7.98 RX 7600
amd, consumer, RDNA 2
15.98 RX 6900 XT, RX 6950 XT, RX 6800 XT, RX 6800
11.98 RX 6700 XT
intel, data centre, Xe HPC
63.97 Max 1550
47.97 Max 1100
intel, consumer, Xe 2
11.93 Arc B580
intel, consumer, Xe
15.11 Arc A770
7.43 Arc A750
"""

# Unified memory in GB by chip. Metal's recommendedMaxWorkingSetSize, what the GPU may hold, is two thirds of it below
# 36 GB and three quarters from there on (llama.cpp prints it in MB: 16 GB 11,453, 36 GB 28,991, 192 GB 154,619).
_APPLE = """
M1 16 8; M1 Pro 16 32; M1 Max 64 32; M1 Ultra 128 64; M2 16 8 24; M2 Pro 16 32; M2 Max 64 32 96; M2 Ultra 192 64 128;
M3 16 8 24; M3 Pro 18 36; M3 Max 64 36 48 96 128; M3 Ultra 512 96 256; M4 16 24 32; M4 Pro 24 48 64;
M4 Max 64 36 48 128; M5 16 24 32
"""

_OLD = ("Pascal", "Volta", "CDNA", "RDNA 2", "Xe")
"""Generations that are not recommended: no bf16, or no longer carried by current builds of PyTorch."""

_NOISE = re.compile(
    r"\b(nvidia|geforce|tesla|quadro|amd|ati|radeon|instinct|intel|apple|gpu|graphics|generation|edition|server|workstation"
    r"|blackwell|max-q|hbm\d\w?|\(r\)|\(tm\))\b|\boam\b"
)
_SIZE = re.compile(r"(?<![\d.a-z])(\d+)\s*g(?:i?b)?\b")
_FORM = re.compile(r"\b(sxm|pcie|nvl)\d?\b")


@cache
def gpus() -> tuple[Gpu, ...]:
    """The table, in order."""
    found: list[Gpu] = []
    vendor, tier, generation = "", "", ""
    capability: str | None = None
    for line in _TABLE.strip().splitlines():
        if not line[0].isdigit():
            vendor, tier, generation = line.split(", ")
            generation, _, capability = generation.rpartition(" ") if vendor == "nvidia" else (generation, "", None)
            continue
        size, _, names = line.partition(" ")
        for entry in names.split(", "):
            name, *aliases = entry.split(" = ")
            memory = int(float(size) * GiB)
            kind = cast(Vendor, vendor), cast(Tier, tier), generation
            found.append(Gpu(name, memory, *kind, tuple(aliases), capability))
    for chip in _APPLE.split(";"):
        name, sizes = re.findall(r"(M\d(?: [A-Z]\w+)?) ([\d ]+)", chip)[0]
        for gb in map(int, sizes.split()):
            share = gb * GiB * 2 // 3 if gb < 36 else gb * GiB * 3 // 4
            found.append(Gpu(f"{name} {gb}GB", share, "apple", "consumer", name.split()[0]))
    return tuple(found)


def find_gpu(text: str) -> tuple[Gpu, str | None]:
    """The GPU that somebody means: a name, a size (`24GB`, `24GiB`), or `local` for this machine's first one.

    The second value is a notice where the name has variants of other sizes: the most common is taken. An unknown
    name is `usage`, with the nearest known ones; `local` without a GPU is `no_gpu`.
    """
    if text.strip().lower() == "local":
        return local_gpu()
    size = parse_bytes(text)
    if size:
        return Gpu(text.strip(), size), None
    base, form, gb = _parts(text)
    named = _index().get(base, ())
    fitting = [g for g in named if gb is None or gb == _parts(g.name)[2]]
    fitting = fitting or [g for g in named if gb and 0.88 <= g.memory_bytes / (gb * GiB) <= 1.02]
    fitting = fitting or [g for g in named if gb and any(gb == _parts(a)[2] for a in g.aliases)]
    fitting = [g for g in fitting if form and form == _parts(g.name)[1]] or fitting
    fitting = [g for g in fitting if g.name.lower() == text.strip().lower()] or fitting
    if not fitting:
        raise HfvramError("usage", f"--gpu {printable(text, 40)!r} is not known: {_nearest(base, named)}")
    first = fitting[0]
    others = [g for g in fitting[1:] if abs(g.memory_bytes / first.memory_bytes - 1) > 0.01]
    if not others:
        return first, None
    also = ", ".join(f"{g.name} ({gib(g.memory_bytes)})" for g in others)
    return first, f"{text.strip()} taken as {first.name} ({gib(first.memory_bytes)}); there is also {also}"


def local_gpu() -> tuple[Gpu, str | None]:
    """This machine's first NVIDIA GPU as nvidia-smi reports it: total less reserved, and a notice if it is in use."""
    import os
    import subprocess

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.reserved,memory.used", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(
            query + (["-i", visible] if visible else []), capture_output=True, text=True, timeout=20, check=True
        ).stdout
        name, *sizes = (field.strip() for field in out.splitlines()[0].split(","))
        total, reserved, used = (int(s) if s.isdigit() else 0 for s in sizes)
        gpu = Gpu(f"{printable(name, 60)} (local)", (total - reserved) * MiB, "nvidia", capability=_capability(name))
        if gpu.memory_bytes <= 0:
            raise ValueError(out)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        message = "nvidia-smi finds no GPU on this machine: name one, as in --gpu 'RTX 4090' or --gpu 24GB"
        raise HfvramError("no_gpu", message) from None
    in_use = f"{gib(used * MiB)} of {gpu.name} is in use now" if used > 256 else None
    return gpu, in_use


def _capability(name: str) -> str | None:
    named = _index().get(_parts(name)[0], ())
    return named[0].capability if named else None


def recommend(device_bytes: int) -> tuple[Gpu, ...]:
    """The smallest GPU of each tier and vendor that holds this many bytes, smallest first."""
    return tuple(gpu for gpu, _ in fewest(lambda gpu, _: gpu.memory_bytes >= device_bytes, (1,)))


def fewest(runs: Callable[[Gpu, int], bool], counts: Sequence[int]) -> list[tuple[Gpu, int]]:
    """Of each tier and vendor the fewest GPUs on which it `runs`, and of that many the smallest; the least memory
    first. A computer has one of Apple's."""
    kinds: dict[tuple[str, str], list[Gpu]] = {}
    for gpu in sorted(gpus(), key=lambda g: g.memory_bytes):
        if gpu.generation not in _OLD and "Laptop" not in gpu.name:
            kinds.setdefault((gpu.vendor, gpu.tier), []).append(gpu)
    found: list[tuple[Gpu, int]] = []
    for (vendor, _), members in kinds.items():
        possible = ((gpu, n) for n in counts if n == 1 or vendor != "apple" for gpu in members)
        found += list(islice((one for one in possible if runs(*one)), 1))
    return sorted(found, key=lambda one: one[0].memory_bytes * one[1])


@cache
def _parts(text: str) -> tuple[str, str | None, int | None]:
    """What is left of a name without vendor words and spaces, its form (`sxm`), its size in GB."""
    text = _NOISE.sub(" ", text.lower().replace("_", " ").replace("-", " "))
    form, size = _FORM.search(text), _SIZE.search(text)
    base = re.sub(r"[^a-z0-9]", "", _FORM.sub(" ", _SIZE.sub(" ", text)))
    return base, form and form[1], size and int(size[1])


@cache
def _index() -> dict[str, tuple[Gpu, ...]]:
    """GPUs by the base of their name, with and without the series in front (`rtx4090`, `4090`)."""
    index: dict[str, tuple[Gpu, ...]] = {}
    for gpu in gpus():
        bases = [_parts(name)[0] for name in (gpu.name, *gpu.aliases)]
        short = [re.sub(r"^(rtx|gtx|rx|arc|pro|aipro|rtxpro)(?=\w*\d)", "", base) for base in bases]
        for base in dict.fromkeys(bases + short):
            index[base] = (*index.get(base, ()), gpu)
    return index


def _nearest(base: str, named: tuple[Gpu, ...]) -> str:
    from difflib import get_close_matches

    close = [index[0] for b in get_close_matches(base, _index(), 4, 0.6) if (index := _index()[b])]
    names = list(dict.fromkeys(g.name for g in named or close))
    hint = f"nearest are {', '.join(names)}" if names else "`hfvram gpus` lists the names"
    return f"{hint}; a size such as 24GB works too"
