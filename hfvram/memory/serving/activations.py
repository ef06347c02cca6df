"""What vLLM's profiling run takes beside the weights: the sampler's logits, or the widest layer, whichever is more.

The run computes T = `max_num_batched_tokens` tokens of a dummy batch, then samples for R = `max_num_seqs` of them. The
terms follow the code; which of them are live together, and the constants, are fitted to the activation peaks that
vLLM 0.19 printed in 34 runs on H100 (fixtures/published): within 0.03 GiB for text models.

Source: vLLM 0.19.0, v1/worker/gpu_model_runner.py (profile_run), v1/sample/sampler.py, v1/sample/ops/
topk_topp_triton.py, model_executor/layers/fused_moe/fused_moe.py (TritonExperts.workspace_shapes).
"""

from dataclasses import dataclass

from hfvram.memory.serving.layers import kv_heads
from hfvram.model.architecture import Architecture
from hfvram.model.layers import Attention, Layer, MixtureOfExperts
from hfvram.units import MiB

SAMPLER_BYTES = 48 * MiB
"""cuBLAS's workspace of 32 MiB and small tensors, while sampling. Calibrated."""
LAYER_BYTES = 16 * MiB
"""The same while a layer runs. Calibrated."""
MULTIPROCESSORS = 132
"""Of an H100: the top-k kernel keeps a row of the vocabulary in fp32 for each."""


@dataclass(frozen=True, slots=True)
class Profile:
    """The profiling run: tokens computed together, sequences sampled for, bytes of an element, ranks."""

    tokens: int
    sequences: int
    element_bytes: int
    tp: int = 1
    quant: str = "none"

    @property
    def rows(self) -> int:
        return min(self.tokens, self.sequences)


def sampling_bytes(vocab: int, hidden: int, p: Profile) -> int:
    """R·V·(e + 12) for the logits and three copies of them in fp32, the hidden states, the top-k kernel's buffer.

    >>> round(sampling_bytes(128256, 4096, Profile(8192, 1024, 2)) / 2**30, 2)
    1.88
    """
    logits = p.rows * vocab * (p.element_bytes + 12)
    return logits + min(MULTIPROCESSORS, p.rows) * vocab * 4 + p.tokens * hidden * p.element_bytes + SAMPLER_BYTES


def experts_bytes(moe: MixtureOfExperts, p: Profile) -> int:
    """Two workspaces that stay for good: T·k rows of the wider of hidden and expert width, and of twice that width.

    The kernels for MXFP4 have none.

    >>> from hfvram.model.layers import MixtureOfExperts
    >>> moe = MixtureOfExperts(hidden_size=2048, experts=128, top_k=8, intermediate_size=768, params=())
    >>> experts_bytes(moe, Profile(8192, 1024, 2)) // 2**20
    512
    """
    if p.quant == "mxfp4":
        return 0
    width, hidden = moe.intermediate_size // p.tp, moe.latent_size or moe.hidden_size
    inner = width * (2 if moe.gated else 1)
    return p.tokens * moe.top_k * (max(width, hidden) + max(inner, hidden)) * p.element_bytes


def layer_bytes(layer: Layer, hidden: int, p: Profile) -> int:
    """T·(4h + the widest pair of a layer): gate, up and their product, or queries, keys, values and the output."""
    widths = [0]
    for mixer in layer.mixers:
        if isinstance(mixer, Attention):
            heads = mixer.heads // p.tp
            keys = kv_heads(mixer.kv_heads, p.tp) * (mixer.head_dim + mixer.value_dim)
            widths.append(2 * heads * mixer.head_dim + keys)
    feed = layer.feed_forward
    if isinstance(feed, MixtureOfExperts):
        widths.append((3 if feed.gated else 2) * feed.shared_intermediate_size // p.tp)
    elif feed:
        widths.append((3 if feed.gated else 2) * feed.intermediate_size // p.tp)
    return p.tokens * (4 * hidden + max(widths)) * p.element_bytes + LAYER_BYTES


def peak_bytes(a: Architecture, p: Profile, first: int, last: int) -> int:
    """The peak on a rank with the layers `first` to before `last`: a stage that is given its input holds that too."""
    layers = {id(x): x for x in a.text.layers[first:last]}.values()
    wide = max((layer_bytes(x, a.hidden_size, p) for x in layers), default=0)
    feeds = (x.feed_forward for x in layers)
    workspace = max((experts_bytes(f, p) for f in feeds if isinstance(f, MixtureOfExperts)), default=0)
    peak = max(wide, sampling_bytes(a.vocab_size, a.hidden_size, p) if last == len(a.text.layers) else 0)
    hidden = p.tokens * a.hidden_size * p.element_bytes
    given = 2 * hidden if first else 0
    seen = 2 * hidden if len(a.stacks) > 1 and not first else 0
    return peak + workspace + given + seen
