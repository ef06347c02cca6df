"""SGLang's start-up log. "GB" is GiB; the usage of weights is what the device lost meanwhile.

Source: SGLang 0.5.23, model_executor/model_runner.py, mem_cache/memory_pool.py, managers/scheduler.py.
"""

import re
from typing import Final

from hfvram.read.engine_line import CACHE_DTYPES, DTYPES
from hfvram.read.engine_log import Dialect, Setting, pattern


def _word(table: dict[str, str], text: str) -> str | None:
    found = table.get(text)
    return None if found == "auto" else found


def _parts(text: str) -> int | None:
    return int(text) if int(text) > 1 else None


DIALECT: Final = Dialect(
    "sglang",
    (
        pattern("weights", r"Load weight end\..*?mem usage=~"),
        pattern("tokens", r"KV Cache is allocated\..*?#tokens: (\d+)", "tokens", "min"),
        pattern("keys", r"KV Cache is allocated\..*?K size: ~"),
        pattern("values", r"KV Cache is allocated\..*?V size: ~"),
        pattern("pool", r"KV Cache is allocated\..*?KV size: ~"),
        pattern("pool", r"SWAKVPool mem usage: ~"),
        pattern("sliding tokens", r"SWAKVPool mem usage:.*?swa size: (\d+)", "tokens", "min"),
        pattern("tokens", r"SWAKVPool mem usage:.*?full size: (\d+)", "tokens", "min"),
        pattern("states in the pool", r"Mamba Cache is allocated\..*?max_mamba_cache_size: (\d+)", "requests", "min"),
        pattern("convolution states", r"Mamba Cache is allocated\..*?conv_state size: ~"),
        pattern("recurrent states", r"Mamba Cache is allocated\..*?ssm_state size: ~"),
        pattern("CUDA graphs", r"(?:Capture|capture).{0,40}[Gg]raph end\..*?mem usage=~"),
        pattern("NCCL", r"Init torch distributed ends\..*?mem usage=~"),
    ),
    (
        Setting("model", re.compile(r"server_args=ServerArgs\(.*?model_path='([^']+)'")),
        Setting("ctx", re.compile(r"\bcontext_len=(\d+)"), int),
        Setting("dtype", re.compile(r"Load weight end\..*?dtype=torch\.(\w+)"), lambda t: _word(DTYPES, t)),
        Setting("tp", re.compile(r"ServerArgs\(.*?\btp_size=(\d+)"), _parts),
        Setting("pp", re.compile(r"ServerArgs\(.*?\bpp_size=(\d+)"), _parts),
        Setting("kv_dtype", re.compile(r"ServerArgs\(.*?\bkv_cache_dtype='(\w+)'"), lambda t: _word(CACHE_DTYPES, t)),
        Setting("mem_fraction_static", re.compile(r"\bmem_fraction_static=([01]\.\d+)"), float),
        Setting("max_num_batched_tokens", re.compile(r"\bchunked_prefill_size=(\d+)"), int),
        Setting("enforce_eager", re.compile(r"\bdisable_cuda_graph=(True)"), bool),
    ),
)
