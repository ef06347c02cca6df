"""A model of transformers as a GGUF file would hold it: llama.cpp's names for its tensors, and their shapes.

What a converter makes of them: gate and up of fused experts apart; norms and all that has one dimension, convolutions
and routers in fp32. Source: llama.cpp b10635, convert_hf_to_gguf.py; gguf 0.19, tensor_mapping.py.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Final, NamedTuple

from hfvram.model.architecture import Architecture
from hfvram.model.layers import Attention, LatentAttention, Layer, MixtureOfExperts, Param


class Tensor(NamedTuple):
    """A tensor of a GGUF file before anything is quantized: rows × columns, the experts' number in front."""

    name: str
    shape: tuple[int, ...]
    fp32: bool = False


ATTENTION = (
    (r"q_a_proj", "attn_q_a"),
    (r"q_b_proj", "attn_q_b"),
    (r"kv_a_proj", "attn_kv_a_mqa"),
    (r"qkv|query_key_value|c_attn|W_?pack|in_proj_qkv", "attn_qkv"),
    (r"\b(o_proj|out_proj|dense|c_proj|wo|attention\.output)\b", "attn_output"),
    (r"\b(k_proj|key|wk)\b", "attn_k"),
    (r"\b(v_proj|value|wv)\b", "attn_v"),
    (r"\b(q_proj|query|wq)\b", "attn_q"),
)
FEED = (
    (r"\b(down_proj|w2|fc2|c_proj|dense_4h_to_h|output_linear|wo)\b", "ffn_down"),
    (r"\b(gate_proj|w1|gate)\b", "ffn_gate"),
    (r"\b(up_proj|w3|fc1|c_fc|dense_h_to_4h|gate_up_proj|input_linear|wi)\b", "ffn_up"),
)
RECURRENT = (
    (r"in_proj_qkvz?|in_proj\b(?=.*linear_attn)", "attn_qkv"),
    (r"in_proj_z", "attn_gate"),
    (r"in_proj_ba|in_proj_[ab]\b", "ssm_ba"),
    (r"in_proj", "ssm_in"),
    (r"out_proj", "ssm_out"),
    (r"conv", "ssm_conv1d"),
    (r"x_proj", "ssm_x"),
    (r"dt_proj", "ssm_dt"),
)


WINDOWED: Final = (
    *("gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gpt_oss", "cohere2"),
    *("llama4", "llama4_text", "olmo3", "exaone4", "exaone_moe", "afmoe", "laguna", "smallthinker", "plamo3"),
)
"""Model types of transformers whose windows llama.cpp knows (`gguf_rules.py`)."""


@lru_cache(maxsize=16)
def converted(a: Architecture) -> Architecture:
    """The model as llama.cpp runs it: it has no window where llama.cpp reads none (Mistral, Phi-3, Starcoder 2)."""
    if (a.text_type or a.model_type) in WINDOWED or a.task == "encoder":
        return a
    seen: dict[int, Layer] = {}

    def plain(layer: Layer) -> Layer:
        mixers = tuple(
            replace(m, kind="full_attention", window=None)
            if isinstance(m, Attention) and m.kind in ("sliding_attention", "chunked_attention")
            else m
            for m in layer.mixers
        )
        return layer if mixers == layer.mixers else replace(layer, mixers=mixers)

    layers = tuple(seen.setdefault(id(layer), plain(layer)) for layer in a.text.layers)
    return replace(a, stacks=tuple(replace(s, layers=layers) if s.name == a.main else s for s in a.stacks))


def tensors(a: Architecture) -> tuple[Tensor, ...]:
    """Every tensor of the text model but the pooler. Towers are another file's."""
    found = [t for p in a.text.before for t in _around(p)]
    for i, layer in enumerate(a.text.layers):
        found += [t._replace(name=f"blk.{i}.{t.name}") for t in _layer(layer, a.model_type)]
    found += [t for p in a.text.after for t in _around(p)]
    for p in a.head:
        found += _plain(p, "output" if p.kind == "head" else p.name.rpartition(".")[0])
    return tuple(found)


