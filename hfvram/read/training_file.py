"""`--from`: what kind of file it is, what it asks for in hfvram's options, and several files as one request.

Command line > training file > accelerate > DeepSpeed > what the trainer does where nobody says anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from hfvram.errors import HfvramError, printable
from hfvram.read import accelerate_file, axolotl, deepspeed_file, llama_factory, training_arguments
from hfvram.read.training_keys import Keys
from hfvram.read.yaml_file import load

KINDS: Final[dict[str, ModuleType]] = {
    "Axolotl": axolotl,
    "LLaMA-Factory": llama_factory,
    "TrainingArguments or TRL": training_arguments,
    "accelerate": accelerate_file,
    "DeepSpeed": deepspeed_file,
}
DECISIVE: Final = {
    "accelerate": ("distributed_type", "compute_environment"),
    "Axolotl": ("base_model", "sequence_len"),
    "LLaMA-Factory": ("finetuning_type", "cutoff_len"),
    "DeepSpeed": ("zero_optimization", "train_micro_batch_size_per_gpu", "train_batch_size"),
}
"""Keys that no other kind has."""
FOREIGN: Final = ("model_class", "dist_config", "export_dir")
"""Keys of LLaMA-Factory's files that are not read here: its second trainer's, and exports."""
LAST: Final = ("accelerate", "DeepSpeed")
"""Files of how it is run: they give way to those of what is trained."""
KEPT: Final = ("ctx", "dtype", "quant", "double_quant", "attention", "tp")
"""Options that mean something without training."""
FOR_LORA: Final = ("rslora", "dora", "modules_to_save")
FOR_QUANTIZED: Final = ("quant", "double_quant")


@dataclass(frozen=True, slots=True)
class Training:
    """What files ask for together; `notes` say what was understood, what wasn't, and what contradicts what."""

    model: str | None
    revision: str | None
    options: Mapping[str, Any]
    notes: tuple[str, ...]


def read(paths: Sequence[str], given: Mapping[str, Any]) -> Training:
    """Files as one request, to which the options `given` are added by the caller, and win.

    Raises `io` for a file that can't be read, `usage` for one of no known kind or with values of the wrong type.
    """
    files = [one(path) for path in paths]
    there = {kind for kind, _ in files}
    for path, (_, keys) in zip(tuple(paths), tuple(files), strict=True):
        if keys.deepspeed and "DeepSpeed" not in there:
            files += _nested(path, keys, given)
    files.sort(key=lambda file: LAST.index(file[0]) + 1 if file[0] in LAST else 0)
    options: dict[str, Any] = {}
    notes: list[str] = []
    for kind, keys in files:
        notes += _clashes(keys, kind, options, given)
        moved = (*options.get("offload", ()), *keys.options.get("offload", ()))
        own = dict(keys.options)
        if kind == "DeepSpeed" and "optimizer" in own:
            options.pop("optimizer", None)  # transformers takes the one that the file makes
        options = {**own, **options}
        if moved:
            options["offload"] = tuple(dict.fromkeys(moved))
    if not {kind for kind, _ in files} - set(LAST):
        options.setdefault("mode", "train")
    implied = {k: v for _, keys in reversed(files) for k, v in keys.implied.items() if k not in options}
    _batches(files, options, implied, given, notes)
    said = {**implied, **options}
    if said.get("fsdp") and said.get("mode") == "train" and said.get("mixed_precision", "no") != "no":
        said["dtype"] = "fp32"  # accelerate casts what is trained (utils/fsdp_utils.py, fsdp2_prepare_model)
    said, dropped = _without(said, given)
    told = [f"{keys.file} is read as {kind}: {_in_words(keys, said, given)}" for kind, keys in files]
    told += [note for _, keys in files for note in keys.notes]
    told += [f"not understood of {k.file}: {_list(k.unknown)}" for _, k in files if k.unknown]
    told += [f"understood of {k.file}, but not counted: {_list(k.uncounted)}" for _, k in files if k.uncounted]
    told += notes + dropped
    if (said.get("fsdp") or said.get("zero")) and not {"gpus", "tp"} & {*said, *given}:
        told.append("no file says how many GPUs share this: --gpus does")
    models = [(keys.file, keys.model, keys.revision) for _, keys in files if keys.model]
    if len({m for _, m, _ in models}) > 1:
        told.append(f"contradiction: {' but '.join(f'{f} trains {printable(m or str(), 60)}' for f, m, _ in models)}")
    _, model, revision = models[0] if models else (None, None, None)
    return Training(model, revision, {k: v for k, v in said.items() if k not in given}, tuple(told))


def one(path: str) -> tuple[str, Keys]:
    """A file's kind, and its keys as they were read."""
    values = load(path)
    shown = printable(Path(path).name, 60)
    kind = kind_of(values)
    if kind is None:
        kinds = ", ".join(KINDS)
        raise HfvramError("usage", f"--from {shown}: none of the kinds that are understood, which are {kinds}")
    keys = Keys(shown, values)
    KINDS[kind].read(keys)
    return kind, keys


def kind_of(values: Mapping[str, Any]) -> str | None:
    """The kind whose own keys a file has most of; None where it has none of any.

    >>> kind_of({"base_model": "a/b", "micro_batch_size": 1, "gradient_checkpointing": True})
    'Axolotl'
    >>> kind_of({"name": "x"}) is None
    True
    """
    if any(key in values for key in FOREIGN):
        return None
    for kind, keys in DECISIVE.items():
        if any(key in values for key in keys):
            return kind
    counts = {kind: sum(m in values for m in module.MARKERS) for kind, module in KINDS.items()}
    best = max(counts, key=lambda kind: counts[kind])
    return best if counts[best] else None


