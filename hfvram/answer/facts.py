"""Headline facts of a model, and its figures by the guide's rule of thumb."""

from hfvram.answer import guide
from hfvram.answer.estimate import Item, ModelFacts
from hfvram.model.identify import Model
from hfvram.model.layers import GatedDeltaNet, LatentAttention, Mamba1, Mamba2
from hfvram.request import Request


def facts(model: Model) -> ModelFacts:
    """What an answer says of the model; a figure that does not apply is None."""
    a, checkpoint = model.architecture, model.checkpoint
    attention, moe = a.attention, a.moe
    mixers = [m for layer in a.text.layers for m in layer.mixers]
    latent = next((m for m in mixers if isinstance(m, LatentAttention)), None)
    state = next((m for m in mixers if isinstance(m, (Mamba1, Mamba2, GatedDeltaNet))), None)
    heads = attention or latent
    return ModelFacts(
        id=checkpoint.id,
        commit=checkpoint.commit,
        source=checkpoint.source,
        architecture=a.class_name,
        model_type=a.model_type,
        parameters=model.parameters,
        active_parameters=model.parameters - (a.parameters - a.active_parameters),
        trainable_parameters=0,
        parameters_from=model.parameters_from,
        dtype=a.dtype,
        layers=len(a.text.layers),
        hidden_size=a.hidden_size,
        attention_heads=heads.heads if heads else None,
        kv_heads=attention.kv_heads if attention else latent.heads if latent else None,
        head_dim=attention.head_dim if attention else latent.head_dim if latent else None,
        experts=moe.experts if moe else None,
        experts_per_token=moe.top_k if moe else None,
        state_size=(state.key_dim if isinstance(state, GatedDeltaNet) else state.d_state) if state else None,
        layer_kinds=a.layer_kinds,
    )


def guide_items(model: Model, request: Request) -> tuple[Item, ...]:
    """Weights and cache as the guide's rule has them."""
    told = facts(model)
    if request.mode != "inference":
        return guide.training_items(
            model.parameters,
            batch=request.batch,
            ctx=request.ctx or 1,
            layers=told.layers,
            hidden_size=told.hidden_size,
            heads=told.attention_heads,
            mode=request.mode,
            rank=request.lora_r,
        )
    mixers = (m for layer in model.architecture.text.layers for m in layer.mixers)
    mamba = next((m for m in mixers if isinstance(m, (Mamba1, Mamba2))), None)
    offloaded = "experts" in request.offload
    return guide.inference_items(
        told.active_parameters if offloaded else model.parameters,
        batch=request.batch,
        ctx=request.ctx or 1,
        layers=told.layers,
        heads=told.attention_heads if request.phase != "encode" else None,
        head_dim=told.head_dim,
        d_state=mamba.d_state if mamba else None,
        d_inner=mamba.d_inner if mamba else None,
        offloaded=offloaded,
    )
