"""A decoder's forward pass with gradients: embedding, layers, norm, logits and loss.

Source: transformers 5.17, models/llama/modeling_llama.py, loss/loss_utils.py `ForCausalLMLoss`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

from hfvram.memory.timeline import Tag
from hfvram.memory.training import bert, gpt, gpt_oss, opt, selection, sequence_parallel, t5
from hfvram.memory.training import operators as op
from hfvram.memory.training.attention import attention
from hfvram.memory.training.blocks import DROPPED, HIDDEN, normalize, unknown
from hfvram.memory.training.classify import judges, last_token
from hfvram.memory.training.collectives import embedding, product
from hfvram.memory.training.dora import look_up
from hfvram.memory.training.feed_forward import feed_forward
from hfvram.memory.training.kinds import kind_of
from hfvram.memory.training.latent import latent_attention
from hfvram.memory.training.mixture import mixture, routed_then_shared
from hfvram.memory.training.routing import BALANCE, balance
from hfvram.memory.training.sequence_parallel import enter, part_of_sequence
from hfvram.memory.training.state_space import mix, state_space
from hfvram.memory.training.states import Blocks, States, Weights, project
from hfvram.memory.training.surroundings import POSITIONS, Surroundings, angles, counted, masks, positions, surround
from hfvram.memory.training.tape import Input, Tape
from hfvram.memory.training.tensors import Tensor
from hfvram.model.architecture import Architecture
from hfvram.model.layers import (
    Attention,
    Dropout,
    FeedForward,
    GatedDeltaNet,
    LatentAttention,
    Layer,
    Mamba1,
    Mamba2,
    MixtureOfExperts,
    ShortConv,
)
from hfvram.request import Request

POSITIONED: Final = ("positions", "late positions", "counted ones")
"""Embeddings to which learned positions are added before the sequence is split: Megatron-LM's language_model_embedding.
"""
LOSS = "transformers 5.17: loss_utils.py ForCausalLMLoss"
EMBEDDED = Tag("embeddings", "activations", "b·s·h·e", "transformers 5.17: LlamaModel.forward")
LOGITS = Tag("logits", "activations", "b·s·V·e", "transformers 5.17: LlamaForCausalLM.forward")
WIDE_LOGITS = Tag("logits in fp32", "activations", "b·s·V·4", LOSS)
LOG_PROBABILITIES = Tag("log-probabilities", "activations", "b·s·V·4", "PyTorch 2.11: log_softmax")
LABELS = Tag("shifted labels", "activations", "b·s·8", LOSS)


def forward(
    t: Tape,
    architecture: Architecture,
    states: States,
    layers: list[tuple[Layer, int | None]],
    ids: Tensor,
    request: Request,
    received: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """One pass with labels. Returns the loss, and what the model's output holds beside it: logits, also routers'."""
    hidden, routed = decode(t, architecture, states, layers, ids, request, received)
    if judges(architecture):
        return last_token(t, architecture, states, hidden, ids), routed
    bias = states.head[1].tensor if len(states.head) > 1 else None
    kind = kind_of(architecture)
    if architecture.z_loss:
        raise unknown(f"z_loss_coefficient of {architecture.class_name}")
    if kind.wide_logits:
        cast = op.to(t, hidden, (states.head or states.before)[0].tensor.dtype, HIDDEN)
        wide = head(t, architecture, states, cast, bias)
        del cast
        logits = op.to(t, wide, "fp32", WIDE_LOGITS)
        del wide
    else:
        logits = head(t, architecture, states, hidden, bias)
    if kind.multiplied or kind.scaled_logits:
        logits = op.scale(t, logits, LOGITS)
    if architecture.logits_softcap:
        logits = op.scale(t, logits, LOGITS)
        logits = op.of_output(t, logits, LOGITS)
        logits = op.scale(t, logits, LOGITS)
    loss = causal_loss(t, logits, ids)
    held = [logits, *routed]
    if routed:
        assert architecture.moe is not None
        held.append(balance(t, routed, architecture.moe.top_k))
        loss = selection.add_in_place(t, loss, op.scale(t, held[-1], BALANCE))
    return loss, held


def head(t: Tape, architecture: Architecture, states: States, hidden: Tensor, bias: Tensor | None) -> Tensor:
    """The head's own weight, or that of the embedding that it is tied to, over the whole sequence."""
    hidden = enter(t, hidden, ())
    if states.head:
        return project(t, hidden, states.head[0], bias, LOGITS)
    table = states.before[0]
    split = table.param.split
    if split:  # logits are gathered, unless the model itself knows a part of the vocabulary alone
        gathers = table.param.shape[0] < architecture.vocab_size
        split = split._replace(how="columns, gathered" if gathers else "columns")
    return product(t, op.linear, hidden, table.original, bias, split, LOGITS)


