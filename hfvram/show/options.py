"""The command line's options: every one of the request's, in groups, under its own name."""

from dataclasses import dataclass
from typing import Any

import click

from hfvram.request import CHOICES, GGUF_CACHES, GGUF_QUANTS

GRID = ("ctx", "batch", "quant", "gpus", "gpu", "kv_dtype")
"""Options that take a comma list: each value is a request of its own."""

LATER: tuple[str, ...] = ()
"""Options that a later version answers; until then they are refused, never ignored."""


@dataclass(frozen=True, slots=True)
class Group:
    """Options under one heading of `--help`: flags, what stands for the value ("" for a switch), one line of help."""

    title: str
    options: tuple[tuple[str, str, str], ...]


GROUPS = (
    Group("The model", (
        ("--revision", "REV", "branch, tag or commit"),
        ("--file", "NAME", "one file of the repo, or a quantization such as Q4_K_M"),
        ("--token", "TOKEN", "Hub token, in place of HF_TOKEN"),
        ("--offline", "", "the cache and the built-in catalogue only"),
        ("--allow-unknown", "", "unknown layer kinds: a bound and a warning in place of an error"),
        ("--trust-remote-code", "", "run the repo's own code to build the model"),
    )),
    Group("The request (a comma list at those marked * makes a table)", (
        ("--mode", "", "what for"),
        ("--ctx", "N", "* tokens a sequence, prompt plus generated: 8192, 8k (4096, or the model's limit)"),
        ("--batch", "N", "* sequences (1)"),
        ("--new-tokens", "N", "generated part of ctx (8)"),
        ("--phase", "", "what runs"),
        ("--padding/--no-padding", "", "the batch carries a padding mask"),
        ("--dtype", "", "dtype the weights are loaded in"),
        ("--quant", "", "* quantization, auto for the checkpoint's own; llama.cpp's are Q4_K_M, Q8_0, F16…"),
        ("--double-quant/--no-double-quant", "", "nf4 and fp4 quantize their scales, too (on)"),
        ("--kv-dtype", "", "* dtype of the cache; llama.cpp's are f16, q8_0, q4_0…"),
        ("--cache", "", "transformers' kind of cache"),
        ("--attention", "", "attention implementation"),
        ("--kernels", "", "kernels of Mamba and linear attention: installed or not"),
        ("--expandable-segments", "", "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"),
        ("--compute-capability", "X.Y", "the GPU's generation (that of --gpu, else 9.0, which was measured)"),
    )),
    Group("Training", (
        ("--optimizer", "NAME", "transformers' name (adamw_torch_fused)"),
        ("--mixed-precision", "", "autocast"),
        ("--gradient-checkpointing", "", "recompute activations"),
        ("--checkpoint-every", "N", "recompute one layer of N, as every_n_layers of Trainer (1: all)"),
        ("--grad-accum", "N", "steps of gradient accumulation (1)"),
        ("--lora-r", "N", "rank (16)"),
        ("--lora-targets", "NAMES", "modules (all-linear); default: what PEFT takes for the model type"),
        ("--lora-dropout", "P", "dropout (0)"),
        ("--adapter-dtype", "", "dtype of the adapter"),
        ("--rslora", "", "rank-stabilized LoRA"),
        ("--dora", "", "LoRA with magnitudes"),
        ("--modules-to-save", "NAMES", "modules trained whole beside adapters: copies, the originals stay"),
        ("--freeze", "NAMES", "what --mode train leaves as it is: modules, parameters or a regular expression"),
    )),
    Group("Several GPUs, offloading", (
        ("--gpus", "N", "* GPUs (the product of the next five)"),
        ("--tp", "N", "tensor parallel (1)"),
        ("--pp", "N", "pipeline parallel (1)"),
        ("--pp-schedule", "", "of a pipeline's microbatches, of which --grad-accum says how many"),
        ("--pp-chunks", "N", "parts of a rank's layers, which a microbatch comes by one after the other (1)"),
        ("--ep", "N", "expert parallel (1)"),
        ("--cp", "N", "context parallel (1)"),
        ("--sp", "", "Megatron's sequence parallelism"),
        ("--zero", "STAGE", "DeepSpeed ZeRO: 0, 1, 2, 3"),
        ("--zero-bucket", "N", "its reduce bucket in elements (5e8), or auto: as transformers makes it"),
        ("--fsdp", "", "FSDP"),
        ("--offload", "WHAT", "to CPU memory: optimizer, params, activations, experts, layers (or optimizer=nvme)"),
        ("--cpu-memory", "SIZE", "free for a model that is placed over --gpus of size --gpu; the rest goes to disk"),
        ("--resident-experts", "N", "of each layer, on the GPU with --offload experts (0)"),
    )),
    Group("Engines", (
        ("--engine", "", "what runs it"),
        ("--gpu-memory-utilization", "F", "vLLM: share of the GPU that it plans with (0.9)"),
        ("--max-num-seqs", "N", "vLLM: sequences at once (256, 1024 on large GPUs); SGLang: --max-running-requests"),
        ("--max-num-batched-tokens", "N", "vLLM: tokens a step (2048, 8192); SGLang: --chunked-prefill-size"),
        ("--enforce-eager", "", "no CUDA graphs"),
        ("--mem-fraction-static", "F", "SGLang: share of the GPU for weights and cache (by the GPU's size)"),
        ("--n-gpu-layers", "N", "llama.cpp: layers on the GPU, the output layer as one (all)"),
        ("--n-cpu-moe", "N", "llama.cpp: of the first N layers the experts stay in CPU memory"),
        ("--override-tensor", "SPEC", "llama.cpp: REGEX=CPU, tensors that stay in CPU memory; several with commas"),
        ("--swa-full", "", "llama.cpp: caches of layers with a window as long as the others"),
        ("--mmproj", "", "llama.cpp: the repo's projector of images or sound on the GPU, too"),
        ("--engine-args", "LINE", "the line that starts the engine: \"vllm serve …\"; other options win over it"),
        ("--requests", "LIST", "concurrent requests, count × tokens: 512x2048,16x32768"),
        ("--draft", "MODEL", "vLLM, SGLang: the model that speculates, or mtp: the model's own heads for it"),
        ("--from", "FILE", "TrainingArguments, TRL, Axolotl, LLaMA-Factory, accelerate or DeepSpeed; several times"),
    )),
    Group("The verdict", (
        ("--gpu", "GPU", "* does it fit: a name, 24GB, 24GiB or local (`hfvram gpus` lists names)"),
        ("--max-ctx", "", "the largest context that fits --gpu is the question"),
        ("--max-batch", "", "the largest batch that fits --gpu is the question"),
        ("--recommend", "", "the smallest GPUs that run it"),
        ("--method", "", "how it is worked out"),
    )),
    Group("Output", (
        ("--json", "", "one object, a list for several answers; sizes in bytes"),
        ("--markdown", "", "markdown"),
        ("--csv", "", "one row an answer; sizes in bytes"),
        ("--explain", "", "each item's formula with its numbers, source and certainty"),
        ("--plot", "FILE", "a picture as well (.png, .svg, .html): parts, memory over the context, a training step"),
        ("-q/--quiet", "", "no notices"),
    )),
)  # fmt: skip


