"""What a model is given, as it comes to the GPU: text alone where it can do with that, else pictures or sound, too.

Sizes are those of the configuration: pictures of its image size, sound of its number of frames. Where the model's code
doesn't say how its inputs lie in memory, the first form counts that it runs on.
"""

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch

from hfvram.memory.exact.run import Run
from hfvram.request import Request

TEXT = ("input_ids", "inputs", "decoder_input_ids")
MEDIA = ("pixel_values", "pixel_values_videos", "flattened_patches", "input_features", "input_values")
PARTS = ("vision_config", "audio_config", "encoder", "encoder_config", "thinker_config", "text_config", "decoder")
BESIDE = {"bbox": 4, "image_attention_mask": 1}
"""What some models want to know of each token: where it stands on the page, which of the pictures it sees."""
ONE_LABEL = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification")
"""Classes that judge a sequence or a picture as a whole."""
USUAL_STRIDE = 320
"""Samples that become one frame, where the configuration doesn't say: 20 ms at 16 kHz."""
Shapes = dict[str, tuple[int, ...]]


def inputs(run: Run, model: Any, request: Request) -> dict[str, Any]:
    """The tensors that the model is given for this request, tracked as inputs.

    `ctx` counts tokens of text. For sound it counts the frames that come out of its convolutions, unless their number
    is fixed, and a decoder beside pictures or sound has as many tokens as it has positions for, if they are fewer.
    """
    forms = candidates(model, request)
    if request.mode != "inference" and "labels" in inspect.signature(model.forward).parameters:
        whole = type(model).__name__.endswith(ONE_LABEL)
        forms = [form | {"labels": (request.batch,)} if whole else labelled(form, request) for form in forms]
    shapes = forms[0]
    if len(forms) > 1:
        shapes = next((form for form in forms if runs(run, model, tensors(model, decoding(model, form)))), shapes)
    with run.tracker, run.tracker.making("inputs"):
        given = tensors(model, shapes)
        if "labels" in given and given["labels"].shape == shapes.get("input_ids"):
            given["labels"] = given["input_ids"]
    return given


def labelled(form: Shapes, request: Request) -> Shapes:
    """With the tokens that a model computes its own loss of: the text, or what a decoder is to say."""
    tokens = next((form[name] for name in TEXT[::-1] if name in form), None)
    rest = {name: shape for name, shape in form.items() if name != "decoder_input_ids"}
    return rest | {"labels": tokens or (request.batch, request.ctx or 1)}


def tensors(model: Any, shapes: Shapes) -> dict[str, Any]:
    """Empty ones of these shapes: ids and masks are whole numbers, pictures and sound of the model's dtype."""
    given = {}
    for name, shape in shapes.items():
        whole = name in TEXT or name.endswith(("labels", "ids", "mask"))
        if len(shape) == 1:  # a label for each sequence: a class, or a number where there is but one
            whole = getattr(model.config, "num_labels", 2) > 1
        given[name] = torch.empty(shape, dtype=torch.long if whole else model.dtype, device="meta")
    return given


def decoding(model: Any, form: Shapes) -> Shapes:
    """With a first token for a decoder that has none yet: `generate` gives it."""
    lacks = model.config.is_encoder_decoder and not {"labels", "decoder_input_ids"} & form.keys()
    if not (lacks and "decoder_input_ids" in inspect.signature(model.forward).parameters):
        return form
    return form | {"decoder_input_ids": (next(iter(form.values()))[0], 1)}


def runs(run: Run, model: Any, given: dict[str, Any]) -> bool:
    """Whether the model's forward pass takes this."""
    trial = Run(gpu=run.gpu)
    trial.tracker.kernels = run.tracker.kernels  # what they find out here they need not find out again
    written, run.timeline = run.timeline, trial.timeline  # kernels that stand in for fused ones write into the run's
    try:
        with trial.on_cuda(model), torch.no_grad():
            model(**given)
    except Exception:  # whatever the model's code says against it
        return False
    finally:
        run.timeline = written
    return True


