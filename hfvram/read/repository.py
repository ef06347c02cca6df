"""From a folder of files, wherever it lies, to a `Checkpoint`: one model, or a pipeline of several."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from hfvram.errors import HfvramError, printable
from hfvram.read.checkpoint import Adapter, Checkpoint, StoredTensor
from hfvram.read.configuration import parse_json, parse_object
from hfvram.read.folder import Contents, Folder
from hfvram.read.gguf_files import models, only_gguf
from hfvram.read.gguf_model import read_model
from hfvram.read.headers import BITS
from hfvram.read.weights import Weights, find_weights, shards_of_index

MANY_SHARDS: Final = 8
"""Above this the Hub's own count stands in for the headers, where it gives one."""

_CONFIG = "config.json"
_GENERATION = "generation_config.json"
_MODELOPT = "hf_quant_config.json"
_DIFFUSERS = "model_index.json"
_SENTENCE = "modules.json"
_ADAPTER = "adapter_config.json"


def read_folder(folder: Folder, file: str | None = None) -> Checkpoint:
    """The model or pipeline that a folder holds; `file` picks the weights by name.

    Where all weights are GGUF files, or `file` picks one, that is the model. Raises `no_config`, `bad_config`,
    `bad_header`, `missing_extra`, `io` or what the Hub raises; `usage` for a `file` that isn't there.
    """
    asked = file is not None and not file.endswith(".safetensors")
    if (asked and models(folder.files)) or (file is None and only_gguf(folder.files)):
        return read_model(folder, file)
    if file is not None:
        return _models(folder, [""], weights={"": _picked(folder, file)})[""]
    if _DIFFUSERS in folder.files:
        parts = parse_object(folder.read([_DIFFUSERS], []).texts.get(_DIFFUSERS, b""), _DIFFUSERS)
        prefixes = {name: f"{name}/" for name, what in parts.items() if isinstance(what, list) and any(what)}
        return _pipeline(folder, parts, {n: p for n, p in prefixes.items() if p + _CONFIG in folder.files})
    if _SENTENCE in folder.files:
        modules = parse_json(folder.read([_SENTENCE], []).texts.get(_SENTENCE, b""), _SENTENCE)
        prefixes = _sentence_modules(modules, folder)
        if len(prefixes) > 1:
            return _pipeline(folder, {"modules": modules}, prefixes)
        if prefixes:
            return _models(folder, list(prefixes.values()))[next(iter(prefixes.values()))]
    return _models(folder, [""])[""]


def read_tensor_table(folder: Folder) -> tuple[StoredTensor, ...] | None:
    """The tensors of every shard, however many; None where the weights are not in safetensors files."""
    return _models(folder, [""], many=True)[""].tensors


def is_adapter(files: frozenset[str]) -> bool:
    """Whether a folder is a PEFT adapter and not a model that has one lying beside it."""
    model = find_weights(files) != Weights() or any(f.startswith("pytorch_model") for f in files)
    return _ADAPTER in files and not (_CONFIG in files and model)


def read_adapter(folder: Folder) -> Adapter:
    """The adapter that a folder holds. Raises as `read_folder` does."""
    contents = folder.read([_ADAPTER], ["adapter_model.safetensors"])
    config = parse_object(contents.texts.get(_ADAPTER, b""), f"{_ADAPTER} of {folder.id}")
    return Adapter(folder.id, config, contents.tensors.get("adapter_model.safetensors"))


def _pipeline(folder: Folder, config: Mapping[str, Any], prefixes: Mapping[str, str]) -> Checkpoint:
    if not prefixes:
        raise HfvramError("no_config", f"{folder.id} is a pipeline, and none of its components has a config.json")
    models = _models(folder, list(prefixes.values()))
    return Checkpoint(
        id=folder.id,
        source=folder.source,
        commit=folder.commit,
        config=config,
        components={name: models[prefix] for name, prefix in prefixes.items()},
        path=folder.path,
        warnings=tuple(dict.fromkeys(w for m in models.values() for w in m.warnings)),
    )


