"""A decoder's forward pass with gradients: embedding, layers, norm, logits and loss.

Source: transformers 5.17, models/llama/modeling_llama.py, loss/loss_utils.py `ForCausalLMLoss`.
"""

from hfvram.memory.timeline import Tag
from hfvram.memory.training import operators as op
from hfvram.memory.training.attention import attention
from hfvram.memory.training.blocks import HIDDEN, normalize, unknown
from hfvram.memory.training.feed_forward import feed_forward
from hfvram.memory.training.states import Blocks, States, Weights
from hfvram.memory.training.surroundings import Surroundings, surround
from hfvram.memory.training.tape import Tape
from hfvram.memory.training.tensors import Tensor
from hfvram.model.architecture import Architecture
from hfvram.model.layers import Attention, FeedForward, Layer
from hfvram.request import Request

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
) -> tuple[Tensor, Tensor]:
    """One pass with labels. Returns the loss and the logits, which the model's output holds."""
    hidden = decode(t, architecture, states, layers, ids, request)
    table = states.head[0].tensor if states.head else states.before[0].tensor
    bias = states.head[1].tensor if len(states.head) > 1 else None
    logits = op.linear(t, hidden, table, bias, LOGITS)
    return causal_loss(t, logits, ids), logits


def decode(
    t: Tape,
    architecture: Architecture,
    states: States,
    layers: list[tuple[Layer, int | None]],
    ids: Tensor,
    request: Request,
) -> Tensor:
    """Hidden states of every token, normed. The embeddings are held to the end."""
    embedded = op.embedding(t, ids, states.before[0].tensor, EMBEDDED)
    around = Surroundings(architecture.class_name, request.attention, ids.shape[0], ids.shape[1])
    around.positions = _positions(t, around)
    surround(t, [layer for layer, _ in layers], around, embedded.dtype)
    hidden = embedded
    for (layer, segment), blocks in zip(layers, states.layers, strict=True):
        if segment != t.segment:
            t.enter(segment)
        if request.gradient_checkpointing:
            hidden = _checkpointed(t, layer, blocks, hidden, around)
        else:
            hidden = run_layer(t, layer, blocks, hidden, around)
    t.enter(None)
    if architecture.final_norm:
        weights = tuple([leaf.tensor for leaf in states.after if leaf.param.kind == "norm"])
        hidden = normalize(t, hidden, weights, architecture.final_norm)
    del embedded
    return hidden


def _checkpointed(t: Tape, layer: Layer, blocks: Blocks, hidden: Tensor, around: Surroundings) -> Tensor:
    return t.checkpoint(lambda: run_layer(t, layer, blocks, hidden, around))


def _positions(t: Tape, around: Surroundings) -> Tensor:
    """Counted once, and looked through for sequences that are packed into one."""
    b, s = around.batch, around.tokens
    count = t.new((s,), "int64", None, LABELS)
    positions = t.new((s,), "int64", None, LABELS)
    del count
    before = t.new((b, 1), "int64")
    joined = t.new((b, s + 1), "int64")
    steps = t.new((b, s), "int64")
    del joined
    starts = t.new((b, s), "bool")
    packed = t.new((b, s), "int64")
    del starts
    t.timeline.free(t.timeline.alloc(b, LABELS), t.timeline.alloc(1, LABELS))
    del before, steps, packed
    return positions


def run_layer(t: Tape, layer: Layer, blocks: Blocks, hidden: Tensor, around: Surroundings) -> Tensor:
    """One layer over the residual stream."""
    if layer.parallel or layer.norm_position != "pre" or layer.streams > 1 or layer.residual_fp32 or layer.keeps:
        raise unknown(f"a layer of {around.class_name}")
    own = Weights(blocks.own)
    size = len(blocks.own) // (len(layer.mixers) + (layer.feed_forward is not None))
    for mixer, leaves in zip(layer.mixers, blocks.mixers, strict=True):
        if not isinstance(mixer, Attention):
            raise unknown(f"{mixer.kind} of {around.class_name}")
        residual = hidden
        hidden = normalize(t, hidden, tuple([own.take() for _ in range(size)]), layer.norm)
        hidden = attention(t, mixer, Weights(leaves), hidden, around)
        hidden = op.add(t, residual, hidden, HIDDEN)
    feed = layer.feed_forward
    if feed is not None:
        if not isinstance(feed, FeedForward):
            raise unknown(f"a mixture of experts of {around.class_name}")
        residual = hidden
        hidden = normalize(t, hidden, tuple([own.take() for _ in range(size)]), layer.norm)
        hidden = feed_forward(t, feed, Weights(blocks.feed_forward), hidden)
        hidden = op.add(t, residual, hidden, HIDDEN)
    return hidden


def causal_loss(t: Tape, logits: Tensor, ids: Tensor) -> Tensor:
    """In fp32 over labels that are shifted by a padding, not the logits by a copy."""
    wide = op.to(t, logits, "fp32", WIDE_LOGITS)
    b, s = ids.shape
    padded = t.new((b, s + 1), "int64", None, LABELS)
    labels = padded if b == 1 else t.new((b, s), "int64", None, LABELS)
    wide = op.reshape(t, wide, -1, wide.shape[-1])
    loss = op.cross_entropy(t, wide, labels.as_((b * s,), (1,)), LOG_PROBABILITIES)
    del padded
    return loss
