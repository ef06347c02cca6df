"""The model itself on torch's meta device: its own code runs, but no memory is taken and nothing is downloaded.

Needs torch and transformers (`pip install 'hfvram[exact]'`), which are imported only here and where they are used.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from hfvram.errors import HfvramError, printable
from hfvram.model.config import MAX_LAYERS, MAX_SIZE
from hfvram.model.layers import Param, ParamKind

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
NAMES = {f"torch.{name}": short for short, name in DTYPES.items()}
LEFT_OUT = ("quantization_config", "compression_config", "auto_map", "model_type")
COUNTS = ("layers", "layer", "depth", "experts", "blocks", "groups", "group_num")
SIZES = ("size", "dim", "positions", "embeddings", "heads", "width", "kernel")
TABLES = tuple(
    f"MODEL_FOR_{task}_MAPPING"
    for task in ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ")
)
MAX_ENTRIES = 1 << 16
MAX_NESTING = 16


def build(
    config_values: Mapping[str, Any],
    class_name: str | None,
    dtype: str,
    trust_remote_code: bool = False,
    path: str | None = None,
    attention: str | None = None,
    device: str = "meta",
) -> Any:
    """The model of a `config.json` on the meta device, in `dtype` (`bf16`, `fp16`, `fp32`), as a torch module.

    On another `device` it has random weights.

    The class is the one named, else the first of `architectures` that transformers exports, else what AutoModel takes.
    With `trust_remote_code` the code beside the configuration at `path` (a folder or an id) is run. Raises
    `missing_extra`, `unknown_architecture` where transformers has no such type or class, `bad_config` where it refuses
    the values.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        message = f"building a model needs {error.name}: pip install 'hfvram[exact]'"
        raise HfvramError("missing_extra", message) from error
    check(config_values)
    kind = printable(str(config_values.get("model_type") or ""), 60)
    remote = trust_remote_code and path is not None and bool(config_values.get("auto_map"))
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"), torch.device(device):
            if remote:
                return build_remote(str(path), getattr(torch, DTYPES[dtype]))
            config = configuration(config_values)
            model_class = class_of(config, class_name)
            wanted = model_class.config_class
            if not isinstance(config, wanted):  # a class for a part of a larger model, most often for its text
                parts = (getattr(config, name, None) for name in config.sub_configs)
                config = next((part for part in parts if isinstance(part, wanted)), config)
            if attention is not None:
                config._attn_implementation = attention
            return model_class._from_config(config, dtype=getattr(torch, DTYPES[dtype]))
    except HfvramError:
        raise
    except Exception as error:  # the values are anyone's, and so is what the model's code does with them
        reason = printable(" ".join(str(error).split()), 200)
        raise HfvramError("bad_config", f"transformers can't build this {kind} model: {reason}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def configuration(values: Mapping[str, Any]) -> Any:
    """transformers' configuration object of a type that it knows, without quantization."""
    import transformers

    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise HfvramError("unknown_architecture", f"transformers knows no model type {printable(repr(kind), 60)}")
    own = copy.deepcopy({k: v for k, v in values.items() if k not in LEFT_OUT})  # some classes take parts out of it
    return transformers.AutoConfig.for_model(kind, **without_kernels(own))


def without_kernels(values: dict[str, Any]) -> dict[str, Any]:
    """Without the names of kernels: transformers would fetch those of other names from the Hub, and run them."""
    kept = {k: v for k, v in values.items() if not k.strip("_").startswith(("attn_implementation", "experts_implem"))}
    return {k: without_kernels(v) if isinstance(v, dict) else v for k, v in kept.items()}


def build_remote(path: str, dtype: Any) -> Any:
    """The model that the code of a repository builds: its own configuration class, its own model class."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if (auto := remote_class(config)) is None:
        raise HfvramError("unknown_architecture", f"the code of {printable(path, 100)} names no model in auto_map")
    return getattr(transformers, auto).from_config(config, dtype=dtype, trust_remote_code=True)


def check(values: Any, name: str = "", nesting: int = 0) -> None:
    """Raises `bad_config` for absurd sizes, before they are built: every layer would take its time and memory."""
    if nesting > MAX_NESTING:
        raise HfvramError("bad_config", f"config.json is nested more than {MAX_NESTING} deep")
    if isinstance(values, Mapping):
        for key, value in values.items():
            check(value, str(key), nesting + 1)
    elif isinstance(values, list):
        if len(values) > MAX_ENTRIES:
            raise HfvramError("bad_config", f"config.json: {printable(name, 60)} has {len(values)} entries")
        for value in values:
            check(value, name, nesting + 1)
    elif isinstance(values, (int, float)):
        limit = MAX_LAYERS if name.endswith(COUNTS) else MAX_SIZE if name.endswith(SIZES) else None
        if limit is not None and values > limit:
            raise HfvramError("bad_config", f"config.json: {printable(name, 60)} is {values}, more than {limit}")


def remote_class(config: Any) -> str | None:
    """The AutoModel class that the repository's own code fills in, the one that generates first."""
    filled: Mapping[str, Any] = getattr(config, "auto_map", None) or {}
    wanted = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText", "AutoModel")
    return next((name for name in wanted if name in filled), None)


def class_of(config: Any, class_name: str | None) -> Any:
    """The model class of this name, or of the configuration.

    A name is anyone's: only classes count that transformers exports and that build models from this configuration.
    """
    import transformers

    def exported(name: Any) -> Any:
        if not isinstance(name, str) or name.startswith("_"):
            return None
        try:
            found = getattr(transformers, name, None)
        except (ImportError, RuntimeError):  # what transformers exports, but can't import here
            return None
        if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
            return None
        text = config.sub_configs.get("text_config")
        own = getattr(found, "config_class", None) in (type(config), text)
        return found if own or any(found in _classes(config, table) for table in TABLES) else None

    if class_name is not None:
        if (found := exported(class_name)) is None:
            raise HfvramError(
                "unknown_architecture",
                f"transformers has no class {printable(class_name, 60)!r} for {printable(config.model_type, 60)!r}",
            )
        return found
    for name in config.architectures or ():
        if (found := exported(name)) is not None:
            return found
    for mapping in auto_mappings(config):
        if found := _classes(config, mapping):
            return found[0]
    raise HfvramError("unknown_architecture", f"transformers has no model for {printable(config.model_type, 60)!r}")


def _classes(config: Any, mapping: str) -> tuple[Any, ...]:
    """The classes that one of AutoModel's tables has for a configuration: some have another type's."""
    import transformers

    table = getattr(transformers, mapping)
    if type(config) not in table:
        return ()
    found: Any = table[type(config)]
    return found if isinstance(found, tuple) else (found,)


def auto_mappings(config: Any) -> tuple[str, ...]:
    """AutoModel's tables in the order in which a class is looked for: what generates, but encoders bare."""
    import transformers

    base = "MODEL_MAPPING"
    if config.is_encoder_decoder:
        return "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING", base
    if config.get_text_config() is not config:
        return "MODEL_FOR_MULTIMODAL_LM_MAPPING", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", base
    if type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        return (base,)
    return "MODEL_FOR_CAUSAL_LM_MAPPING", base


def params(model: Any) -> tuple[Param, ...]:
    """Every parameter and buffer of a built model, in order of construction, tied ones once: a head as the embedding.

    `dtype` is None where it is the model's own.
    """
    return tuple(_params(model))


def _params(model: Any) -> Iterator[Param]:
    seen: set[int] = set()
    head = model.get_output_embeddings()
    try:
        tied = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # models of sound and images
        tied = None
    for path, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            # A few models register the head before the embedding that it is tied to.
            if id(tensor) not in seen and not (module is head and tensor is tied):
                seen.add(id(tensor))
                yield _param(path, name, tensor, _kind(module, name, tensor, module is head), model.dtype)
    for path, module in model.named_modules():
        for name, tensor in module.named_buffers(recurse=False):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield _param(path, name, tensor, "buffer", model.dtype)


def _param(path: str, name: str, tensor: Any, kind: ParamKind, dtype: Any) -> Param:
    own = None if tensor.dtype == dtype else NAMES.get(str(tensor.dtype), str(tensor.dtype).removeprefix("torch."))
    return Param(f"{path}.{name}" if path else name, tuple(tensor.shape), kind, own)


def _kind(module: Any, name: str, tensor: Any, head: bool) -> ParamKind:
    """What a parameter is, by the kind of module that holds it."""
    from torch import nn

    of = type(module).__name__
    if "Norm" in of:
        return "norm"
    if name in ("bias", "in_proj_bias") and tensor.dim() == 1:
        return "bias"
    if type(module) is nn.Linear or of == "Conv1D":  # GPT-2's Conv1D is a linear layer, stored transposed
        return "head" if head else "linear"
    if isinstance(module, nn.Linear):
        return "linear_subclass"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    return "experts" if "Experts" in of and tensor.dim() > 1 else "other"