def candidates(model: Any, request: Request) -> list[Shapes]:
    """Forms of the input in the order in which they are tried; one where there is no choice."""
    parameters = inspect.signature(model.forward).parameters
    takes = [name for name in parameters if name not in ("args", "kwargs")]
    needs = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    config, batch, ctx = model.config, request.batch, request.ctx or 1
    main = getattr(model, "main_input_name", "input_ids")
    text: Shapes = {main if main in TEXT else "input_ids": (batch, ctx)}
    media = [name for name in MEDIA if name in takes]
    two_towers = hasattr(config, "vision_config") and hasattr(config, "text_config") and not model.can_generate()
    alone = not two_towers and (main in TEXT or not media) and not any(name in media for name in needs)
    told: Shapes = {n: (batch, ctx, size) for n, size in BESIDE.items() if n in takes}
    found = [text, *([text | told] if told else [])] if alone else []
    for name in sorted(media, key=lambda name: name != main):
        for shape in shapes_of(name, config, request):
            found += list(combined(name, shape, text, told, takes, needs, decoder_tokens(config, request)))
    return found if alone else [*found, text]


def combined(
    name: str, shape: tuple[int, ...], text: Shapes, told: Shapes, takes: list[str], needs: list[str], tokens: int
) -> Iterator[Shapes]:
    """One kind of picture or sound: with what else the model needs, alone, and with its decoder's tokens."""
    batch = shape[0]
    beside = {n: (batch, tokens) for n in needs if n != name and n.endswith(("ids", "mask"))}
    if "input_ids" in takes:
        yield {name: shape} | text | beside
        yield {name: shape} | text | beside | told
        if "image_embeds_position_mask" in takes:
            yield {name: shape} | text | beside | {"image_embeds_position_mask": text["input_ids"]}
    yield {name: shape} | beside
    if name == "input_features" and "attention_mask" in takes:  # the loss wants to know how many frames are sound
        yield from ({name: shape, "attention_mask": (batch, frames)} for frames in shape[1:])
    if "decoder_input_ids" in takes:
        yield {name: shape, "decoder_input_ids": (batch, tokens)}


def decoder_tokens(config: Any, request: Request) -> int:
    """Tokens of a decoder beside pictures or sound: `ctx`, or all that it has positions for."""
    limits: list[int] = [value for value in named(config, "max_target_positions", "max_position_embeddings") if value]
    return min([request.ctx or 1, *limits])


def shapes_of(name: str, config: Any, request: Request) -> Iterator[tuple[int, ...]]:
    """Shapes that an input of this name may have."""
    batch, ctx = request.batch, request.ctx or 1
    if name in ("pixel_values", "pixel_values_videos"):
        size = first(config, 224, "image_size")
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        picture = (first(config, 3, "num_channels", "in_channels"), height, width)
        frames = first(config, 1, "num_frames")
        yield (batch, *picture)
        yield (batch, frames, *picture)
    elif name == "flattened_patches":
        width = first(config, 768, "patch_embed_hidden_size")
        yield (batch, ctx, width + 2)  # a patch says in which row and column it stands
    elif name == "input_values":
        strides = first(config, (USUAL_STRIDE,), "conv_stride")
        samples = first(config, math.prod(strides), "inputs_to_logits_ratio")
        yield (batch, ctx * samples)
        yield (batch, 1, ctx * samples)
    elif name == "input_features":
        fixed = first(config, None, "max_source_positions")
        bands = [*named(config, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim"), 80]
        for bins in dict.fromkeys((*bands, *(4 * band for band in bands))):  # four frames side by side
            for frames in dict.fromkeys((2 * fixed if fixed else ctx, 4 * ctx)):
                yield (batch, bins, frames)
                yield (batch, frames, bins)


def first(config: Any, default: Any, *names: str) -> Any:
    """The outermost value of these names, or the default."""
    return next(iter(named(config, *names)), default)


def named(config: Any, *names: str) -> list[Any]:
    """Values of these names in a configuration and in its parts, the outermost first, vision and sound before text."""
    found = []
    rest = [config]
    while rest:
        here = rest.pop(0)
        values = [getattr(here, name, None) for name in names]
        found += [value for value in values if value is not None and not callable(value)]
        rest += [part for part in (getattr(here, name, None) for name in PARTS) if hasattr(part, "to_dict")]
    return found
