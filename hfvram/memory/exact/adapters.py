"""LoRA and QLoRA by PEFT's own code on the meta device."""

import re
import warnings
from typing import Any

import torch

from hfvram.errors import HfvramError, printable
from hfvram.memory.exact.build import DTYPES
from hfvram.memory.exact.labels import name_tensors
from hfvram.memory.exact.run import Run
from hfvram.memory.timeline import Tag
from hfvram.model.parts import saved
from hfvram.request import Request

ALPHA = 32
MOST_REPEATS = 4
LINEAR, MOST_NAMES = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt"), 20
REPEAT, NESTED = r"[*+]|{\d*,", r"([*+]|{\d*,\d*})[^(]*\)+([*+]|{\d*,)"
"""In a regular expression of targets: of many, or of one within another, matching may never end."""


def adapt(run: Run, model: Any, request: Request) -> Any:
    """The model with its adapters, frozen below them. Raises `usage` where the targets match nothing, `missing_extra`.

    As PEFT does it: for QLoRA what is not quantized is cast to fp32 (`prepare_model_for_kbit_training`), and adapters
    of a model in half precision are kept in fp32 (`autocast_adapter_dtype`) unless another dtype is asked for. Under
    FSDP nothing is cast, since that would cast packed weights too; TRL's adapters are then of `--adapter-dtype bf16`.
    """
    peft = package()
    packed = request.mode == "qlora" and request.fsdp is None
    with run.tracker, run.tracker.making("weights"), torch.device("meta"), warnings.catch_warnings(action="ignore"):
        if packed:
            model.is_loaded_in_4bit = True
        model = prepared(peft, model, request)
        if packed:
            name_tensors(run.tracker, model)
        adapted = wrapped(peft, model, request)
    for parameter in adapted.parameters():
        if parameter.requires_grad and (handle := run.tracker.add(parameter)) is not None:
            run.timeline.tags[handle] = Tag("LoRA adapters", "weights", "", "PEFT's own code", "exact")
    return adapted


def package() -> Any:
    """PEFT. Raises `missing_extra`."""
    try:
        import peft
    except ImportError as error:
        raise HfvramError("missing_extra", "LoRA needs peft: pip install 'hfvram[exact]'") from error
    return peft


def prepared(peft: Any, model: Any, request: Request) -> Any:
    """The base model as Trainer hands it to PEFT: cast up where it is packed, its inputs with gradients otherwise."""
    if request.mode == "qlora" and request.fsdp is None:
        model = peft.prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=request.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},  # as transformers has it
        )
        if request.gradient_checkpointing:  # as Trainer does, once the model is prepared
            model.gradient_checkpointing_enable(every_n_layers=request.checkpoint_every)
    elif request.gradient_checkpointing:
        model.enable_input_require_grads()
    return model


def wrapped(peft: Any, model: Any, request: Request) -> Any:
    """A prepared model with its adapters, in the dtype that is asked for. Raises `usage`."""
    config = peft.LoraConfig(
        r=request.lora_r,
        lora_alpha=ALPHA,
        lora_dropout=request.lora_dropout,
        target_modules=targets(request.lora_targets),
        task_type=task(model),
        use_rslora=request.rslora,
        use_dora=request.dora,
        modules_to_save=list(request.modules_to_save) or None,
    )
    if request.modules_to_save:
        found = dict(model.named_parameters(remove_duplicate=False))
        means = saved(found, request.modules_to_save)
        if packed := next((name for name in found if name in means and not found[name].is_floating_point()), None):
            raise HfvramError("usage", f"--modules-to-save: {packed} is packed, and can't be trained")
    wide = request.adapter_dtype == "fp32"
    try:
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=wide)
    except ValueError as error:
        raise HfvramError("usage", f"--lora-targets: {_reason(error)}{_valid(model, error)}") from error
    if not wide:
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name and parameter.requires_grad and parameter.dtype != DTYPES[request.adapter_dtype]:
                parameter.data = parameter.data.to(DTYPES[request.adapter_dtype])
    return adapted


def targets(asked: str | tuple[str, ...]) -> str | list[str]:
    """What PEFT takes: names as a list, else `all-linear` or a regular expression.

    >>> targets("q_proj"), targets(("q_proj", "v_proj")), targets("all-linear")
    (['q_proj'], ['q_proj', 'v_proj'], 'all-linear')
    """
    if not isinstance(asked, str):
        return list(asked)
    if re.fullmatch(r"[\w-]+", asked):
        return asked if asked == "all-linear" else [asked]
    try:
        re.compile(asked)
    except re.error as error:
        raise HfvramError(
            "usage", f"--lora-targets {printable(asked, 60)} is no regular expression: {error}"
        ) from error
    if len(re.findall(REPEAT, asked)) > MOST_REPEATS or re.search(NESTED, asked):
        valid = f"valid are up to {MOST_REPEATS} repeats, none within another"
        raise HfvramError("usage", f"--lora-targets {printable(asked, 60)} may take forever: {valid}")
    return asked


def task(model: Any) -> str | None:
    """PEFT's task type: what kind of forward it wraps; none where the model generates no text, or not from tokens."""
    if getattr(model, "main_input_name", "input_ids") != "input_ids" or not model.can_generate():
        return None
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def _reason(error: ValueError) -> str:
    """PEFT's own words, on one line."""
    return printable(" ".join(str(error).split()), 200)


def _valid(model: Any, error: ValueError) -> str:
    """Names of linear layers, where those that were asked for are none of the model's."""
    if "not found in the base model" not in str(error):
        return ""
    names = {name.rpartition(".")[2] for name, m in model.named_modules() if type(m).__name__ in LINEAR}
    return f" Valid are all-linear, {', '.join(sorted(names)[:MOST_NAMES])}"