class GroupedCommand(click.Command):
    """A command whose help shows GROUPS."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records = {p.name: p.get_help_record(ctx) for p in self.params}
        for group in GROUPS:
            with formatter.section(group.title):
                shown = (records[_name(flags)] for flags, _, _ in group.options)
                formatter.write_dl([r for r in shown if r], col_max=26)
        with formatter.section("Also"):
            formatter.write_dl(
                [
                    ("hfvram batch FILE", "a JSON request a line, an answer a line"),
                    ("hfvram card MODEL", "the section on memory for a model card: printed, kept in a file, proposed"),
                    ("hfvram gpus [TEXT]", "the GPUs known by name"),
                    ("hfvram measure", "predicted against measured, on the local GPU or by --read-log FILE"),
                    ("hfvram web", "the same as a page"),
                    ("--version, --help", ""),
                ]
            )


def options() -> list[click.Parameter]:
    """All of them as click parameters: values stay text, and are read by `Request.from_dict` and nobody else."""
    made: list[click.Parameter] = []
    for group in GROUPS:
        for flags, metavar, text in group.options:
            name = _name(flags)
            choices = tuple(c for c in CHOICES.get(name, ()) if c not in (*GGUF_QUANTS, *GGUF_CACHES))
            kind: dict[str, Any] = {"metavar": metavar or "NAME"} if metavar or choices else {"is_flag": True}
            text = f"{text}: {', '.join(choices)}" if choices else f"{text} (not yet)" if name in LATER else text
            kind |= {"multiple": True} if name == "from" else {}
            declared = ["-q", "--quiet"] if name == "quiet" else [flags]
            made.append(click.Option([*declared, name], help=text, default=None, **kind))
    return made


def _name(flags: str) -> str:
    """`--padding/--no-padding` is `padding`; `-q/--quiet` is `quiet`."""
    first, _, second = flags.partition("/")
    return (first if first.startswith("--") else second).lstrip("-").replace("-", "_")
