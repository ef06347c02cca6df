"""`Checkpoint` → `Model`: the architecture, and how many parameters it has by which source."""

from dataclasses import dataclass, replace

from hfvram.errors import HfvramError, printable
from hfvram.model.adapter import with_adapter
from hfvram.model.architecture import Architecture, Counted
from hfvram.model.bound import STORED_DTYPES, weights_only
from hfvram.model.infer import infer
from hfvram.model.stored import count
from hfvram.read.checkpoint import Checkpoint
from hfvram.read.headers import BITS


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """What a checkpoint is made of, with the facts that an answer names."""

    checkpoint: Checkpoint
    architecture: Architecture
    parameters: int
    parameters_from: Counted
    warnings: tuple[str, ...]
    components: tuple[tuple[str, "Model"], ...] = ()
    """The parts of a pipeline; the first stands for it in the fields above."""
    draft: "Model | None" = None
    """What speculates for it in a serving engine."""


def needs_headers(checkpoint: Checkpoint, architecture: Architecture) -> bool:
    """Whether the Hub's own count of stored elements leaves open what the headers would tell."""
    if checkpoint.tensors is not None or checkpoint.source == "catalogue" or not checkpoint.parameters_by_dtype:
        return False
    return sum(checkpoint.parameters_by_dtype.values()) != architecture.parameters


def identify_components(checkpoint: Checkpoint) -> Model:
    """The models of a pipeline's components. One whose code is not known counts with its weights, by the headers."""
    found, left_out = [], []
    for name, part in checkpoint.components.items():
        try:
            found.append((name, identify(part, _component(part))))
        except HfvramError as error:
            if error.kind != "unknown_architecture":
                raise
            left_out.append((f"{name} is left out: {error.message}", error))
    if not found:
        raise left_out[0][1]
    warnings = dict.fromkeys(
        [*checkpoint.warnings, *(w for _, m in found for w in m.warnings), *(w for w, _ in left_out)]
    )
    first = found[0][1]
    return replace(first, checkpoint=checkpoint, warnings=tuple(warnings), components=tuple(found))


def _component(part: Checkpoint) -> Architecture:
    try:
        return infer(part.config, generation=part.generation_config)
    except HfvramError as error:
        if error.kind != "unknown_architecture":
            raise
        return weights_only(part, error)


def identify(checkpoint: Checkpoint, architecture: Architecture | None = None) -> Model:
    """The model of a checkpoint.

    The headers' count leads where there is one; a closed form that disagrees is a warning. Raises `bad_config` and
    `unknown_architecture`.
    """
    architecture = architecture or infer(checkpoint.config, generation=checkpoint.generation_config)
    warnings = [*checkpoint.warnings, *architecture.warnings]
    source: Counted = "closed form" if architecture.closed_form else "meta device"
    parameters = architecture.parameters
    by_dtype = checkpoint.parameters_by_dtype
    if checkpoint.tensors is not None:
        stored = count(checkpoint.tensors, architecture)
        source = "headers"
        strange = sorted({t.dtype for t in checkpoint.tensors if t.dtype not in BITS})
        if strange:
            words = ", ".join(printable(d, 40) for d in strange[:4])
            warnings.append(f"the files have dtypes that are not known here ({words}): their bytes count as stored")
            if not architecture.quantization:
                architecture = replace(architecture, quantization=strange[0].lower())
        if architecture.quantization:
            architecture = replace(architecture, stored_sizes=stored.sizes)
        if stored.beyond:
            warnings.append(
                f"{stored.beyond:,} stored parameters are of layers that the model does not build (left out)"
            )
        if not stored.told:
            source = "closed form" if architecture.closed_form else "meta device"
            warnings.append("the words of the files do not tell how many parameters they are: the configuration does")
        elif stored.parameters != parameters:
            warnings.append(
                f"the headers hold {stored.parameters:,} parameters, {architecture.class_name} of this configuration "
                f"has {parameters:,}: the memory is that of the model as it is built"
            )
            parameters = stored.parameters
    elif by_dtype and sum(by_dtype.values()) == parameters:
        source = "catalogue" if checkpoint.source == "catalogue" else "headers"
    elif by_dtype and checkpoint.source == "catalogue":
        raise HfvramError("bad_config", f"the catalogue's count of {checkpoint.id} is not that of its configuration")
    architecture = _stored_dtype(checkpoint, architecture)
    if checkpoint.adapter:
        architecture = with_adapter(architecture, checkpoint.adapter)
        parameters += sum(p.numel for p in architecture.adapter)
    return Model(checkpoint, architecture, parameters, source, tuple(warnings))


def _stored_dtype(checkpoint: Checkpoint, architecture: Architecture) -> Architecture:
    """The dtype where the configuration names none: of most stored elements, or what a quantized model computes in.

    Source: transformers 5.17, modeling_utils.py (`dtype="auto"`) and quantizers/*.py `update_dtype`.
    """
    if any(checkpoint.config.get(k) for k in ("dtype", "torch_dtype", "text_config")):
        return architecture
    if method := architecture.quantization:
        return replace(architecture, dtype="fp16" if method.startswith(("gptq", "awq", "int8")) else "bf16")
    counts = dict(checkpoint.parameters_by_dtype or {})
    for tensor in checkpoint.tensors or ():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.nbytes
    stored = STORED_DTYPES.get(max(counts, key=counts.__getitem__)) if counts else None
    return replace(architecture, dtype=stored) if stored and stored != architecture.dtype else architecture
