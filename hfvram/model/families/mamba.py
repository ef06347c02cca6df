"""Mamba, Falcon-Mamba and Mamba-2: every layer a state space, without attention or feed-forward.

Source: transformers 5.17, models/{mamba, falcon_mamba, mamba2}/modeling_*.py and configuration_*.py.
"""

from hfvram.errors import HfvramError
from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families.blocks import embedding
from hfvram.model.families.common import architecture_class, causal_head, dtype_of
from hfvram.model.families.recurrent import dt_rank, mamba1, mamba2
from hfvram.model.layers import Layer, Mamba1, Mamba2, norm

CLASSES = {"mamba": "Mamba", "falcon_mamba": "FalconMamba", "mamba2": "Mamba2"}


def read(config: Config, class_name: str | None) -> Architecture:
    kind = config.model_type
    hidden = config.size("hidden_size", default=4096 if kind == "mamba2" else 768)
    vocab = config.size("vocab_size", default=32768 if kind == "mamba2" else 50280)
    class_name = architecture_class(config, class_name, f"{CLASSES[kind]}ForCausalLM")
    head, tied, prefix = causal_head(config, class_name, hidden, vocab, tied_by_default=kind != "mamba2")
    prefix = "backbone." if prefix else ""
    layers = config.layers("num_hidden_layers", default=64 if kind == "mamba2" else 32)
    mixer: Mamba1 | Mamba2 = state_space_2(config, hidden) if kind == "mamba2" else state_space(config, hidden)
    stack = Stack(
        name="text",
        prefix=f"{prefix}layers",
        hidden_size=hidden,
        before=embedding(f"{prefix}embeddings", vocab, hidden),
        layers=(Layer(mixers=(mixer,), params=norm("norm", hidden)),) * layers,
        after=norm(f"{prefix}norm_f", hidden),
    )
    return Architecture(
        model_type=kind,
        class_name=class_name,
        task="causal",
        stacks=(stack,),
        main="text",
        vocab_size=vocab,
        hidden_size=hidden,
        max_positions=None,
        dtype=dtype_of(config),
        head=head,
        tied_head=tied,
    )


def state_space(config: Config, hidden: int) -> Mamba1:
    """Mamba-1. An `intermediate_size` wins over `expand` (Falcon-Mamba-7B says 8192 and 16 · 4096)."""
    return mamba1(
        "mixer",
        hidden,
        config.size("intermediate_size", default=config.size("expand", default=2) * hidden),
        config.size("state_size", default=16),
        config.size("conv_kernel", default=4),
        dt_rank(config, "time_step_rank", hidden),
        bias=config.flag("use_bias"),
        conv_bias=config.flag("use_conv_bias", default=True),
        norms="bare" if config.model_type == "falcon_mamba" else None,
    )


def state_space_2(config: Config, hidden: int) -> Mamba2:
    """Mamba-2, whose heads must make up `expand` · hidden."""
    heads, head_dim = config.size("num_heads", default=128), config.size("head_dim", default=64)
    if heads * head_dim != config.size("expand", default=2) * hidden:
        raise HfvramError("bad_config", f"config.json: {heads} heads of {head_dim} are not expand × hidden_size {hidden}")
    return mamba2(
        "mixer",
        hidden,
        heads,
        head_dim,
        config.size("state_size", default=128),
        config.size("n_groups", default=8),
        config.size("conv_kernel", default=4),
        config.size("chunk_size", default=256),
        bias=config.flag("use_bias"),
        conv_bias=config.flag("use_conv_bias", default=True),
    )
