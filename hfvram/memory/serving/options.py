"""Options of a serving engine as resolved for one request: those given, else the engine's own defaults."""

from dataclasses import dataclass

from hfvram.units import GiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`None` stands for what the engine decides itself."""

    ctx: int
    dtype: str
    quant: str
    cache_element_bytes: int
    tp: int = 1
    pp: int = 1
    gpu_bytes: int | None = None
    gpu_name: str = ""
    utilization: float | None = None
    ep: int = 1
    """Data parallel ranks that the experts are divided by, each of `tp` ranks."""
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    enforce_eager: bool = False
    flash: bool = False
    """Attention by flash-attn, which needs no mask."""
    state_dtype: str | None = None
    """dtype of recurrent states, where the configuration asks for one."""

    @property
    def large(self) -> bool:
        """vLLM's rule for larger defaults: 70 GiB or more, and no A100 (engine/arg_utils.py, get_batch_defaults)."""
        return (self.gpu_bytes or 0) >= 70 * GiB and "a100" not in self.gpu_name.lower()
