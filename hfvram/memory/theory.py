"""Formulas of the field for what training keeps: of Korthikanti et al. and of Megatron-LM's own report.

They stand for comparison beside what hfvram works out (`training/`), and no answer is made of them: they know 16-bit
activations, one kind of layer (LayerNorm, GELU, dropout), and neither kernels nor the peak.

Symbols: b sequences of s tokens, h hidden size, a heads, L layers, V vocabulary, t ranks of tensor parallelism.
"""

from math import ceil
from typing import Literal

Recomputed = Literal["none", "selective", "full"]


def layer_activation_bytes(
    s: int,
    b: int,
    h: int,
    a: int,
    t: int = 1,
    sequence_parallel: bool = False,
    recomputed: Recomputed = "none",
) -> int:
    """Activations that one layer keeps, in bytes of 16-bit training.

    s·b·h·(34 + 5·a·s/h) without parallelism, s·b·h·(10 + 24/t + 5·a·s/(h·t)) with tensor parallelism, all of it over t
    with sequence parallelism, too. Selective recomputation of the core attention drops the term of a·s², full
    recomputation leaves the layer's input, 2·s·b·h, which sequence parallelism keeps whole as the paper counts it.

    With a fused kernel (SDPA, flash-attn) nothing of a·s² is kept, so that recomputing the core attention alone saves
    nothing but its output: a request knows only whole layers, all of them or one of N (`checkpoint_every`).

    Leaves out: gated feed-forwards, grouped keys and values, fused kernels, norms in fp32, buffers.

    Selective recomputation saves 70 % of GPT-3's activations and 65 % of MT-NLG 530B's (section 5):

    >>> gpt3 = {"s": 2048, "b": 1, "h": 12288, "a": 96}
    >>> whole, less = layer_activation_bytes(**gpt3), layer_activation_bytes(**gpt3, recomputed="selective")
    >>> whole == 2048 * 12288 * (34 + 80), less == 2048 * 12288 * 34, round(1 - less / whole, 2)
    (True, True, 0.7)
    >>> nlg = {"s": 2048, "b": 1, "h": 20480, "a": 128}
    >>> whole, less = layer_activation_bytes(**nlg), layer_activation_bytes(**nlg, recomputed="selective")
    >>> whole == 2048 * 20480 * (34 + 64), round(1 - less / whole, 2)
    (True, 0.65)

    Both techniques together over 8 ranks, against tensor parallelism alone, are a factor of five:

    >>> tensor = layer_activation_bytes(**nlg, t=8)
    >>> round(tensor / layer_activation_bytes(**nlg, t=8, sequence_parallel=True, recomputed="selective"), 1)
    4.9

    Source: Korthikanti et al. 2022, arXiv 2205.05198, equations 1, 2, 4 and 6, table 2.
    """
    if recomputed == "full":
        return 2 * s * b * h
    attention = 0 if recomputed == "selective" else 5 * a * s * s * b
    if sequence_parallel:
        return (34 * s * b * h + attention) // t
    return 10 * s * b * h + (24 * s * b * h + attention) // t


def stage_activation_bytes(layer_bytes: int, layers: int, p: int = 1, m: int | None = None) -> int:
    """Activations of the first of p pipeline stages, which holds p microbatches of L/p layers: L layers in all; an
    interleaved schedule of m stages a rank holds 1 + (p − 1)/(p·m) times as much.

    >>> stage_activation_bytes(100, 96, p=8), stage_activation_bytes(100, 96, p=8, m=3)
    (9600, 12400)

    Source: Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.3.
    """
    total = layer_bytes * layers
    return total if m is None else total * (p * m + p - 1) // (p * m)


def ends_activation_bytes(s: int, b: int, h: int, v: int, t: int = 1, p: int = 1) -> int:
    """Activations of the embedding's dropout (p microbatches of them), and without a pipeline those of the last norm,
    the head and its logits in fp32: s·b·h·p/t + 4·s·b·h/t·(1 + V/h).

    >>> ends_activation_bytes(2048, 4, 6144, 51200, t=8) / stage_activation_bytes(
    ...     layer_activation_bytes(2048, 4, 6144, 64, t=8, sequence_parallel=True, recomputed="selective"), 48
    ... ) < 0.03
    True

    Source: Korthikanti et al. 2022, arXiv 2205.05198, section 4.3.
    """
    return (s * b * h * p + (4 * s * b * (h + v) if p == 1 else 0)) // t


