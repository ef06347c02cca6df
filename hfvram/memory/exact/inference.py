"""Inference by transformers' own code: `generate` from the prompt to the last token, a prefill alone, or one pass.

`generate` itself runs, so what it does is not written down a second time here: masks, positions, caches, logits of the
last token in fp32, experts that compute otherwise while decoding. Only its end is ours, as no token says so on meta.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from hfvram.memory.exact.run import Run
from hfvram.request import Request


def infer(run: Run, model: Any, request: Request) -> None:
    """One request without gradients: its events go into the run's timeline, with the cache that it returns."""
    model.eval()
    run.tracker.unpadded = not request.padding
    ids = torch.empty((request.batch, request.ctx or 1), dtype=torch.long, device="meta")
    hook = model.register_forward_hook(lambda _, args, out: note_cache(run, cache_of(out)))
    with run.on_cuda(model), torch.no_grad():
        if request.phase == "generate":
            cache = generate(run, model, ids, request)
        else:
            run.timeline.mark(request.phase or "")
            ids = inputs(run, ids)
            cache = once(model, ids, request)
    hook.remove()
    note_cache(run, cache)


def generate(run: Run, model: Any, ids: Any, request: Request) -> Any:
    """`model.generate` on all but the last `new_tokens` tokens of `ids`; returns the cache."""
    new = request.new_tokens or 1
    ids = inputs(run, ids)
    prompt = ids[:, : ids.shape[1] - new]
    options: dict[str, Any] = {"cache_implementation": request.cache} if request.cache != "dynamic" else {}
    run.timeline.mark("prefill")
    forward_count(run, model, new)
    out = model.generate(
        prompt,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        **options,
    )
    return cache_of(out)


def forward_count(run: Run, model: Any, new: int) -> None:
    """End `generate` after `new` passes, which it would read from the tokens; mark the second as decoding."""
    done = 0

    def unfinished(*_: Any, **__: Any) -> bool:
        nonlocal done
        done += 1
        if done == 2:
            run.timeline.mark("decode")
        return done <= new

    model._has_unfinished_sequences = unfinished


def once(model: Any, ids: Any, request: Request) -> Any:
    """One forward pass: a prefill keeps its cache and the last token's logits, `encode` gives logits of every token."""
    takes = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {}
    if request.phase == "prefill":
        options["use_cache"] = True
        if "logits_to_keep" in takes:
            options["logits_to_keep"] = 1
    out = model(input_ids=ids, **options)
    if request.phase != "prefill":
        return None
    return cache_of(out)


def inputs(run: Run, ids: Any) -> Any:
    """The token ids as they come to the GPU."""
    run.tracker.category = "inputs"
    arrived = ids.clone()
    run.tracker.category = "activations"
    return arrived


def cache_of(out: Any) -> Any:
    return getattr(out, "past_key_values", None) or getattr(out, "cache_params", None)


def note_cache(run: Run, cache: Any) -> None:
    """Count the cache as it is now, and say of its tensors what they are."""
    tensors = list(reachable(cache))
    run.tracker.retag(tensors, "cache", "keys, values and states")
    run.timeline.cache_bytes = sum(t.untyped_storage().nbytes() for t in tensors)


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
        elif type(thing).__module__.startswith("transformers.") and hasattr(thing, "__dict__"):
            rest += [value for name, value in vars(thing).items() if "config" not in name.lower()]