def _nested(path: str, keys: Keys, given: Mapping[str, Any]) -> list[tuple[str, Keys]]:
    """The DeepSpeed file that a file names: beside it, or from where the command runs, as the trainers find it."""
    name = keys.deepspeed or ""
    if "://" in name:
        raise HfvramError("usage", f"{keys.file}: deepspeed {printable(name, 80)} is no local file")
    places = [Path(path).parent / name, Path(name)]
    found = next((p for p in places if p.is_file()), None)
    if found is None:
        if {"zero", "fsdp"} & set(given):
            keys.notes.append(f"{keys.file} names the DeepSpeed file {printable(name, 80)}, which is not there")
            return []
        message = f"{keys.file} names the DeepSpeed file {printable(name, 80)}, which is not there: --zero, or --from"
        raise HfvramError("io", message)
    kind, inner = one(str(found))
    if kind != "DeepSpeed":
        raise HfvramError("usage", f"{keys.file}: deepspeed {printable(name, 80)} is no DeepSpeed file but {kind}")
    return [(kind, inner)]


def _clashes(keys: Keys, kind: str, options: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """What a file says otherwise than those before it."""
    said = []
    for name, value in keys.options.items():
        if name in options and name not in ("offload", *given) and options[name] != value:
            ours, theirs = (_value(v) for v in (options[name], value))
            wins = theirs if kind == "DeepSpeed" and name == "optimizer" else ours
            words = name.replace("_", " ")
            said.append(f"contradiction: {keys.file} has {words} {theirs}, but another file {ours}; {wins} is taken")
    if options.get("fsdp") and keys.options.get("zero"):
        said.append(f"contradiction: {keys.file} has ZeRO {keys.options['zero']}, but another file FSDP")
    return said


def _batches(
    files: Sequence[tuple[str, Keys]],
    options: dict[str, Any],
    implied: Mapping[str, Any],
    given: Mapping[str, Any],
    notes: list[str],
) -> None:
    """DeepSpeed's `train_batch_size` is micro-batch × accumulation × GPUs: what is missing of it follows."""
    total, file = next(((k.total_batch, k.file) for _, k in files if k.total_batch), (None, ""))
    if total is None:
        return
    counts = {n: given.get(n, options.get(n)) for n in ("batch", "grad_accum", "gpus")}
    try:
        sizes = {n: None if v is None else int(v) for n, v in counts.items()}
    except (TypeError, ValueError):
        return  # a grid, or text such as 8k: nothing to hold it against
    gpus = sizes["gpus"]
    if gpus is None:
        notes.append(f"{file}: train_batch_size {total} is over all GPUs, and no file says how many")
        return
    batch, accum = sizes["batch"], sizes["grad_accum"]
    if batch is None and total % (gpus * (accum or 1)) == 0:
        options["batch"] = total // (gpus * (accum or 1))
    elif batch is not None and accum is None and total % (gpus * batch) == 0:
        options["grad_accum"] = total // (gpus * batch)
    elif (product := (batch or int(implied.get("batch", 1))) * (accum or 1) * gpus) != total:
        notes.append(f"contradiction: {file} has train_batch_size {total}, batch × accumulation × GPUs is {product}")


def _without(said: dict[str, Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The options without those that the command line's own leave no place for, and what is told of it."""
    mode = given.get("mode", said.get("mode"))
    drop: set[str] = set()
    if mode == "inference":
        drop = {k for k in said if k not in KEPT}
    elif mode == "train":
        drop = {k for k in said if k in (*FOR_LORA, *FOR_QUANTIZED) or k.startswith(("lora_", "adapter_"))}
    elif mode == "lora" and said.get("mode") == "qlora" and "mode" in given:
        drop = set(FOR_QUANTIZED)
    if given.get("zero") is not None and said.get("fsdp"):
        drop |= {"fsdp"}
    if str(given.get("zero")) == "0":
        drop |= {"zero_bucket"}
    if given.get("fsdp") and said.get("zero"):
        drop |= {"zero", "zero_bucket"}
        said = said | {"offload": tuple(o for o in said.get("offload", ()) if o in ("params", "activations"))}
    words = sorted(k.replace("_", " ") for k in drop - {"mode"} - set(given))
    kept = {k: v for k, v in said.items() if k not in drop}
    return kept, [f"the command line leaves no use for what the files say of {', '.join(words)}"] if words else []


def _in_words(keys: Keys, said: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """What of a file holds, and what the command line says in its place."""
    own = {k: v for k, v in {**keys.implied, **keys.options}.items() if k in said}
    told = [f"model {printable(keys.model, 80)}"] if keys.model else []
    told += [f"{k.replace('_', ' ')} {_value(said[k])}" for k in own if k not in given and said[k] not in (False, ())]
    won = [k.replace("_", " ") for k in own if k in given]
    return (", ".join(told) or "nothing that matters here") + (
        f"; the command line says {', '.join(won)}" if won else ""
    )


def _value(value: object) -> str:
    words = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return printable(words, 80)


def _list(names: Sequence[str]) -> str:
    return printable(", ".join(dict.fromkeys(names)), 400)
