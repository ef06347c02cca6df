"""What several families share: classes and heads, windows of layers, dtypes."""

from collections.abc import Sequence

from hfvram.errors import HfvramError, printable
from hfvram.model.config import Config
from hfvram.model.layers import Dropout, Param, Rotary, linear

DTYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "float": "fp32",
    "float64": "fp32",
}


def dtype_of(config: Config) -> str:
    """The dtype that the checkpoint says it is in, fp32 where it says nothing (as `from_pretrained(dtype="auto")`)."""
    text = config.text("dtype", "torch_dtype", default="")
    if not text and (nested := config.section("text_config", "llm_config", "thinker_config")):
        return dtype_of(nested)
    return DTYPES.get(text.removeprefix("torch."), "fp32")


def max_positions(config: Config) -> int | None:
    """Tokens that the model was made for."""
    high = 1 << 40
    names = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")
    size = config.size(*names, default=0, low=-1, high=high)
    return size if size > 0 else None


def class_and_end(config: Config, asked: str | None, family: str, ends: Sequence[str]) -> tuple[str, str]:
    """The class to build, and its name without the family's: the one asked for, else the first of `architectures` that
    is the family's, else that with the first of `ends`. Raises `unknown_architecture` for another end than those."""
    named = [asked] if asked else config.strings("architectures") or []
    class_name = next((n for n in named if n.startswith(family)), asked or f"{family}{ends[0]}")
    if (end := class_name.removeprefix(family)) not in ends:
        what = f"the class {printable(class_name, 60)!r} of {config.model_type}"
        raise HfvramError("unknown_architecture", f"{what} is not known")
    return class_name, end


def causal_head(
    config: Config, class_name: str, hidden: int, vocab: int, bias: bool = False, token_head: str = "score"
) -> tuple[tuple[Param, ...], bool]:
    """Head of a decoder's class: its parameters, and whether it is tied to the embedding.

    `…ForCausalLM` and `…LMHeadModel` have `lm_head`, tied or not; `…ForSequenceClassification` a `score` of
    `num_labels`, `…ForTokenClassification` a `token_head`; a bare `…Model` has none.
    """
    if class_name.endswith("ForSequenceClassification"):
        return linear("score", hidden, num_labels(config), kind="head"), False
    if class_name.endswith("ForTokenClassification"):
        return linear(token_head, hidden, num_labels(config), True, kind="head"), False
    if class_name.endswith("ForQuestionAnswering"):
        return linear("qa_outputs", hidden, 2, True, kind="head"), False
    if class_name.endswith("Model") and not class_name.endswith("LMHeadModel"):
        return (), False
    tied = config.flag("tie_word_embeddings")
    weight = () if tied else (Param("lm_head.weight", (vocab, hidden), "head"),)
    return weight + ((Param("lm_head.bias", (vocab,), "bias"),) if bias else ()), tied


def num_labels(config: Config) -> int:
    """Classes of a classifier: `num_labels`, else the entries of `id2label`, else 2."""
    labels = config.section("id2label")
    return config.size("num_labels", default=len(labels.values) if labels else 2)


def head_sizes(config: Config, hidden: int) -> tuple[int, int, int]:
    """Attention heads, KV heads, and head size: `head_dim` where the configuration gives one, else hidden ÷ heads."""
    heads = config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads", default=heads)
    head_dim = config.size("head_dim", default=0, low=0) or config.divided("hidden_size", hidden, heads)
    if heads % kv_heads:
        raise HfvramError("bad_config", f"config.json: {heads} attention heads can't share {kv_heads} KV heads")
    return heads, kv_heads, head_dim


def rotary(config: Config, head_dim: int, default_factor: float = 1.0) -> Rotary:
    """Rotary positions over `partial_rotary_factor` of the head."""
    parameters = config.section("rope_parameters", "rope_scaling") or Config({})
    factor = parameters.number("partial_rotary_factor", default=0.0)
    factor = factor or config.number("partial_rotary_factor", "rotary_pct", default=default_factor)
    if not 0 < factor <= 1:
        raise HfvramError("bad_config", f"config.json: partial_rotary_factor is {factor}, not between 0 and 1")
    return Rotary(dim=int(head_dim * factor))


KINDS = ("full_attention", "sliding_attention", "chunked_attention")


def layer_kinds(config: Config, layers: int, known: tuple[str, ...] = KINDS) -> list[str] | None:
    """`layer_types` where the configuration has it, of the right length and of kinds that the family knows."""
    kinds = config.strings("layer_types")
    if kinds is None:
        return None
    if len(kinds) < layers:
        raise HfvramError("bad_config", f"config.json: layer_types names {len(kinds)} layers of {layers}")
    for kind in kinds[:layers]:
        if kind not in known:
            what = f"layer kind {printable(kind, 40)!r} of {config.model_type}"
            raise HfvramError("unknown_architecture", f"{what} is not known")
    return kinds[:layers]


def dropout_of(config: Config) -> Dropout:
    """The shares that are dropped while training, by the names that the families have for them."""
    embedding = config.number("embd_pdrop", "embed_pdrop", "embedding_dropout", default=0.0)
    attention = config.number("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", default=0.0)
    residual = config.number(
        "resid_pdrop",
        "residual_dropout",
        "hidden_dropout",
        "hidden_dropout_prob",
        "dropout_rate",
        "dropout",
        default=0.0,
    )
    return Dropout(embedding, attention, residual)
