"""Mamba, Falcon-Mamba and Mamba-2: every layer a state space, without attention or feed-forward.

Source: transformers 5.17, models/{mamba, falcon_mamba, mamba2}/modeling_*.py and configuration_*.py.
"""

from hfvram.errors import HfvramError
from hfvram.model.architecture import Architecture
from hfvram.model.config import Config
from hfvram.model.families.decoder import decoder
from hfvram.model.families.defaults import known
from hfvram.model.families.recurrent import dt_rank, mamba1, mamba2
from hfvram.model.layers import Layer, Mamba1, Mamba2, norm


def read(config: Config, class_name: str | None) -> Architecture:
    config = known(config)
    hidden = config.size("hidden_size")
    mixer = state_space_2(config, hidden) if config.model_type == "mamba2" else state_space(config, hidden)
    layer = Layer(
        mixers=(mixer,), residual_fp32=config.flag("residual_in_fp32", default=True), params=norm("norm", hidden)
    )
    layers = (layer,) * config.layers("num_hidden_layers")
    return decoder(config, class_name, layers, embed="embeddings", final="norm_f")


def state_space(config: Config, hidden: int) -> Mamba1:
    """Mamba-1. An `intermediate_size` wins over `expand` (Falcon-Mamba-7B says 8192 and 16 · 4096)."""
    return mamba1(
        "mixer",
        hidden,
        config.size("intermediate_size", default=config.size("expand") * hidden),
        config.size("state_size"),
        config.size("conv_kernel"),
        dt_rank(config, "time_step_rank", hidden),
        bias=config.flag("use_bias"),
        conv_bias=config.flag("use_conv_bias"),
        norms="bare" if config.model_type == "falcon_mamba" else None,
        mask_of_ones=True,
    )


def state_space_2(config: Config, hidden: int) -> Mamba2:
    """Mamba-2, whose heads must make up `expand` · hidden."""
    heads, head_dim = config.size("num_heads"), config.size("head_dim")
    if heads * head_dim != config.size("expand") * hidden:
        raise HfvramError(
            "bad_config", f"config.json: {heads} heads of {head_dim} are not expand × hidden_size {hidden}"
        )
    return mamba2(
        "mixer",
        hidden,
        heads,
        head_dim,
        config.size("state_size"),
        config.size("n_groups"),
        config.size("conv_kernel"),
        config.size("chunk_size"),
        bias=config.flag("use_bias"),
        conv_bias=config.flag("use_conv_bias"),
    )
