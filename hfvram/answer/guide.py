"""The guide's rule of thumb for inference, as people quote it, so that its error is visible beside the true figure.

`2P + 2·b·s·layers·d_head·n_head` with 2 bytes an element of cache; `2·P_active` in place of 2P for a mixture of experts
whose experts are offloaded; a constant state of `d_state·d_inner` a layer for Mamba. What is wrong with it: P counts 2
bytes whatever the dtype; every head is cached, though models keep fewer KV heads, a latent or a window; every layer
counts as attention in a hybrid; nothing is said of activations, logits, the allocator or the CUDA context; Mamba's
state comes without its convolution, once for the whole batch, and at 2 bytes though it is often fp32; nothing is said
of what experts need that come and go.
"""

from hfvram.answer.estimate import Item, RuleOfThumb
from hfvram.memory.timeline import Category

SOURCE = "the guide's rule of thumb (docs/guide.md)"


def inference_items(
    parameters: int,
    *,
    batch: int,
    ctx: int,
    layers: int,
    heads: int | None = None,
    head_dim: int | None = None,
    d_state: int | None = None,
    d_inner: int | None = None,
    offloaded: bool = False,
) -> tuple[Item, ...]:
    """Weights and cache in bytes as the rule has them, from sizes alone.

    Without heads a model with `d_state` and `d_inner` counts as Mamba, one with neither keeps nothing. `parameters`
    are the active ones where experts are `offloaded`. Source: the guide, sections 2 to 4.

    >>> [i.bytes for i in inference_items(7 * 10**9, batch=1, ctx=4096, layers=32, heads=32, head_dim=128)]
    [14000000000, 2147483648]
    >>> [i.bytes for i in inference_items(130 * 10**6, batch=1, ctx=4096, layers=24, d_state=16, d_inner=1536)]
    [260000000, 1179648]
    """
    name = "P_active" if offloaded else "P"
    weights = Item(
        name="weights",
        category="weights",
        bytes=2 * parameters,
        formula=f"2{name} = 2 × {parameters:,}",
        source=SOURCE,
        certainty="guess",
    )
    if heads and head_dim:
        cache = 2 * (2 * batch * ctx * layers * head_dim * heads)
        formula = f"2·b·s·layers·d_head·n_head × 2 B = 2 × {batch} × {ctx:,} × {layers} × {head_dim} × {heads} × 2 B"
    elif d_state and d_inner:
        cache = 2 * layers * d_state * d_inner
        formula = f"layers·d_state·d_inner × 2 B = {layers} × {d_state} × {d_inner:,} × 2 B"
    else:
        return (weights,)
    state = Item(name="cache", category="cache", bytes=cache, formula=formula, source=SOURCE, certainty="guess")
    return weights, state


def training_items(
    parameters: int, *, batch: int, ctx: int, layers: int, hidden_size: int, heads: int | None, mode: str, rank: int
) -> tuple[Item, ...]:
    """Weights, states and activations in bytes as the rule has them; LoRA as the base model and `2·r·d·k`, as quoted.

    What is wrong with it: AdamW with an fp32 master copy is 12 bytes a parameter, not 4; the activations are one
    layer's of Korthikanti et al. (arXiv 2205.05198), so they are counted for each of the layers here; nothing is said
    of logits, flash attention or checkpointing; LoRA's term counts one matrix, and no activations.
    Source: the guide, sections 2 and 3.

    >>> sizes = {"batch": 1, "ctx": 2048, "layers": 32, "hidden_size": 4096, "heads": 32}
    >>> [i.bytes for i in training_items(7 * 10**9, **sizes, mode="train", rank=8)]
    [14000000000, 28000000000, 14000000000, 30601641984]
    """

    def item(name: str, category: Category, size: int, formula: str) -> Item:
        return Item(name=name, category=category, bytes=size, formula=formula, source=SOURCE, certainty="guess")

    weights = item("weights", "weights", 2 * parameters, f"2P = 2 × {parameters:,}")
    if mode != "train":
        pairs = 2 * rank * hidden_size
        return weights, item("LoRA", "weights", pairs, f"2·r·d·k = 2 × {rank} × {hidden_size:,} × 1")
    layer = batch * ctx * hidden_size * 34 + 5 * (heads or 0) * batch * ctx * ctx
    sizes = f"{layers} × {batch} × {ctx:,} × {hidden_size:,} × (34 + 5 × {heads or 0} × {ctx:,} / {hidden_size:,})"
    return (
        weights,
        item("optimizer", "optimizer", 4 * parameters, f"4P = 4 × {parameters:,}"),
        item("gradients", "gradients", 2 * parameters, f"2P = 2 × {parameters:,}"),
        item("activations", "activations", layers * layer, f"L·b·s·h·(34 + 5·a·s/h) = {sizes}"),
    )


def rule(items: tuple[Item, ...]) -> RuleOfThumb:
    """The items as one figure and one formula.

    >>> rule(inference_items(1000, batch=1, ctx=2, layers=3, heads=4, head_dim=5))
    RuleOfThumb(bytes=2480, formula='2P + 2·b·s·layers·d_head·n_head × 2 B')
    """
    return RuleOfThumb(
        bytes=sum(i.bytes for i in items), formula=" + ".join(i.formula.partition(" = ")[0] for i in items)
    )
