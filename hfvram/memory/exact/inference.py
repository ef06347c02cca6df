"""Inference by transformers' own code: `generate` from the prompt to the last token, a prefill alone, or one pass.

`generate` itself runs, so what it does is not written down a second time here: masks, positions, caches, logits of the
last token in fp32, experts that compute otherwise while decoding. Only its end is ours, as no token says so on meta.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import GenerationMixin

from hfvram.memory.exact.caches import caches, grow
from hfvram.memory.exact.data_dependent import legible
from hfvram.memory.exact.inputs import MEDIA, decoding, inputs, tensors
from hfvram.memory.exact.run import Run
from hfvram.memory.packed_cache import AWAY
from hfvram.request import Request

FEW = 8
"""So many passes are run at the start and at the end of a long generation."""


def infer(run: Run, model: Any, request: Request) -> None:
    """One request without gradients: its events go into the run's timeline, with the cache that it returns."""
    model.eval()
    run.tracker.unpadded = not request.padding
    given = inputs(run, model, request)
    hook = model.register_forward_hook(lambda _, args, out: note_cache(run, cache_of(out)))
    with run.on_cuda(model), caches(run, request), legible(), torch.no_grad():
        if request.phase == "generate" and request.new_tokens and model.can_generate():
            cache = generate(run, model, given, request)
        else:
            run.timeline.mark(request.phase or "")
            cache = once(model, given, request)
    hook.remove()
    note_cache(run, cache)


def generate(run: Run, model: Any, given: dict[str, Any], request: Request) -> Any:
    """`model.generate` on all but the last `new_tokens` tokens; returns the cache.

    Of many new tokens the first and the last are run; in between the cache grows at once.
    """
    new = request.new_tokens or 0
    given.pop("decoder_input_ids", None)
    ids: Any = given.get("input_ids")
    if ids is not None:  # and what is said of each token
        of_text = [n for n, t in given.items() if n not in MEDIA and t.shape[:2] == ids.shape]
        given |= {name: given[name][:, : ids.shape[1] - new] for name in of_text}
    run.timeline.mark("prefill")
    skips = new > 2 * FEW and list(given) == ["input_ids"] and not model.config.is_encoder_decoder
    options: dict[str, Any] = {"cache_implementation": request.cache} if request.cache != "dynamic" else {}
    cache = passes(run, model, given | options, FEW if skips else new, new)
    if not skips:
        return cache
    if cache is None:
        return passes(run, model, {"input_ids": ids[:, :-1]}, 1, 1)
    if not grow(cache, new - 2 * FEW):
        return cache
    note_cache(run, cache)
    return passes(run, model, {"input_ids": ids[:, :-FEW], "past_key_values": cache}, FEW, FEW)


def passes(run: Run, model: Any, given: dict[str, Any], number: int, new: int) -> Any:
    """`generate` ended after so many passes of the `new` that it is told; returns the cache."""
    end_after(run, model, number)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "return_dict_in_generate": True}
    return cache_of(generator(model)(**given, **options))


def generator(model: Any) -> Callable[..., Any]:
    """The model's `generate`; where it cuts sound into windows by what it hears, the common one: it is one window."""
    own = model.generate
    windows = "return_timestamps" in inspect.signature(own).parameters
    return functools.partial(GenerationMixin.generate, model) if windows else own


def end_after(run: Run, model: Any, number: int) -> None:
    """End `generate` after so many passes, which it would read from the tokens; mark the second as decoding."""
    done = 0

    def unfinished(*_: Any, **__: Any) -> bool:
        nonlocal done
        done += 1
        if done == 2:
            run.timeline.mark("decode")
        return done <= number

    for part in model.modules():  # of some models a part generates
        if hasattr(part, "_has_unfinished_sequences"):
            part._has_unfinished_sequences = unfinished


def once(model: Any, given: dict[str, Any], request: Request) -> Any:
    """One forward pass: a prefill keeps its cache and the last token's logits, `encode` gives logits of every token.

    Of an encoder and a decoder, `encode` is the encoder's; in a prefill the decoder has one token.
    """
    if model.config.is_encoder_decoder and model.can_generate():
        if request.phase == "encode":
            model.get_encoder()(**given)
            return None
        shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
        given = tensors(model, decoding(model, shapes)) | given
    takes = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {}
    if request.phase != "encode":
        options["use_cache"] = True
        if "logits_to_keep" in takes:
            options["logits_to_keep"] = 1
    out = model(**given, **options)
    if request.phase == "encode":
        return None
    return cache_of(out)


def cache_of(out: Any) -> Any:
    """The cache in a model's output, under either of its names."""
    return getattr(out, "past_key_values", None) or getattr(out, "cache_params", None)


def note_cache(run: Run, cache: Any) -> None:
    """Count the cache as it is now, and say of its tensors what they are."""
    held = list(reachable(cache))
    run.tracker.retag(held, "cache", "keys, values and states")
    here = sum(t.untyped_storage().nbytes() for t in held if t.device.type == run.tracker.device)
    away = sum(t.nbytes for t in held if t.device.type != run.tracker.device and t.dim() == 4)  # its storage is none
    run.timeline.cache_bytes = here + away
    run.timeline.elsewhere = [x for x in run.timeline.elsewhere if x[1] is not AWAY]
    run.timeline.elsewhere += [("cpu", AWAY, away)] if away else []


def reachable(root: Any) -> Iterator[Any]:
    """Tensors that a cache object holds, each storage once."""
    seen: set[int] = set()
    storages: set[int] = set()
    rest = [root]
    while rest:
        thing = rest.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            key = thing.untyped_storage()._cdata
            if key not in storages:
                storages.add(key)
                yield thing
        elif isinstance(thing, dict):
            rest += list(thing.values())
        elif isinstance(thing, (list, tuple, set)):
            rest += list(thing)
        elif type(thing).__module__.startswith(("transformers.", "hfvram.")) and hasattr(thing, "__dict__"):
            rest += [value for name, value in vars(thing).items() if "config" not in name.lower()]