def decode(
    t: Tape,
    architecture: Architecture,
    states: States,
    layers: list[tuple[Layer, int | None]],
    ids: Tensor,
    request: Request,
    received: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Hidden states of every token, normed, and routers' logits. The embeddings are held to the end; a later stage of
    a pipeline has `received` hidden states instead."""
    kind = kind_of(architecture)
    sequence_parallel.around(t)
    if received is None:
        embedded = embed(t, architecture, states, ids, request)
    else:
        embedded, kind = received, replace(kind, embedding="tokens", scaled="no")
    around = Surroundings(architecture.class_name, kind, request)
    around.dropout = layers[0][0].dropout if layers else Dropout()
    around.positions = t.given[0] if t.given else None
    hidden = embedded
    if kind.embedding == "normed":
        hidden = normalize(t, embedded, (states.before[1].tensor, states.before[2].tensor), "layer")
    if kind.embedding == "late positions":
        surround(t, [layer for layer, _ in layers], around, ids, embedded.dtype)
    if kind.embedding == "counted ones":
        places = counted(t, around, ids)
        surround(t, [layer for layer, _ in layers], around, ids, embedded.dtype)
        shifted = t.new(ids.shape, "int64", None, POSITIONS)
        learned = op.embedding(t, shifted, states.before[1].tensor, EMBEDDED)
        del shifted
        if len(states.before) > 2:
            embedded = hidden = op.linear(t, embedded, states.before[3].tensor, None, EMBEDDED)
        hidden = part_of_sequence(t, op.add(t, embedded, learned, EMBEDDED))
    if kind.embedding in ("positions", "late positions"):
        places = around.positions or positions(t, around, ids)
        places = places if t.given else places.as_((1, ids.shape[1]), (ids.shape[1], 1))
        learned = op.embedding(t, places, states.before[1].tensor, EMBEDDED)
        hidden = part_of_sequence(t, op.add(t, embedded, learned, EMBEDDED))
    if kind.scaled == "after masks":
        masks(t, [layer for layer, _ in layers], around, ids, embedded.dtype)
        embedded = hidden = op.scale(t, embedded, EMBEDDED)
        angles(t, [layer for layer, _ in layers], around, ids, embedded.dtype)
    elif kind.embedding not in ("late positions", "counted ones"):
        surround(t, [layer for layer, _ in layers], around, ids, embedded.dtype)
    if kind.embedding == "late norm":
        hidden = normalize(t, hidden, (), architecture.text.layers[0].norm, kind.norm)
    if received is None:
        hidden = op.dropout(t, hidden, around.dropout.embedding, EMBEDDED)
    held = around.positions
    if not around.packs and kind.counts and kind.masks_know and not kind.masks_first:
        around.positions = None  # layers are not given them
    first = [hidden]
    del hidden  # the first layer's input is nobody's once that layer is done
    hidden = through(t, layers, states.layers, first, around)
    weights = tuple([leaf.tensor for leaf in states.after if leaf.param.kind == "norm"])
    if architecture.final_norm and (weights or kind.norm in ("wide", "no weight")):
        hidden = normalize(t, hidden, weights, architecture.final_norm, kind.norm)
    if kind.embedding == "counted ones" and len(states.before) > 2:
        hidden = op.linear(t, hidden, states.before[2].tensor, None, EMBEDDED)
    around.held = around.ones = None
    used = {getattr(m, "window", None) for layer, _ in layers for m in layer.mixers}
    around.masks = {window: mask for window, mask in around.masks.items() if window in used}
    if not kind.packs:  # checkpoints hold what layers are given
        around.positions = None
    del embedded, held
    return hidden, around.router_logits


def through(
    t: Tape, layers: list[tuple[Layer, int | None]], blocks: list[Blocks], first: list[Tensor], around: Surroundings
) -> Tensor:
    """All layers, one after the other, from what is taken out of `first`."""
    hidden, asked = first.pop(), around.request
    for i, ((layer, segment), leaves) in enumerate(zip(layers, blocks, strict=True)):
        if segment != t.segment:
            t.enter(segment)
        if asked.gradient_checkpointing and i % asked.checkpoint_every == 0:
            hidden = _checkpointed(t, layer, leaves, hidden, around)
        else:
            hidden = _whole(t, layer, leaves, hidden, around)
    t.enter(None)
    return hidden


def embed(t: Tape, architecture: Architecture, states: States, ids: Tensor, request: Request) -> Tensor:
    """The tokens' embeddings; `enable_input_require_grads` where adapters are trained under checkpointing."""
    table, kind = states.before[0], kind_of(architecture)
    whole = kind.embedding in POSITIONED
    embedded = embedding(t, ids, table.tensor, table.param.split, architecture.vocab_size, EMBEDDED, whole)
    if kind.scales_itself:
        if embedded.dtype == request.dtype:
            embedded = op.scale(t, embedded, EMBEDDED)
        else:
            embedded = op.mul(t, embedded, t.new((), embedded.dtype, None, EMBEDDED), EMBEDDED)
    if request.mode != "train" and request.gradient_checkpointing and embedded.node is None:
        embedded.node = Input(embedded)
    if (lora := states.before[0].lora) is not None:
        a, b = (part.tensor for part in lora.leaves)
        place = [embedded]
        del embedded
        embedded = look_up(t, ids, place, a, b, request.dtype if kind.scales_itself else None)
    if kind.scaled == "first" and not kind.scales_itself:
        embedded = op.scale(t, embedded, EMBEDDED)
    return embedded


def _checkpointed(t: Tape, layer: Layer, blocks: Blocks, hidden: Tensor, around: Surroundings) -> Tensor:
    around = around.of(layer)
    if "activations" in around.request.offload:
        return _offloaded(t, layer, blocks, [hidden], around)
    if around.kind.layer == "relative":
        return t.checkpoint(partial(_with_biases, t, layer, blocks, hidden, around, dict(around.biases)))
    return t.checkpoint(lambda: _whole(t, layer, blocks, hidden, around))


def _with_biases(
    t: Tape, layer: Layer, blocks: Blocks, hidden: Tensor, around: Surroundings, given: dict[bool, Tensor]
) -> Tensor:
    """One layer with the biases that it is given; what it makes of them is handed on, but not when it runs again."""
    own = replace(around, biases=dict(given))
    out = _whole(t, layer, blocks, hidden, own)
    if t.redone is None:
        around.biases |= own.biases
    return out


def _offloaded(t: Tape, layer: Layer, blocks: Blocks, place: list[Tensor], around: Surroundings) -> Tensor:
    """A checkpointed layer whose input lies in CPU memory until it is computed again (`save_on_cpu`)."""
    shape, dtype, node = place[0].shape, place[0].dtype, place[0].node
    t.moved[id(blocks)] = (t.segment, place[0].nbytes)

    def run() -> Tensor:
        if not place:
            place.append(t.new(shape, dtype, None, HIDDEN))
            place[0].node = node
        return _whole(t, layer, blocks, place.pop(), around)

    return t.checkpoint(run)


def _whole(t: Tape, layer: Layer, blocks: Blocks, hidden: Tensor, around: Surroundings) -> Tensor:
    """One layer, and what data parallel training does around it."""
    sequence_parallel.around(t)
    if t.units is None:
        return LAYERS[around.kind.layer](t, layer, blocks, hidden, around)
    hidden = t.units.enter(blocks, hidden)
    return t.units.leave(blocks, LAYERS[around.kind.layer](t, layer, blocks, hidden, around))


def run_layer(t: Tape, layer: Layer, blocks: Blocks, hidden: Tensor, around: Surroundings) -> Tensor:
    """One layer over the residual stream."""
    if layer.parallel or layer.streams > 1 or layer.residual_fp32 or layer.keeps:
        raise unknown(f"a layer of {around.class_name}")
    own, code, p = Weights(blocks.own), around.kind.norm, layer.dropout.residual
    parts = len(layer.mixers) + (layer.feed_forward is not None)
    size = len(blocks.own) // (parts * (2 if layer.norm_position == "both" else 1))
    (mixer,), (leaves,) = layer.mixers, blocks.mixers
    feed = layer.feed_forward
    if feed is None or not isinstance(mixer, Attention | LatentAttention | GatedDeltaNet | Mamba1 | Mamba2 | ShortConv):
        raise unknown(f"a layer of {around.class_name}")
    before, after = layer.norm_position != "post", layer.norm_position != "pre"
    residual = hidden
    if before:
        hidden = normalize(t, hidden, own.norm(size), layer.norm, code)
    if isinstance(mixer, LatentAttention):
        hidden, _weights = latent_attention(t, mixer, Weights(leaves), hidden, around)
    else:
        hidden, _weights = mix(t, mixer, Weights(leaves), hidden, around)
    if after:
        hidden = normalize(t, hidden, own.norm(size), layer.norm, code)
    hidden = _joined(t, residual, hidden, 0 if around.kind.drops_inside else p, around)
    residual = hidden
    if before:
        hidden = normalize(t, hidden, own.norm(size), layer.norm, code)
    if isinstance(feed, MixtureOfExperts) and around.kind.shared == "last, flat first":
        _routed, hidden = routed_then_shared(t, feed, blocks.feed_forward, hidden, around)
    elif isinstance(feed, MixtureOfExperts):
        hidden = mixture(t, feed, blocks.feed_forward, hidden, around)
    else:
        hidden = feed_forward(t, feed, Weights(blocks.feed_forward), hidden)
    if after:
        hidden = normalize(t, hidden, own.norm(size), layer.norm, code)
    if around.kind.drops_inside:
        hidden, p = op.dropout(t, hidden, p, DROPPED), 0
    return _joined(t, residual, hidden, p, around)


def one_norm(t: Tape, layer: Layer, blocks: Blocks, hidden: Tensor, around: Surroundings) -> Tensor:
    """Attention and feed-forward over one norm (Phi, Cohere), or one after the other with all of it held (StableLM)."""
    (mixer,), (leaves,) = layer.mixers, blocks.mixers
    if not isinstance(mixer, Attention) or not isinstance(layer.feed_forward, FeedForward):
        raise unknown(f"a layer of {around.class_name}")
    own, code, p = Weights(blocks.own), around.kind.norm, layer.dropout.residual
    size = len(blocks.own) // (1 if layer.parallel else 2)
    feed, sums = Weights(blocks.feed_forward), around.kind.sums
    residual = hidden
    hidden = normalize(t, hidden, own.norm(size), layer.norm, code)
    attended, _weights = attention(t, mixer, Weights(leaves), hidden, around)
    if not layer.parallel:
        residual = op.add(t, residual, attended, HIDDEN)
        norm = own.norm(size)
        fed = feed_forward(t, layer.feed_forward, feed, normalize(t, residual, norm, layer.norm, code))
        fed = op.dropout(t, fed, p, DROPPED)
        return op.add(t, residual, fed, HIDDEN)
    if sums == "branches first":
        attended = op.dropout(t, attended, p, DROPPED)
    fed = op.dropout(t, feed_forward(t, layer.feed_forward, feed, hidden), p, DROPPED)
    if sums == "branches first":
        return op.add(t, op.add(t, attended, fed, HIDDEN), residual, HIDDEN)
    return op.add(t, op.add(t, residual, attended, HIDDEN), fed, HIDDEN)


def _joined(t: Tape, residual: Tensor, branch: Tensor, p: float, around: Surroundings) -> Tensor:
    """The residual and what a branch adds to it."""
    if around.kind.multiplied:
        return op.add(t, residual, op.scale(t, branch, HIDDEN), HIDDEN)
    return op.add(t, residual, op.dropout(t, branch, p, DROPPED), HIDDEN)


LAYERS: Final[dict[str, Callable[[Tape, Layer, Blocks, Tensor, Surroundings], Tensor]]] = {
    "residual": run_layer,
    "held output": gpt.held_output,
    "two branches": gpt.two_branches,
    "with alibi": gpt.with_alibi,
    "one norm": one_norm,
    "flattened": opt.flattened,
    "state space": state_space,
    "norm after": bert.norm_after,
    "plain norm after": bert.plain_norm_after,
    "relative": t5.block,
    "with sinks": gpt_oss.with_sinks,
}


def causal_loss(t: Tape, logits: Tensor, ids: Tensor) -> Tensor:
    """In fp32 over labels that are shifted by a padding, not the logits by a copy."""
    wide = op.to(t, logits, "fp32", WIDE_LOGITS)
    b, s = ids.shape
    if t.given:
        wide = op.reshape(t, wide, -1, wide.shape[-1])
        return op.cross_entropy(t, wide, t.given[1].as_((b * s,), (1,)), LOG_PROBABILITIES)
    padded = t.new((b, s + 1), "int64", None, LABELS)
    labels = padded if b == 1 else t.new((b, s), "int64", None, LABELS)
    wide = op.reshape(t, wide, -1, wide.shape[-1])
    loss = op.cross_entropy(t, wide, labels.as_((b * s,), (1,)), LOG_PROBABILITIES)
    del padded
    return loss
