"""`Checkpoint` → `Model`: the architecture, and how many parameters it has by which source."""

from dataclasses import dataclass, replace
from typing import Any

from hfvram.errors import HfvramError
from hfvram.model.architecture import Architecture, Counted
from hfvram.model.infer import infer
from hfvram.model.stored import count
from hfvram.read.checkpoint import Checkpoint

STORED_DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """What a checkpoint is made of, with the facts that an answer names."""

    checkpoint: Checkpoint
    architecture: Architecture
    parameters: int
    parameters_from: Counted
    stored_bytes: int | None
    """Bytes that the files hold of it, packed words and scales as they are; None where no header was read."""
    warnings: tuple[str, ...]


def needs_headers(checkpoint: Checkpoint, architecture: Architecture) -> bool:
    """Whether the Hub's own count of stored elements leaves open what the headers would tell."""
    if checkpoint.tensors is not None or checkpoint.source == "catalogue" or not checkpoint.parameters_by_dtype:
        return False
    return sum(checkpoint.parameters_by_dtype.values()) != architecture.parameters


def identify(checkpoint: Checkpoint, architecture: Architecture | None = None) -> Model:
    """The model of a checkpoint.

    The headers' count leads where there is one; a closed form that disagrees is a warning. Raises `bad_config` and
    `unknown_architecture`.
    """
    architecture = architecture or infer(checkpoint.config)
    if not generates_cache(checkpoint):
        architecture = replace(architecture, generates_cache=False)
    warnings = [*checkpoint.warnings, *architecture.warnings]
    source: Counted = "closed form"
    parameters, stored_bytes = architecture.parameters, None
    by_dtype = checkpoint.parameters_by_dtype
    if checkpoint.tensors is not None:
        stored = count(checkpoint.tensors, architecture)
        stored_bytes = stored.nbytes
        source = "headers"
        if stored.beyond:
            warnings.append(f"{stored.beyond:,} stored parameters are of layers that the model does not build (left out)")
        if stored.parameters != parameters:
            warnings.append(
                f"the headers hold {stored.parameters:,} parameters, {architecture.class_name} of this configuration has "
                f"{parameters:,}: the memory is that of the model as it is built"
            )
            parameters = stored.parameters
    elif by_dtype and sum(by_dtype.values()) == parameters:
        source = "catalogue" if checkpoint.source == "catalogue" else "headers"
    elif by_dtype and checkpoint.source == "catalogue":
        raise HfvramError("bad_config", f"the catalogue's count of {checkpoint.id} is not that of its configuration")
    return Model(checkpoint, _stored_dtype(checkpoint, architecture), parameters, source, stored_bytes, tuple(warnings))


def generates_cache(checkpoint: Checkpoint) -> bool:
    """Whether `generate()` keeps a cache: the generation configuration says so, or where there is none, the text model's.

    Source: transformers 5.17, GenerationConfig.from_model_config.
    """
    said: Any = checkpoint.generation_config
    if said is None:
        nested = checkpoint.config.get("text_config")
        said = nested if isinstance(nested, dict) and "use_cache" in nested else checkpoint.config
    return said.get("use_cache") is not False


def _stored_dtype(checkpoint: Checkpoint, architecture: Architecture) -> Architecture:
    """The dtype of most stored elements, where the configuration names none (`from_pretrained(dtype="auto")`)."""
    if any(checkpoint.config.get(k) for k in ("dtype", "torch_dtype", "text_config")) or architecture.quantization:
        return architecture
    counts = dict(checkpoint.parameters_by_dtype or {})
    for tensor in checkpoint.tensors or ():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.nbytes
    stored = STORED_DTYPES.get(max(counts, key=counts.__getitem__)) if counts else None
    return replace(architecture, dtype=stored) if stored and stored != architecture.dtype else architecture
