"""A GGUF file's metadata and tensors → `Architecture`: what a layer is, its tensors say; its sizes, the keys.

`general.architecture` names the family, whose keys stand under its name. Names of tensors mean the same in all
families, so that one reader does for all: a layer with `attn_q` attends, one with `ssm_in` is a state space. What
llama.cpp's code alone says, windows above all, is in `gguf_rules.py`. Parameters are those of the tensors, so exact.

Source: llama.cpp b10635, src/llama-arch.cpp, src/llama-hparams.cpp, src/models/*.cpp; gguf 0.19, constants.py.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hfvram.errors import HfvramError, printable
from hfvram.model.architecture import Architecture, Stack
from hfvram.model.gguf_keys import Keys
from hfvram.model.gguf_rules import ENCODERS, REFUSED, cached_layers, windows
from hfvram.model.identify import Model
from hfvram.model.layers import (
    Attention,
    FeedForward,
    GatedDeltaNet,
    LatentAttention,
    Layer,
    Mamba1,
    Mamba2,
    Mixer,
    MixtureOfExperts,
    Param,
    ParamKind,
    ShortConv,
)
from hfvram.read.checkpoint import Checkpoint, StoredTensor
from hfvram.read.gguf import architectures, file_types

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_BUFFERS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def identify_gguf(checkpoint: Checkpoint) -> Model:
    """The model of a GGUF file. Raises `bad_header` and `unknown_architecture`."""
    architecture = read(checkpoint.gguf or {}, checkpoint.tensors or ())
    warnings = (*checkpoint.warnings, *architecture.warnings)
    return Model(checkpoint, architecture, architecture.parameters, "headers", warnings)


def read(metadata: Mapping[str, Any], tensors: Sequence[StoredTensor]) -> Architecture:
    """The architecture of these keys and tensors.

    Raises `unknown_architecture` that names the family, or the layer that is of no known kind; `bad_header` where a
    size is missing or absurd.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or not arch:
        raise HfvramError("bad_header", "the GGUF file has no general.architecture")
    if metadata.get("general.type") == "adapter" or arch in REFUSED:
        why = REFUSED.get(arch, "an adapter alone: name its base model's file")
        raise HfvramError("unknown_architecture", f"GGUF architecture {printable(arch, 60)!r} is not answered: {why}")
    keys = Keys(metadata, arch)
    if arch not in architectures() and (keys.get("block_count") is None or keys.get("embedding_length") is None):
        message = f"GGUF architecture {printable(arch, 60)!r} is not known, and its keys don't say what it is made of"
        raise HfvramError("unknown_architecture", message)
    stored = {t.name: t for t in tensors}
    count = keys.size("block_count", high=100_000) - keys.size("nextn_predict_layers", default=0, low=0)
    hidden = keys.size("embedding_length")
    blocks: list[dict[str, StoredTensor]] = [{} for _ in range(max(count, 0))]
    for name, tensor in stored.items():
        if (found := _BLOCK.fullmatch(name)) and int(found[1]) < count:
            blocks[int(found[1])][found[2]] = tensor
    if not blocks:
        raise HfvramError("bad_header", "the GGUF file has no layers")
    layers = tuple(_Layers(keys, hidden, count).layer(i, block) for i, block in enumerate(blocks))
    outer = [_param(t) for n, t in stored.items() if not _BLOCK.fullmatch(n)]
    embedding = next((p for p in outer if p.name.startswith("token_embd.weight")), None)
    head = tuple(p for p in outer if p.name in ("output.weight", "output.bias"))
    encoder = arch in ENCODERS or metadata.get(f"{arch}.attention.causal") is False
    return Architecture(
        model_type=arch,
        class_name=str(metadata.get("general.basename") or arch)[:60],
        task="encoder" if encoder else "causal",
        stacks=(Stack("text", layers, "", tuple(p for p in outer if p not in head), (), hidden),),
        main="text",
        vocab_size=embedding.shape[0] if embedding else keys.size("vocab_size", default=1),
        hidden_size=hidden,
        max_positions=keys.size("context_length", default=0, low=0, high=1 << 40) or None,
        dtype=file_type(metadata, tensors),
        head=head,
        tied_head=not encoder and not head,
        warnings=_unheard_of(arch, layers),
    )


def file_type(metadata: Mapping[str, Any], tensors: Sequence[StoredTensor]) -> str:
    """The mixture that the file says it is, `Q4_K_M`, else the type of most of its bytes."""
    number = metadata.get("general.file_type")
    if type(number) is int and (name := file_types().get(number)):
        return name
    sizes: dict[str, int] = {}
    for t in tensors:
        sizes[t.dtype] = sizes.get(t.dtype, 0) + t.nbytes
    return max(sizes, key=sizes.__getitem__, default="F32")