def _sentence_modules(modules: Any, folder: Folder) -> dict[str, str]:
    """Folders of the modules with weights: the transformer, and those with tensors (`Dense`), not `Pooling`."""
    found = {}
    for module in modules if isinstance(modules, list) else []:
        path = module.get("path") if isinstance(module, dict) else None
        if isinstance(path, str):
            prefix = path.strip("/") + "/" if path.strip("/") else ""
            weighs = prefix == "" or str(module.get("type", "")).endswith(".Transformer")
            if prefix + _CONFIG in folder.files and (weighs or find_weights(folder.files, prefix) != Weights()):
                found[path.strip("/") or "transformer"] = prefix
    return found


def _models(
    folder: Folder, prefixes: Sequence[str], *, weights: Mapping[str, Weights] | None = None, many: bool = False
) -> dict[str, Checkpoint]:
    """One checkpoint for each sub-folder. All their files are read in one round, or two where an index has a say."""
    weights = dict(weights or {p: find_weights(folder.files, p) for p in prefixes})
    warnings: dict[str, list[str]] = {p: [] for p in prefixes}
    for prefix in prefixes:
        if prefix + _CONFIG not in folder.files:
            raise _no_config(folder, prefix)
        if weights[prefix].choices:
            names = ", ".join(weights[prefix].choices[:4])
            warnings[prefix].append(f"several files could be the weights ({names}): none was read; --file picks one")
    texts = [p + name for p in prefixes for name in (_CONFIG, _GENERATION, _MODELOPT)]
    indexes = {p: w.index for p, w in weights.items() if w.index}
    counted = {p for p in prefixes if p == "" and folder.parameters and not many}

    def headers(of: Sequence[str]) -> list[str]:
        return [s for p in of if p not in counted or len(weights[p].shards) <= MANY_SHARDS for s in weights[p].shards]

    contents = folder.read([*texts, *indexes.values()], headers(prefixes))
    if indexes:
        for prefix, path in indexes.items():
            index = parse_object(contents.texts.get(path, b""), f"{path} of {folder.id}")
            shards, missing = shards_of_index(index, path, folder.files)
            weights[prefix] = Weights(() if missing else shards)
            if missing:
                warnings[prefix].append(f"{path} names {missing} files that are not there: no header was read")
        more = folder.read([], headers(list(indexes)))
        contents = Contents(contents.texts, {**contents.tensors, **more.tensors})
    return {p: _model(folder, p, weights[p], contents, warnings[p]) for p in prefixes}


def _model(folder: Folder, prefix: str, weights: Weights, contents: Contents, warnings: list[str]) -> Checkpoint:
    config, generation, modelopt = (
        parse_object(contents.texts[path], f"{path} of {folder.id}") if path in contents.texts else None
        for path in (prefix + _CONFIG, prefix + _GENERATION, prefix + _MODELOPT)
    )
    if config is None:
        raise _no_config(folder, prefix)
    if modelopt and not config.get("quantization_config") and isinstance(modelopt.get("quantization"), dict):
        config["quantization_config"] = {"quant_method": "modelopt", **modelopt["quantization"]}
    tensors = None
    if weights.shards and all(s in contents.tensors for s in weights.shards):
        tensors = tuple(t for s in weights.shards for t in contents.tensors[s])
        if unknown := sorted({t.dtype for t in tensors} - BITS.keys()):
            warnings.append(f"stored with dtypes that are unknown here ({', '.join(unknown)}): counted by their bytes")
    return Checkpoint(
        id=folder.id,
        source=folder.source,
        config=config,
        commit=folder.commit,
        tensors=tensors,
        parameters_by_dtype=folder.parameters if prefix == "" else None,
        generation_config=generation,
        path=folder.path,
        warnings=tuple(warnings),
    )


def _picked(folder: Folder, file: str) -> Weights:
    if file not in folder.files or not file.endswith(".safetensors"):
        known = sorted(f for f in folder.files if f.endswith(".safetensors"))
        has = ", ".join(known[:8]) or "no safetensors file"
        raise HfvramError("usage", f"--file {printable(file, 80)}: {folder.id} has {has}")
    return Weights((file,))


def _no_config(folder: Folder, prefix: str) -> HfvramError:
    return HfvramError("no_config", f"{folder.id} has no {prefix}{_CONFIG}: there is nothing to read a model from")


def with_warnings(checkpoint: Checkpoint, *warnings: str) -> Checkpoint:
    """The same with notices put in front, each once."""
    return replace(checkpoint, warnings=tuple(dict.fromkeys((*warnings, *checkpoint.warnings))))