def megatron_parameters(
    layers: int,
    h: int,
    heads: int,
    ffn: int,
    vocab: int,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    experts: int = 1,
    gated: bool = False,
    untied: bool = False,
    t: int = 1,
    p: int = 1,
) -> float:
    """Parameters of the fullest rank as Megatron-LM counts them: its layers, an embedding, and without a pipeline the
    head of its own. `vocab` is the padded one; norms have a weight and a bias, whatever the model's have.

    GPT-2 XL with a vocabulary padded to 50,304 has 1.5554 billion, positions and linear biases left out:

    >>> round(megatron_parameters(48, 1600, 25, 6400, 50304) / 1e9, 4)
    1.5554

    Source: Megatron-LM, megatron/training/theoretical_memory_utils.py `compute_weight_and_optimizer_memory`.
    """
    ratio = (head_dim or h / heads) * heads / h
    attention = (1 + (kv_heads or heads) / heads) * ratio
    feed_forward = ffn / h * experts * (1.5 if gated else 1.0)
    in_layers = 2 * layers * h * h * (attention + feed_forward + 2 / h + 1 / (layers * h))
    embedding = h * vocab
    return (in_layers / p + embedding * (2 if untied and p == 1 else 1)) / t


def megatron_state_bytes(parameters: float, distributed_over: int | None = None) -> float:
    """Weights, fp32 gradients, and AdamW with fp32 masters: 18 bytes a parameter, or 6 + 12/n where the optimizer is
    distributed over n data-parallel ranks.

    Printed for GPT-2 XL as 26,699.47 MB, for Llama-3 8B over 8 ranks as 57,438.81 MB (a MB being a MiB):

    >>> round(megatron_state_bytes(megatron_parameters(48, 1600, 25, 6400, 50304)) / 2**20, 2)
    26699.47
    >>> llama = megatron_parameters(32, 4096, 32, 14336, 128256, kv_heads=8, gated=True, untied=True)
    >>> round(megatron_state_bytes(llama, 8) / 2**20, 2)
    57438.81

    Source: Megatron-LM, megatron/training/theoretical_memory_utils.py `compute_weight_and_optimizer_memory`.
    """
    return parameters * (18 if distributed_over is None else 6 + 12 / distributed_over)


def megatron_activation_bytes(
    layers: int,
    h: int,
    ffn: int,
    vocab: int,
    s: int,
    b: int,
    *,
    t: int = 1,
    p: int = 1,
    interleaved: int | None = None,
    microbatches: int | None = None,
) -> float:
    """Activations of the first stage as Megatron-LM reports them, which it does with sequence parallelism and selective
    recomputation alone: s·b·h·(18 + 4·f/h) a layer, 8 bytes and the dropout's h a token, and without a pipeline the
    head's input and logits; all over t. An interleaved schedule holds more, few microbatches less.

    >>> megatron_activation_bytes(1, 1024, 4096, 0, 2048, 1) == 2048 * 1024 * 34 + 2048 * (8 + 1024) + 2048 * 1024 * 4
    True

    Source: Megatron-LM, megatron/training/theoretical_memory_utils.py `compute_activation_memory`.
    """
    total = s * b * h * (18 + 4 * ffn / h) * layers + 8 * s * b * p + s * b * h * p
    if interleaved is not None:
        total *= 1 + (p - 1) / (p * interleaved)
    elif p > 1 and microbatches is not None:
        total *= min(1, microbatches / p)
    if p == 1:
        total += s * b * h * 4 * (1 + vocab / h)
    return total / t


def microbatches_in_flight(p: int, interleaved: int | None = None, microbatches: int | None = None) -> int:
    """Microbatches whose activations the first stage holds at once, as Megatron-LM reports them.

    >>> microbatches_in_flight(8), microbatches_in_flight(8, 3), microbatches_in_flight(8, None, 4)
    (8, 11, 4)

    Source: Megatron-LM, megatron/training/theoretical_memory_utils.py `compute_activation_memory`.
    """
    if interleaved is not None:
        return ceil((1 + (p - 1) / (p * interleaved)) * p)
    return p if microbatches is None else min(microbatches, p)
