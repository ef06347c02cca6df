"""Inference as measured: `generate` by transformers' own code, a prefill alone, or one pass."""

import inspect
from typing import Any

import torch

from hfvram.memory.exact.inference import cache_of, generator, reachable
from hfvram.memory.measure.meter import Meter
from hfvram.request import Request

RANDOM_IDS = 30_000
PAD = 0


def tokens(model: Any, request: Request, device: str) -> Any:
    """Random ids, none of them the pad token: with one in it `generate` would build a padding mask."""
    text = model.config.get_text_config()
    size = min(getattr(text, "vocab_size", RANDOM_IDS), RANDOM_IDS)
    return torch.randint(min(1, size - 1), size, (request.batch, request.ctx or 1), device=device)


def mask(ids: Any, request: Request) -> dict[str, Any]:
    """A padding mask where the batch has one: its first sequence is a token shorter."""
    if not request.padding:
        return {}
    made = torch.ones_like(ids)
    made[0, 0] = 0
    return {"attention_mask": made}


def infer(model: Any, request: Request, meter: Meter, device: str) -> int | None:
    """Run the request; bytes of the cache that it returns, None of one pass that keeps none for later."""
    model.eval()
    ids = tokens(model, request, device)
    with torch.inference_mode():
        if request.phase == "generate" and request.new_tokens and model.can_generate():
            new = request.new_tokens
            prompt = ids[:, : ids.shape[1] - new] if ids.shape[1] > new else ids
            options: dict[str, Any] = {"cache_implementation": request.cache} if request.cache != "dynamic" else {}
            out = generator(model)(
                input_ids=prompt,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=PAD,
                return_dict_in_generate=True,
                **options,
                **mask(prompt, request),
            )
        else:
            out = _once(model, ids, request)
        meter.mark(request.phase or "generate")
        if request.phase == "encode":
            return None
        held = [t.untyped_storage().nbytes() for t in reachable(cache_of(out)) if t.device.type == device]
        return int(sum(held))


def _once(model: Any, ids: Any, request: Request) -> Any:
    given = {"input_ids": ids, **mask(ids, request)}
    if request.phase == "encode":
        whole = model.config.is_encoder_decoder and model.can_generate()
        return (model.get_encoder() if whole else model)(**given)
    takes = inspect.signature(model.forward).parameters
    given |= {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in takes else {})
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids[:, :1]
    return model(**given)
