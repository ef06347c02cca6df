"""Whisper: an encoder over 30 seconds of sound, always of the same length, and a decoder of text.

Source: transformers 5.17, models/whisper/modeling_whisper.py and configuration_whisper.py.
"""

from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families import bart
from hfvram.model.families.blocks import convolution, embedding
from hfvram.model.families.common import class_and_end, dtype_of
from hfvram.model.families.defaults import known
from hfvram.model.layers import Layer, linear, norm


def read(config: Config, class_name: str | None) -> Architecture:
    config = known(config)
    class_name, end = class_and_end(config, class_name, "Whisper", ("ForConditionalGeneration", "Model"))
    generates = end != "Model"
    prefix, tied = "model." if generates else "", generates and config.flag("tie_word_embeddings", default=True)
    hidden, vocab = config.size("d_model", "hidden_size"), config.size("vocab_size")
    targets = config.size("max_target_positions")
    decoder = Stack(
        name="decoder",
        prefix=f"{prefix}decoder.layers",
        hidden_size=hidden,
        before=embedding(f"{prefix}decoder.embed_tokens", vocab, hidden)
        + embedding(f"{prefix}decoder.embed_positions", targets, hidden),
        layers=(layer(config, "decoder", hidden),) * config.layers("decoder_layers"),
        after=norm(f"{prefix}decoder.layer_norm", hidden, bias=True),
    )
    return Architecture(
        model_type="whisper",
        class_name=class_name,
        task="seq2seq",
        stacks=(encoder(config, f"{prefix}encoder", hidden), decoder),
        main="decoder",
        vocab_size=vocab,
        hidden_size=hidden,
        max_positions=targets,
        dtype=dtype_of(config),
        head=linear("proj_out", hidden, vocab, kind="head") if generates and not tied else (),
        tied_head=tied,
        logits_of_all_tokens=True,
        final_norm="layer",
    )


def encoder(config: Config, path: str, hidden: int) -> Stack:
    """Two convolutions over the spectrogram, the second of which halves its length, before the layers."""
    frames = config.size("max_source_positions")
    return Stack(
        name="encoder",
        prefix=f"{path}.layers",
        hidden_size=hidden,
        before=convolution(f"{path}.conv1", hidden, config.size("num_mel_bins"), 3)
        + convolution(f"{path}.conv2", hidden, hidden, 3)
        + embedding(f"{path}.embed_positions", frames, hidden),
        layers=(layer(config, "encoder", hidden),) * config.layers("encoder_layers"),
        after=norm(f"{path}.layer_norm", hidden, bias=True),
        tokens=frames,
    )


def layer(config: Config, side: str, hidden: int) -> Layer:
    """BART's, with the norms before each part; keys have no bias."""
    return bart.layer(config, side, hidden, pre_norm=True, key_bias=False)
