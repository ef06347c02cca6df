"""Encoder-decoders: the encoder runs once and its output stays, the decoder starts from one token and grows two caches.

b sequences, s tokens of the encoder, h hidden size, e bytes of an element.
Source: transformers 5.17, generation/utils.py, models/t5, bart and whisper (modeling_*.py), cache_utils.py
`EncoderDecoderCache`; checked event by event on the meta device. The workspaces of convolutions are left out.
"""

from dataclasses import replace

from hfvram.memory.blocks import HIDDEN, normalize
from hfvram.memory.forward import Forward
from hfvram.memory.inference import IDS, MASK, forward, layer_width, run_layer, symbols
from hfvram.memory.timeline import Tag, Timeline
from hfvram.memory.workspaces import workspaces
from hfvram.model.architecture import Architecture, Stack

WHISPER = "transformers 5.17: WhisperEncoder.forward"
FEATURES = Tag("features of the sound", "inputs", "b·mels·2·s·e", WHISPER)
CONVOLUTION = Tag("convolutions before the encoder", "activations", "b·2·s·h·e", WHISPER)


def generate(t: Timeline, architecture: Architecture, f: Forward, new_tokens: int) -> None:
    """The encoder over `f.tokens` tokens, then `new_tokens` steps of the decoder, one token each.

    Where the encoder's length is fixed (Whisper), all tokens of the request are the decoder's.
    Of the steps, the first three and the last are written: between them the cache only grows.
    """
    encoder = architecture.stack("encoder")
    steps = new_tokens
    if encoder.tokens:
        steps = max(1, f.tokens + new_tokens - 1)
    caches = prefill(t, architecture, replace(f, static_length=steps if f.static_length else 0))
    source = replace(f, tokens=1, source=encoder.tokens or f.tokens, static_length=steps if f.static_length else 0)
    t.mark("decode")
    for step in sorted(step for step in {1, 2, steps - 1} if 1 <= step < steps):
        forward(t, architecture, replace(source, past=step), caches)
    t.cache_bytes = sum(t.sizes[handle] for cache in caches for handle in cache)


def prefill(t: Timeline, architecture: Architecture, f: Forward) -> list[list[int]]:
    """The encoder, and the decoder's first token, which fills the cross attention's cache. Returns the caches."""
    encode(t, architecture, f)
    source = architecture.stack("encoder").tokens or f.tokens
    caches: list[list[int]] = [[] for _ in architecture.text.layers]
    t.mark("prefill")
    forward(t, architecture, replace(f, tokens=1, source=source), caches)
    t.cache_bytes = sum(t.sizes[handle] for cache in caches for handle in cache)
    return caches


def encode(t: Timeline, architecture: Architecture, f: Forward) -> None:
    """The encoder alone: its output stays."""
    stack = architecture.stack("encoder")
    f = replace(f, tokens=stack.tokens or f.tokens)
    t.symbols = symbols(architecture, f)
    t.mark("encode")
    held, hidden = (_listen if stack.tokens else _read)(t, f, architecture, stack)
    workspaces(t, f, architecture, stack, architecture.text)
    if f.masked and not stack.tokens:
        held.append(t.alloc(f.rows * f.tokens, MASK))
    left: list[int] = []
    for layer in stack.layers:
        out = run_layer(t, f, layer, hidden, left)
        if hidden not in held:
            t.free(hidden)
        hidden = out
    if architecture.final_norm and stack.layers:
        normalize(t, f, layer_width(stack.layers[0]), architecture.final_norm)
        t.free(hidden)
    t.free(*held, *left)


def _read(t: Timeline, f: Forward, architecture: Architecture, stack: Stack) -> tuple[list[int], int]:
    """Token ids and their mask; embeddings and positions are held to the end of the pass, beside their sum."""
    t.alloc(2 * f.rows * 8, IDS)
    embedded = t.alloc(f.bytes(stack.hidden_size), HIDDEN)
    positions = [p for p in stack.before if "embed_positions" in p.name]
    if not positions:
        return [embedded], embedded
    # A table with more rows than positions is looked up with an offset, for each sequence by itself.
    batch = f.batch if positions[0].shape[0] != architecture.max_positions else 1
    held = [embedded, t.alloc(f.bytes(stack.hidden_size) // f.batch * batch, HIDDEN)]
    hidden = t.alloc(f.bytes(stack.hidden_size), HIDDEN)
    if any(p.kind == "norm" for p in stack.before):
        normed = t.alloc(f.bytes(stack.hidden_size), HIDDEN)
        t.free(hidden)
        hidden = normed
    return held, hidden


def _listen(t: Timeline, f: Forward, architecture: Architecture, stack: Stack) -> tuple[list[int], int]:
    """Two convolutions over the spectrogram, the second of which halves its length, and the positions."""
    mels = next(p.shape[1] for p in stack.before if p.kind == "conv")
    nbytes = f.bytes(stack.hidden_size)
    t.alloc(2 * f.bytes(mels), FEATURES)
    first, active = t.alloc(2 * nbytes, CONVOLUTION), t.alloc(2 * nbytes, CONVOLUTION)
    t.free(first)
    second, embedded = t.alloc(nbytes, CONVOLUTION), t.alloc(nbytes, HIDDEN)
    t.free(second, active)
    positions, hidden = t.alloc(nbytes // f.batch, HIDDEN), t.alloc(nbytes, HIDDEN)
    t.free(positions)
    return [embedded], hidden