def _around(p: Param) -> Iterable[Tensor]:
    """What stands before and after the layers: embeddings of tokens, of positions in fp32, and the last norm."""
    stem = p.name.rpartition(".")[0]
    if p.kind != "embedding":
        return _plain(p, "output_norm" if p.kind == "norm" and "norm" in stem.rpartition(".")[2] else stem)
    if re.search(r"position|pos_emb|wpe|token_type", stem):
        return _plain(p, "position_embd", fp32=True)
    return _plain(p, "per_layer_token_embd" if "per_layer" in stem else "token_embd")


def _layer(layer: Layer, model_type: str) -> Iterator[Tensor]:
    for mixer in layer.mixers:
        if isinstance(mixer, (Attention, LatentAttention)):
            for p in mixer.params:
                if isinstance(mixer, LatentAttention) and "kv_b_proj" in p.name and len(p.shape) == 2:
                    nope, rank = mixer.qk_nope_head_dim, mixer.kv_lora_rank
                    yield Tensor("attn_k_b.weight", (mixer.heads, rank, nope))
                    yield Tensor("attn_v_b.weight", (mixer.heads, mixer.v_head_dim, rank))
                else:
                    yield from _plain(p, _named(p, ATTENTION))
        else:
            for p in mixer.params:
                yield from _plain(p, _named(p, RECURRENT), fp32=p.kind == "conv")
    feed = layer.feed_forward
    if isinstance(feed, MixtureOfExperts):
        yield from _experts(feed)
    elif feed:
        for p in feed.params:
            yield from _plain(p, _named(p, FEED))
    for p in layer.params:
        yield from _plain(p, p.name.rpartition(".")[0])


def _experts(feed: MixtureOfExperts) -> Iterator[Tensor]:
    inner = feed.latent_size or feed.hidden_size
    for p in feed.params:
        if p.kind == "experts" and p.numel == feed.experts * inner * feed.intermediate_size:
            name = "down" if "down" in p.name or "w2" in p.name else "gate" if "w1" in p.name else "up"
            shape = (inner, feed.intermediate_size) if name == "down" else (feed.intermediate_size, inner)
            yield Tensor(f"ffn_{name}_exps.weight", (feed.experts, *shape))
        elif p.kind == "experts" and len(p.shape) == 3:
            if "down" in p.name or "w2" in p.name:
                yield Tensor("ffn_down_exps.weight", (feed.experts, inner, feed.intermediate_size))
            else:
                names = ("ffn_gate_exps", "ffn_up_exps") if feed.gated else ("ffn_up_exps",)
                for name in names:
                    yield Tensor(f"{name}.weight", (feed.experts, feed.intermediate_size, inner))
        elif p.kind == "experts":
            yield Tensor(f"{p.name}.bias", p.shape, True)
        elif len(p.shape) == 2 and p.shape[0] == feed.experts:
            yield Tensor("ffn_gate_inp.weight", p.shape, True)
        else:
            name = _named(p, FEED)
            yield from _plain(p, f"{name}_shexp" if name.startswith("ffn_") else name)


def _plain(p: Param, name: str, fp32: bool = False) -> Iterable[Tensor]:
    if p.kind == "buffer" or "pooler" in p.name:
        return ()
    end = "bias" if p.kind == "bias" or (len(p.shape) < 2 and "bias" in p.name) else "weight"
    return (Tensor(f"{name}.{end}", p.shape, fp32 or len(p.shape) < 2),)


def _named(p: Param, rules: tuple[tuple[str, str], ...]) -> str:
    """llama.cpp's name for it, by the first rule that its own matches; else its own."""
    stem = p.name.rpartition(".")[0] or p.name
    if "norm" in stem:
        return stem
    return next((name for pattern, name in rules if re.search(pattern, stem)), stem)
