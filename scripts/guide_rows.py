"""Rows of docs/guide.md: what the guide claims, in our words, the commands that show the truth, why the two differ."""

import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from hfvram.answer.estimate import Estimate
from hfvram.answer.question import Session
from hfvram.request import Request

GB = 10**9
DENSE, MOE, MAMBA, SMALL = (f"fixtures/configs/guide/{n}" for n in ("dense-7b", "moe-128", "mamba-7b", "dense-1b3"))
TRAIN = "--mode train --ctx 2048"
CKPT = "--gradient-checkpointing"
FLAGS = {"gradient_checkpointing", "max_ctx", "max_batch", "sp", "padding"}
Row = tuple[Any, ...]
"""The guide's claim; the truth, a text or a function of the commands' estimates; why; the commands."""


class Answers:
    """Estimates by command line, each worked out once, by formula."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.session = Session()
        self.ask = cache(self._ask)

    def __call__(self, command: str) -> Estimate:
        return self.ask(command)

    def _ask(self, command: str) -> Estimate:
        model, *words = shlex.split(command)
        values: dict[str, Any] = {}
        while words:
            name = words.pop(0).removeprefix("--").replace("-", "_")
            values[name] = True if name in FLAGS else words.pop(0)
        path = self.root / model
        request = Request.from_dict({"method": "formula"} | values)
        return self.session.estimate(str(path) if path.is_dir() else model, request, offline=True)


def gb(size: float) -> str:
    """Bytes in the guide's unit.

    >>> gb(42_000_000_000), gb(2_147_483_648), gb(19_988_480 * 2)
    ('42.0 GB', '2.15 GB', '40.0 MB')
    """
    if size < GB / 10:
        return f"{size / 10**6:.1f} MB"
    return f"{size / GB:.1f} GB" if size >= 10 * GB else f"{size / GB:.2f} GB"


def kept(e: Estimate) -> int:
    """The most activations of a training step."""
    return max(p.activations_bytes for p in e.phases)


def total(e: Estimate) -> int:
    """Weights, gradients, states and the most activations: what the guide shares out."""
    return e.weights_bytes + e.gradients_bytes + e.optimizer_bytes + kept(e)


def shares(e: Estimate) -> str:
    parts = {
        "parameters": e.weights_bytes,
        "optimizer": e.optimizer_bytes,
        "gradients": e.gradients_bytes,
        "activations": kept(e),
    }
    return ", ".join(f"{name} {100 * size / total(e):.0f} %" for name, size in parts.items())


def per_parameter(e: Estimate) -> str:
    return f"{e.peak_allocated_bytes / e.model.parameters:.1f}P live, {gb(e.device_bytes)} on a GPU"


def on_a_gpu(*found: Estimate) -> str:
    return ", ".join(gb(e.device_bytes) for e in found)


def grows(short: Estimate, long: Estimate) -> str:
    change = 100 * (long.device_bytes / short.device_bytes - 1)
    return f"{change:+.0f} % ({gb(short.device_bytes)} to {gb(long.device_bytes)})"


def ratio(first: int, second: int) -> str:
    return f"{first / second:.1f} times"


def cache_passes_weights(e: Estimate) -> str:
    per_token = e.cache_bytes / (e.request.ctx or 1)
    passes = e.weights_bytes / per_token
    return f"{gb(e.cache_bytes)} of {gb(e.peak_allocated_bytes)}; as much as the weights at {passes:,.0f} tokens"


def states(e: Estimate) -> int:
    return e.weights_bytes + e.gradients_bytes + e.optimizer_bytes


def sharded(one: Estimate, *several: Estimate) -> str:
    live = [f"{gb(e.peak_allocated_bytes)} at stage {e.request.zero}" for e in several]
    return f"{gb(one.peak_allocated_bytes)} live on one GPU with fp32 states; on each of 4 {', '.join(live)}"


MODELS: dict[str, Callable[[Answers], str]] = {
    "dense-7b": lambda a: f"Llama-2-7B's sizes, {a(DENSE).model.parameters:,} parameters, all heads cached",
    "moe-128": lambda a: (
        f"{a(MOE).model.parameters:,} parameters, {a(MOE).model.active_parameters:,} active: 128 experts, top-2, in "
        "every other layer of a 24-layer model of width 1,024. 120 GB at 8 bytes a parameter allow 15B, so this is "
        "the model that the guide's case table can mean"
    ),
    "mamba-7b": lambda a: f"Mamba-1 at 64 layers of width 4,096, {a(MAMBA).model.parameters:,} parameters",
}

SHARES: list[Row] = [
    (
        "Training: parameters 10–20 %, optimizer 40–60 %, gradients 10–20 %, activations 20–40 %",
        shares,
        "Holds at one size of batch. Weights, gradients and two bf16 moments stand as 1 : 1 : 2 whatever the model; "
        "the activations' part is what context and batch make it.",
        f"{DENSE} {TRAIN}",
    ),
    (
        "… the same at 8,192 tokens",
        shares,
        "Activations grow with tokens, the rest does not. A share is no rule to calculate with.",
        f"{DENSE} --mode train --ctx 8192",
    ),
    (
        "… and with checkpointing",
        shares,
        "Only each layer's input is kept.",
        f"{DENSE} {TRAIN} {CKPT}",
    ),
    (
        "KV cache is the dominant part of inference",
        cache_passes_weights,
        "Not for one sequence of some thousand tokens. With every head cached it passes 7B weights late; with 8 KV "
        "heads in 32 four times later; with Mamba never. Batch multiplies it.",
        f"{DENSE} --ctx 4096",
    ),
    (
        "… of a model with grouped heads",
        cache_passes_weights,
        "8 KV heads of 32 are cached.",
        "meta-llama/Llama-3.1-8B --ctx 4096",
    ),
    (
        "Training ≈ 20P in fp32",
        per_parameter,
        "4P weights, 4P gradients, 8P states are 16P; at 2,048 tokens the activations happen not to be live when all "
        "of those are.",
        f"{DENSE} {TRAIN} --dtype fp32",
    ),
    (
        "Training ≈ 6P in mixed precision",
        per_parameter,
        "Autocast keeps weights, gradients and states in fp32: 16P, and bf16 copies of the weights in use. No mixed "
        "precision with AdamW comes near 6P.",
        f"{DENSE} {TRAIN} --dtype fp32 --mixed-precision bf16",
    ),
    (
        "… what does come near 6P",
        per_parameter,
        "Pure bf16 with 8-bit states is 2P + 2P + 2P.",
        f"{DENSE} {TRAIN} {CKPT} --optimizer adamw_8bit",
    ),
    (
        "Inference ≈ 2P + KV cache",
        lambda e: f"{gb(e.guide.bytes)} by the rule, {gb(e.peak_allocated_bytes)} live, {gb(e.device_bytes)} on a GPU",
        "A good rule where all heads are cached in 16 bits; it leaves out what the prefill computes with, the "
        "allocator, and 0.7 GB of context and kernels.",
        f"{DENSE} --ctx 2048",
    ),
]

TRANSFORMER: list[Row] = [
    (
        "Optimizer 4P: fp32 master copy, momentum and variance",
        lambda low, mixed: (
            f"{low.optimizer_bytes / low.model.parameters:.0f}P in pure bf16, "
            f"{(mixed.optimizer_bytes + mixed.weights_bytes) / mixed.model.parameters:.0f}P with an fp32 master copy"
        ),
        "4P are two moments in bf16. The three things named are 4 bytes each, 12P.",
        f"{DENSE} {TRAIN}",
        f"{DENSE} {TRAIN} --dtype fp32 --mixed-precision bf16",
    ),
    (
        "7B ≈ 42 GB, 14B ≈ 84 GB to train",
        on_a_gpu,
        "8P alone are 54 and 118 GB. Between backward and step, gradients, weights and states stand together; no "
        "activation is needed to pass 6P.",
        f"{DENSE} {TRAIN}",
        f"Qwen/Qwen2.5-14B {TRAIN}",
    ),
    (
        "Activations b·s·h·(34 + 5·a·s/h)",
        lambda eager, fast: (
            f"{gb(2048 * 4096 * (34 + 5 * 32 * 2048 / 4096))} a layer by the formula; {gb(kept(eager) / 32)} with "
            f"eager attention, {gb(kept(fast) / 32)} with SDPA"
        ),
        "It is one layer's (Korthikanti et al. 2022: GELU, dropout, 4h wide), and a is the number of heads, not a "
        "coefficient. Llama's norms in fp32 and three feed-forward widths take more than 34; SDPA and flash never "
        "keep the 5·a·s² part. The true figures here hold the logits' share too.",
        f"{DENSE} {TRAIN} --attention eager",
        f"{DENSE} {TRAIN}",
    ),
    (
        "LoRA, r = 8: 7B ≈ 16 GB",
        lambda plain, ckpt, quant: (
            f"{gb(plain.device_bytes)}; {gb(ckpt.device_bytes)} with checkpointing; {gb(quant.device_bytes)} as QLoRA"
        ),
        "Only with checkpointing. LoRA leaves out gradients and states of the base, not its activations.",
        f"{DENSE} --mode lora --ctx 2048 --lora-r 8",
        f"{DENSE} --mode lora --ctx 2048 --lora-r 8 {CKPT}",
        f"{DENSE} --mode qlora --ctx 2048 --lora-r 8 {CKPT}",
    ),
    (
        "LoRA saves 60 % and more of full fine-tuning",
        lambda full, plain, full_ckpt, ckpt: (
            f"{100 * (1 - plain.device_bytes / full.device_bytes):.0f} %; with checkpointing in both, "
            f"{100 * (1 - ckpt.device_bytes / full_ckpt.device_bytes):.0f} %"
        ),
        "The share depends on what the activations are.",
        f"{DENSE} {TRAIN}",
        f"{DENSE} --mode lora --ctx 2048 --lora-r 8",
        f"{DENSE} {TRAIN} {CKPT}",
        f"{DENSE} --mode lora --ctx 2048 --lora-r 8 {CKPT}",
    ),
    (
        "LoRA's own part: 2·r·d·k, k the share of layers (taken as written: 2·8·4,096·0.3 ≈ 20 thousand)",
        lambda all_, qv: (
            f"{all_.model.trainable_parameters:,} parameters on all linear layers, "
            f"{qv.model.trainable_parameters:,} on queries and values"
        ),
        "r·(inputs + outputs) of every layer that is adapted, times 16 bytes in fp32 with gradients and AdamW.",
        f"{DENSE} --mode lora --ctx 2048 --lora-r 8",
        f"{DENSE} --mode lora --ctx 2048 --lora-r 8 --lora-targets q_proj,v_proj",
    ),
    (
        "7B generating 4K tokens: ≈ 2.5 GB of cache",
        lambda old, new: f"{gb(old.cache_bytes)}; with 8 KV heads {gb(new.cache_bytes)}",
        "2·b·s·layers·d_head·n_head × 2 B is 2.15 GB, the guide's own formula. n_head must be the KV heads.",
        f"{DENSE} --ctx 4096",
        "meta-llama/Llama-3.1-8B --ctx 4096",
    ),
    (
        "The cache can pass the model itself",
        lambda e: f"{gb(e.cache_bytes)} of cache, {gb(e.weights_bytes)} of weights",
        "True, at long context or large batch.",
        f"{DENSE} --ctx 4096 --batch 16",
    ),
]

EXPERTS: list[Row] = [
    (
        "P_active = P_dense + topk·P_expert, topk usually 2",
        lambda m, d: (
            f"Mixtral-8x7B {m.model.active_parameters:,} of {m.model.parameters:,}; DeepSeek-V3 "
            f"{d.model.active_parameters:,} of {d.model.parameters:,}"
        ),
        "The formula is right. Newer models choose 4 to 10 and add shared experts.",
        "mistralai/Mixtral-8x7B-v0.1",
        "deepseek-ai/DeepSeek-V3",
    ),
    (
        "Training keeps all experts: 8P_total + activations",
        lambda e: f"{gb(states(e))} of weights, gradients and states, {gb(e.device_bytes)} on a GPU",
        "Right for AdamW in pure bf16.",
        f"{MOE} {TRAIN}",
    ),
    (
        "A 13B MoE of 128 experts trains in 3 to 5 times the memory of a 1.3B dense model",
        lambda moe, dense: ratio(moe.device_bytes, dense.device_bytes),
        "States go by parameters, and those are ten times as many; the activations that both have are a small part.",
        f"{MOE} {TRAIN} {CKPT}",
        f"{SMALL} {TRAIN} {CKPT}",
    ),
    (
        "Inference with experts offloaded: 2P_active + cache + overhead",
        lambda off, on: (
            f"{gb(off.guide.bytes)} by the rule, {gb(off.device_bytes)} with experts in CPU memory, "
            f"{gb(on.device_bytes)} with all on the GPU"
        ),
        "The experts of one layer at a time have to be on the GPU, not those of all layers; a long prompt needs nearly "
        "every expert of a layer, whatever top-k is.",
        "mistralai/Mixtral-8x7B-v0.1 --ctx 2048 --offload experts",
        "mistralai/Mixtral-8x7B-v0.1 --ctx 2048",
    ),
]

STATE_SPACE: list[Row] = [
    (
        "Attention's memory grows as s², the state's as s",
        lambda a, b, c, d, e, f: (
            f"4 times the tokens, activations: SDPA {ratio(kept(b), kept(a))}, eager {ratio(kept(d), kept(c))}, "
            f"Mamba {ratio(kept(f), kept(e))}"
        ),
        "Only attention that is written out (eager) keeps b·a·s·s. SDPA and flash attention are linear, like Mamba.",
        f"{DENSE} --mode train --ctx 1024",
        f"{DENSE} --mode train --ctx 4096",
        f"{DENSE} --mode train --ctx 1024 --attention eager",
        f"{DENSE} --mode train --ctx 4096 --attention eager",
        f"{MAMBA} --mode train --ctx 1024",
        f"{MAMBA} --mode train --ctx 4096",
    ),
    (
        "At 8K tokens 40–60 % less activation memory than a Transformer",
        lambda m, t, eager: (
            f"{gb(kept(m))} beside {gb(kept(t))}: {100 * (kept(m) / kept(t) - 1):+.0f} %; against eager attention "
            f"{100 * (kept(m) / kept(eager) - 1):+.0f} %"
        ),
        "Against a Transformer with SDPA or flash attention there is hardly a difference; against eager attention the "
        "guide's claim is too modest.",
        f"{MAMBA} --mode train --ctx 8192",
        f"{DENSE} --mode train --ctx 8192",
        f"{DENSE} --mode train --ctx 8192 --attention eager",
    ),
    (
        "… which supposes that Mamba's kernels are installed",
        lambda e: f"{gb(kept(e))} at 1,024 tokens without them",
        "transformers' fallback keeps b·s·d_inner·d_state in fp32, several times over.",
        f"{MAMBA} --mode train --ctx 1024 --kernels fallback",
    ),
    (
        "Inference keeps a state of d_state × d_inner, however long the text",
        lambda short, long: f"{gb(short.cache_bytes)} at 2,048 tokens, {gb(long.cache_bytes)} at 131,072",
        "Right, and a convolution's last columns beside it, for each layer and sequence.",
        f"{MAMBA} --ctx 2048",
        f"{MAMBA} --ctx 131072",
    ),
    (
        "… so memory is constant",
        lambda short, long: f"{gb(short.device_bytes)} and {gb(long.device_bytes)} on a GPU",
        "The cache is; the prefill's activations grow with the prompt, unless it is cut into pieces.",
        f"{MAMBA} --ctx 2048",
        f"{MAMBA} --ctx 131072",
    ),
]

FOUR = f"{DENSE} {TRAIN} --gpus 4 --mixed-precision bf16"
TECHNIQUES: list[Row] = [
    (
        "Checkpointing: activations from O(L) to O(√L)",
        lambda a, b, c, d: f"32 layers {gb(kept(a))} to {gb(kept(b))}, 80 layers {gb(kept(c))} to {gb(kept(d))}",
        "√L is Chen et al. 2016 with √L segments. transformers keeps the input of every layer, L·b·s·h·2 bytes, and "
        "recomputes one layer: O(L) with a small factor, beside the logits.",
        f"{DENSE} {TRAIN}",
        f"{DENSE} {TRAIN} {CKPT}",
        "meta-llama/Llama-3.1-70B --mode train --ctx 2048",
        f"meta-llama/Llama-3.1-70B --mode train --ctx 2048 {CKPT}",
    ),
    (
        "… for 20–30 % more time",
        "not checked",
        "hfvram knows nothing of time. One more forward pass in three is 33 % more arithmetic.",
    ),
    (
        "ZeRO: stage 1 saves 4×, stage 2 8×, stage 3 16× and more; 7B on 4 GPUs",
        sharded,
        "4× and 8× are the limits for many GPUs (16P to 4P and 2P, Rajbhandari et al. 2020); stage 3 saves as many "
        "times as there are GPUs. DeepSpeed's buckets come on top.",
        f"{DENSE} {TRAIN} --dtype fp32 --mixed-precision bf16",
        f"{FOUR} --zero 1",
        f"{FOUR} --zero 2",
        f"{FOUR} --zero 3",
    ),
    (
        "7B on 4 GPUs with ZeRO-3: 6 GB a GPU",
        lambda e, c: f"{gb(e.device_bytes)} a GPU, {gb(c.device_bytes)} with checkpointing",
        "16P / 4 are 27 GB of states before the first activation, and what is gathered and reduced stands beside them.",
        f"{FOUR} --zero 3",
        f"{FOUR} --zero 3 {CKPT}",
    ),
    (
        "… what does reach 6 GB",
        lambda a, b: (
            f"{gb(a.device_bytes)} with states, parameters and checkpoints in CPU memory ({gb(a.cpu_bytes)} a GPU "
            f"there); {gb(b.device_bytes)} on 32 GPUs"
        ),
        "Offloading moves 16P / n to CPU memory. More GPUs shrink the states alone: one layer gathered, buffers and "
        "logits stay.",
        f"{FOUR} --zero 3 {CKPT} --offload optimizer,params,activations",
        f"{DENSE} {TRAIN} --gpus 32 --mixed-precision bf16 --zero 3 {CKPT}",
    ),
    (
        "fp32 4, fp16 and bf16 2, int8 1, int4 0.5 bytes a parameter",
        lambda *found: ", ".join(f"{e.weights_bytes / e.model.parameters:.3f}" for e in found),
        "Embeddings and head stay in 16 bits, and 8 and 4 bits need scales: nf4 has 4.127 bits a weight with double "
        "quantization.",
        f"{DENSE} --dtype fp32",
        f"{DENSE}",
        f"{DENSE} --quant int8",
        f"{DENSE} --quant nf4",
    ),
    (
        "int4 is for edge inference",
        lambda e: f"QLoRA trains 7B in {gb(e.device_bytes)}",
        "4-bit bases are trained upon every day.",
        f"{DENSE} --mode qlora --ctx 2048 {CKPT}",
    ),
]

CASES: list[Row] = [
    ("Dense: training 42 GB", on_a_gpu, "8P, and activations.", f"{DENSE} {TRAIN}"),
    ("Dense: inference 16 GB", on_a_gpu, "Right.", f"{DENSE} --ctx 2048"),
    (
        "Dense: +150 % for training at 8K",
        grows,
        "States do not grow with tokens; of what does, SDPA keeps less. With checkpointing next to nothing is added.",
        f"{DENSE} {TRAIN}",
        f"{DENSE} --mode train --ctx 8192",
    ),
    ("MoE: training 120 GB", on_a_gpu, "8P_total of 13B parameters.", f"{MOE} {TRAIN}"),
    (
        "MoE: inference 22 GB, experts offloaded",
        lambda off, on: f"{gb(off.device_bytes)}; all on the GPU {gb(on.device_bytes)}",
        "Nearly the whole model fits in that. Offloaded, the dense part and one layer's experts remain.",
        f"{MOE} --ctx 2048 --offload experts",
        f"{MOE} --ctx 2048",
    ),
    (
        "MoE: +80 % at 8K",
        grows,
        "The narrow model's activations are a small part of the whole.",
        f"{MOE} {TRAIN}",
        f"{MOE} --mode train --ctx 8192",
    ),
    ("Mamba: training 38 GB", on_a_gpu, "8P again.", f"{MAMBA} {TRAIN}"),
    ("Mamba: inference 15 GB", on_a_gpu, "Right.", f"{MAMBA} --ctx 2048"),
    (
        "Mamba: +40 % at 8K",
        grows,
        "Linear, as the Transformer with SDPA.",
        f"{MAMBA} {TRAIN}",
        f"{MAMBA} --mode train --ctx 8192",
    ),
]

ADVICE: list[Row] = [
    (
        "Start from 20P (fp32) or 6P (mixed), 30 % more for activations",
        lambda e: f"7B, 6P and 30 %: {gb(1.3 * 6 * e.model.parameters)}; true {gb(e.device_bytes)}",
        "**Does not hold.** Short by states that it forgets; and a share of the parameters can't know the tokens.",
        f"{DENSE} {TRAIN} --dtype fp32 --mixed-precision bf16",
    ),
    (
        "Above 4K tokens: Mamba",
        lambda m, t: f"inference at 32,768 tokens {gb(m.device_bytes)}, the Transformer {gb(t.device_bytes)}",
        "**Holds for inference** at long context, more so in batches; not for training, where both are linear. "
        "Grouped heads narrow it.",
        f"{MAMBA} --ctx 32768",
        f"{DENSE} --ctx 32768",
    ),
    (
        "Fine-tuning: LoRA with gradient checkpointing first",
        lambda a, b, c: f"{gb(a.device_bytes)} in full, {gb(b.device_bytes)} LoRA, {gb(c.device_bytes)} LoRA with both",
        "**Holds.** Neither is enough alone: LoRA cuts the states, checkpointing the activations. `fit.ways` proposes "
        "both, and QLoRA.",
        f"{DENSE} {TRAIN}",
        f"{DENSE} --mode lora --ctx 2048",
        f"{DENSE} --mode lora --ctx 2048 {CKPT}",
    ),
    (
        "Several GPUs: always ZeRO-2 or 3",
        lambda full, lora0, lora3: (
            f"full training {gb(full.device_bytes)} a GPU at stage 3; LoRA {gb(lora0.device_bytes)} at stage 0, "
            f"{gb(lora3.device_bytes)} at 3"
        ),
        "**Holds where states are what fills the GPU.** LoRA has few to shard: there only stage 3, which shards the "
        "base model, saves much, and nothing is saved where the model fits anyway.",
        f"{FOUR} --zero 3 {CKPT}",
        f"{DENSE} --mode lora --ctx 2048 {CKPT} --gpus 4 --zero 0",
        f"{DENSE} --mode lora --ctx 2048 {CKPT} --gpus 4 --zero 3",
    ),
    (
        "Short texts: a Transformer with a quantized KV cache",
        lambda e: f"the cache of 2,048 tokens is {100 * e.cache_bytes / e.device_bytes:.0f} % of the GPU's memory",
        "**Does not hold for single short texts**: quantizing a cache that small saves little. It pays at long context "
        "and in large batches.",
        f"{DENSE} --ctx 2048",
    ),
    (
        "Long documents: Mamba, or FlashAttention-2",
        lambda fast, eager: (
            f"8,192 tokens: {gb(fast.device_bytes)} with SDPA, {gb(eager.device_bytes)} with eager attention"
        ),
        "**Holds**, and SDPA, transformers' default, has such kernels already.",
        f"{DENSE} --ctx 8192",
        f"{DENSE} --ctx 8192 --attention eager",
    ),
    (
        "Very large: MoE with experts offloaded, and PagedAttention",
        lambda off, on: f"Mixtral-8x7B {gb(off.device_bytes)} on the GPU in place of {gb(on.device_bytes)}",
        "**Holds for memory**; every token then waits for the experts that it needs. Paging saves cache that was set "
        "aside and never used, which transformers' dynamic cache does not do.",
        "mistralai/Mixtral-8x7B-v0.1 --ctx 2048 --offload experts",
        "mistralai/Mixtral-8x7B-v0.1 --ctx 2048",
    ),
    (
        "eMoE brings MoE inference to 1.2–1.5 times the dense model",
        lambda off, dense: (
            f"experts all in CPU memory: {ratio(off.device_bytes, dense.device_bytes)} a dense model of the active size"
        ),
        "What stays on the GPU is a choice (and so is the time); the paper's ratio is of its own models and traces.",
        f"{MOE} --ctx 2048 --offload experts",
        f"{SMALL} --ctx 2048",
    ),
    (
        "Monitoring: `torch.cuda.memory_summary()`, `deepspeed.runtime.zero.profiling`, Nsight Systems",
        "the second does not exist",
        "DeepSpeed 0.19 has no such module. It has `deepspeed.runtime.utils.see_memory_usage`, `memory_breakdown` in "
        "its configuration, and the estimators of `deepspeed.runtime.zero.stage3`. "
        "`torch.cuda.memory._record_memory_history()` and PyTorch's viewer show every block and its stack, which "
        "Nsight Systems does not.",
    ),
]

SECTIONS: list[tuple[str, str, list[Row]]] = [
    ("1. What memory is made of", "", SHARES),
    ("2. Transformers", "", TRANSFORMER),
    ("3. Mixtures of experts", "", EXPERTS),
    ("4. Mamba", "", STATE_SPACE),
    ("5. Techniques", "", TECHNIQUES),
    ("6. Cases: 7B, 2,048 tokens, batch 1", "", CASES),
    ("7. Advice", "Each rule tried: whether it holds, and where.", ADVICE),
]