def _unheard_of(arch: str, layers: Sequence[Layer]) -> tuple[str, ...]:
    """A warning for a family that the gguf package does not know: its keys and tensors said enough all the same."""
    if arch in architectures():
        return ()
    return (f"GGUF architecture {printable(arch, 60)!r} is not known here: its layers are read by their tensors alone",)


class _Layers:
    """Builds a model's layers."""

    def __init__(self, keys: Keys, hidden: int, count: int) -> None:
        self.keys = keys
        self.hidden = hidden
        self.windows = windows(keys, count)
        self.cached = cached_layers(keys, count)

    def layer(self, index: int, block: Mapping[str, StoredTensor]) -> Layer:
        """The layer of these tensors."""
        taken: set[str] = set()
        mixers = []
        for mixer, names in self._mixers(index, block):
            mixers.append(mixer)
            taken |= names
        feed, names = self._feed_forward(index, block)
        taken |= names
        if not mixers and feed is None:
            shown = ", ".join(sorted(block)[:4]) or "no tensors"
            message = (
                f"layer {index} of GGUF architecture {self.keys.arch!r} is of no known kind ({printable(shown, 120)})"
            )
            raise HfvramError("unknown_architecture", message)
        rest = tuple(_param(t) for n, t in block.items() if n not in taken)
        return Layer(mixers=tuple(mixers), feed_forward=feed, params=rest)

    def _mixers(self, index: int, block: Mapping[str, StoredTensor]) -> list[tuple[Mixer, set[str]]]:
        keys, hidden = self.keys, self.hidden
        has = {n.removesuffix(".weight") for n in block}
        own = {n for n in block if n.startswith(("ssm_", "attn_gate", "attn_qkv"))}
        if has & {"ssm_ba", "ssm_beta", "ssm_alpha"}:
            if "ssm_conv1d_q" in has:
                raise HfvramError("unknown_architecture", f"Kimi's delta attention of {keys.arch!r} is not answered")
            heads = keys.size("ssm.time_step_rank")
            mixer: Mixer = GatedDeltaNet(
                hidden_size=hidden,
                key_heads=keys.size("ssm.group_count"),
                value_heads=heads,
                key_dim=keys.size("ssm.state_size"),
                value_dim=keys.size("ssm.inner_size") // heads,
                d_conv=keys.size("ssm.conv_kernel"),
                params=_params(block, own),
            )
            return [(mixer, own)]
        found: list[tuple[Mixer, set[str]]] = []
        if "attn_kv_a_mqa" in has:
            found.append(self._latent(index, block))
        elif has & {"attn_q", "attn_qkv", "attn_k"}:
            found.append(self._attention(index, block))
        if "ssm_in" in has or "ssm_a" in has:
            found.append(self._state_space(block, {n for n in block if n.startswith("ssm_")}))
        if "shortconv.conv" in has:
            names = {n for n in block if n.startswith("shortconv.")}
            width = keys.size("shortconv.l_cache")
            found.append((ShortConv(hidden_size=hidden, d_conv=width, params=_params(block, names)), names))
        return found

    def _state_space(self, block: Mapping[str, StoredTensor], names: set[str]) -> tuple[Mixer, set[str]]:
        """Mamba with `ssm_x`, which Mamba-2 has not."""
        keys, params = self.keys, _params(block, names)
        inner, state, kernel = (keys.size(f"ssm.{k}") for k in ("inner_size", "state_size", "conv_kernel"))
        rank, groups = keys.size("ssm.time_step_rank"), keys.size("ssm.group_count", default=0, low=0)
        if "ssm_x.weight" in block and not groups:
            one = Mamba1(
                hidden_size=self.hidden, d_inner=inner, d_state=state, d_conv=kernel, dt_rank=rank, params=params
            )
            return one, names
        two = Mamba2(
            hidden_size=self.hidden,
            heads=rank,
            head_dim=inner // rank,
            d_state=state,
            groups=groups,
            d_conv=kernel,
            chunk_size=256,
            params=params,
        )
        return two, names

    def _attention(self, index: int, block: Mapping[str, StoredTensor]) -> tuple[Mixer, set[str]]:
        keys, window = self.keys, self.windows[index]
        names = {n for n in block if n.startswith("attn_")}
        heads = keys.of_layer("attention.head_count", index)
        kv_heads = keys.of_layer("attention.head_count_kv", index, default=heads)
        usual = keys.size("attention.key_length", default=self.hidden // max(heads, 1))
        values = keys.size("attention.value_length", default=usual)
        if window:
            usual = keys.size("attention.key_length_swa", default=usual)
            values = keys.size("attention.value_length_swa", default=values)
        kind = "full_attention" if not window else "chunked_attention" if keys.arch == "llama4" else "sliding_attention"
        mixer = Attention(
            kind=kind,  # type: ignore[arg-type]
            hidden_size=self.hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=usual,
            value_dim=values,
            window=window,
            fused_qkv="attn_qkv.weight" in block,
            cached=index < self.cached,
            params=_params(block, names),
        )
        return mixer, names

    def _latent(self, index: int, block: Mapping[str, StoredTensor]) -> tuple[Mixer, set[str]]:
        """Latent attention; files from before May 2025, which keep `attn_kv_b` whole, cache every head's keys."""
        keys = self.keys
        names = {n for n in block if n.startswith(("attn_", "indexer."))}
        heads = keys.of_layer("attention.head_count", index)
        rope = keys.size("rope.dimension_count")
        if "attn_k_b.weight" not in block:
            key = keys.size("attention.key_length")
            value = keys.size("attention.value_length")
            mixer: Mixer = Attention(
                hidden_size=self.hidden,
                heads=heads,
                kv_heads=heads,
                head_dim=key,
                value_dim=value,
                params=_params(block, names),
            )
            return mixer, names
        rank = keys.size("attention.kv_lora_rank")
        mixer = LatentAttention(
            hidden_size=self.hidden,
            heads=heads,
            q_lora_rank=keys.size("attention.q_lora_rank", default=0, low=0) or None,
            kv_lora_rank=rank,
            qk_nope_head_dim=keys.size("attention.key_length_mla", default=rope + 1) - rope,
            qk_rope_head_dim=rope,
            v_head_dim=keys.size("attention.value_length_mla", default=1),
            index_heads=keys.size("attention.indexer.head_count", default=0, low=0),
            index_head_dim=keys.size("attention.indexer.key_length", default=0, low=0),
            index_top_k=keys.size("attention.indexer.top_k", default=0, low=0),
            params=_params(block, names),
        )
        return mixer, names

    def _feed_forward(
        self, index: int, block: Mapping[str, StoredTensor]
    ) -> tuple[FeedForward | MixtureOfExperts | None, set[str]]:
        names = {n for n in block if n.startswith(("ffn_", "exp_probs_b")) and "norm" not in n}
        params = _params(block, names)
        up = block.get("ffn_up.weight")
        experts = next((block[n] for n in block if "_exps.weight" in n or re.search(r"ffn_up\.0\.", n)), None)
        if experts is not None:
            count = self.keys.size("expert_count")
            down = block.get("ffn_down_exps.weight")
            width = down.shape[-1] if down else self.keys.size("expert_feed_forward_length", default=1)
            shared = block.get("ffn_up_shexp.weight") or up
            mixture = MixtureOfExperts(
                hidden_size=self.hidden,
                experts=count,
                top_k=min(count, self.keys.of_layer("expert_used_count", index)),
                intermediate_size=width,
                shared_intermediate_size=shared.shape[0] if shared else 0,
                params=params,
            )
            return mixture, names
        if up is None:
            return None, set()
        gated = "ffn_gate.weight" in block
        fused = not gated and "ffn_down.weight" in block and up.shape[0] == 2 * block["ffn_down.weight"].shape[-1]
        feed = FeedForward(
            hidden_size=self.hidden,
            intermediate_size=block["ffn_down.weight"].shape[-1] if "ffn_down.weight" in block else up.shape[0],
            gated=gated or fused,
            activation="silu",
            fused_gate_up=fused,
            params=params,
        )
        return feed, names


def _params(block: Mapping[str, StoredTensor], names: set[str]) -> tuple[Param, ...]:
    return tuple(_param(t) for n, t in block.items() if n in names)


def _param(tensor: StoredTensor) -> Param:
    """A tensor as a parameter. Names stay whole, and are relative to nothing."""
    name, shape = tensor.name, tensor.shape
    kind: ParamKind = "linear" if len(shape) == 2 else "other"
    if name in _BUFFERS or re.search(r"\.rope_(freqs|factors)", name):
        kind = "buffer"
    elif "_exps." in name:
        kind = "experts"
    elif name.startswith(("token_embd.", "per_layer_token_embd", "position_embd", "token_types")):
        kind = "embedding"
    elif name == "output.weight":
        kind = "head"
    elif name.endswith(".bias"):
        kind = "bias"
    elif "norm" in name:
        kind = "norm"
    elif "conv1d" in name or "shortconv.conv" in name:
        kind = "conv"
    return Param(name, shape, kind)
