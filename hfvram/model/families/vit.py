"""Vision transformers over patches: ViT, DeiT, YOLOS, DINOv2.

Source: transformers 5.17, models/{vit, deit, yolos, dinov2}/modeling_*.py and configuration_*.py.
"""

from collections.abc import Callable
from dataclasses import replace

from hfvram.errors import HfvramError
from hfvram.model.architecture import Architecture, Stack
from hfvram.model.config import Config
from hfvram.model.families.blocks import convolution, mlp, others
from hfvram.model.families.common import class_and_end, num_labels
from hfvram.model.families.defaults import known
from hfvram.model.families.encoder import encoder, encoder_layer, self_attention
from hfvram.model.layers import Attention, FeedForward, Layer, Param, linear, norm

NAMES = {"vit": "ViT", "deit": "DeiT", "yolos": "Yolos", "dinov2": "Dinov2"}
CLASSES = {
    "vit": ("Model", "ForImageClassification"),
    "deit": ("Model", "ForImageClassification", "ForImageClassificationWithTeacher"),
    "yolos": ("Model", "ForObjectDetection"),
    "dinov2": ("Model", "ForImageClassification"),
}


def read(config: Config, class_name: str | None) -> Architecture:
    config = known(config)
    kind = config.model_type
    class_name, end = class_and_end(config, class_name, NAMES[kind], CLASSES[kind])
    bare, hidden = end == "Model", config.size("hidden_size")
    prefix = "" if bare else {"yolos": "vit."}.get(kind, f"{kind}.")
    height, width = pair(config, "image_size")
    before, tokens = embeddings(config, f"{prefix}embeddings", hidden)
    block = dinov2_layer(config, hidden) if kind == "dinov2" else layer(config, hidden)
    depth = config.layers("num_hidden_layers")
    pooled = config.size("pooler_output_size", default=hidden) if kind in ("vit", "deit") else hidden
    pooler = linear(f"{prefix}pooler.dense", hidden, pooled, bias=True) if bare and kind != "dinov2" else ()
    middle = config.flag("use_mid_position_embeddings") if kind == "yolos" else False
    stack = Stack(
        name="vision",
        prefix=f"{prefix}encoder.layer" if kind in ("yolos", "dinov2") else f"{prefix}layers",
        hidden_size=hidden,
        before=before,
        layers=(block,) * depth,
        after=(middle_positions(config, f"{prefix}encoder", depth, hidden) if middle else ())
        + norm(f"{prefix}layernorm", hidden, bias=True)
        + pooler,
        tokens=tokens,
        pixels=config.size("num_channels") * height * width,
    )
    top = () if bare else heads(config, end, hidden)
    return encoder(config, class_name, stack, top, final_norm="layer", max_positions=None, vocab_size=1)


def pair(config: Config, name: str) -> tuple[int, int]:
    """Height and width, given as one number or two."""
    value = config.get(name)
    both = list(value) if isinstance(value, (list, tuple)) else [value, value]
    if len(both) != 2:
        raise HfvramError("bad_config", f"config.json: {name} is neither a number nor a pair")
    return Config({name: both[0]}).size(name), Config({name: both[1]}).size(name)


def embeddings(config: Config, name: str, hidden: int) -> tuple[tuple[Param, ...], int]:
    """Patches, the tokens before them, a position for each; and how many tokens that makes."""
    (height, width), (tall, wide) = pair(config, "image_size"), pair(config, "patch_size")
    kind, patches = config.model_type, (height // tall) * (width // wide)
    own = {"cls_token": (1, 1, hidden)}
    tokens = patches + 1
    if kind == "deit":
        own["distillation_token"], tokens = (1, 1, hidden), tokens + 1
    if kind == "yolos":
        detections = config.size("num_detection_tokens")
        own["detection_tokens"], tokens = (1, detections, hidden), tokens + detections
    masks = {"mask_token": (1, hidden)} if kind == "dinov2" and config.flag("use_mask_token", default=True) else {}
    shapes: dict[str, tuple[int, ...]] = {**own, **masks, "position_embeddings": (1, tokens, hidden)}
    channels = config.size("num_channels")
    projection = convolution(f"{name}.patch_embeddings.projection", hidden, channels, tall, wide)
    return others(name, shapes) + projection, tokens


def middle_positions(config: Config, name: str, depth: int, hidden: int) -> tuple[Param, ...]:
    """YOLOS adds positions before every layer but the first; a patch's height counts for both of its sides."""
    height, width = pair(config, "image_size")
    tokens = 1 + height * width // config.size("patch_size") ** 2 + config.size("num_detection_tokens")
    return (Param(f"{name}.mid_position_embeddings", (max(depth - 1, 0), 1, tokens, hidden), "other"),)


INNER = ("attention.query", "attention.key", "attention.value", "output.dense")


def scores(config: Config, hidden: int, projections: tuple[str, str, str, str]) -> Attention:
    bias = config.flag("qkv_bias", default=True)
    return self_attention(config, "attention", hidden, projections, bias=bias, out_bias=True)


def layer(config: Config, hidden: int) -> Layer:
    """ViT's layer, under BERT's names in YOLOS."""
    old = config.model_type == "yolos"
    names = INNER if old else ("q_proj", "k_proj", "v_proj", "o_proj")
    up, down = ("intermediate.dense", "output.dense") if old else ("mlp.fc1", "mlp.fc2")
    activation = config.text("hidden_act", default="gelu")
    feed = mlp(up, down, hidden, config.size("intermediate_size"), activation)
    block = encoder_layer(scores(config, hidden, names), feed, "layernorm_before", "layernorm_after")
    return replace(block, keeps="mixed and normed") if old else block


def dinov2_layer(config: Config, hidden: int) -> Layer:
    """Each part is scaled by a learned vector; the feed-forward may be gated (SwiGLU), two thirds as wide."""
    scaled = int(hidden * config.number("mlp_ratio", default=4))
    width = Config({"mlp_ratio": scaled}).size("mlp_ratio")
    feed = mlp("mlp.fc1", "mlp.fc2", hidden, width, config.text("hidden_act", default="gelu"))
    if config.flag("use_swiglu_ffn"):
        width = (int(width * 2 / 3) + 7) // 8 * 8
        feed = FeedForward(
            hidden_size=hidden,
            intermediate_size=width,
            gated=True,
            activation="silu",
            fused_gate_up=True,
            params=linear("mlp.weights_in", hidden, 2 * width, True) + linear("mlp.weights_out", width, hidden, True),
        )
    scales = others("", {"layer_scale1.lambda1": (hidden,), "layer_scale2.lambda1": (hidden,)})
    return encoder_layer(scores(config, hidden, INNER), feed, "norm1", "norm2", extra=scales)


def heads(config: Config, end: str, hidden: int) -> tuple[Param, ...]:
    """Classes of the image, or of YOLOS' objects with their boxes."""
    labels = num_labels(config)

    def one(name: str, inputs: int = hidden) -> tuple[Param, ...]:
        return linear(name, inputs, labels, bias=True, kind="head")

    def three(name: str, outputs: int) -> tuple[Param, ...]:
        inner = linear(f"{name}.layers.0", hidden, hidden, True) + linear(f"{name}.layers.1", hidden, hidden, True)
        return inner + linear(f"{name}.layers.2", hidden, outputs, bias=True, kind="head")

    made: dict[str, Callable[[], tuple[Param, ...]]] = {
        "ForObjectDetection": lambda: three("class_labels_classifier", labels + 1) + three("bbox_predictor", 4),
        "ForImageClassificationWithTeacher": lambda: one("cls_classifier") + one("distillation_classifier"),
        "ForImageClassification": lambda: one("classifier", 2 * hidden if config.model_type == "dinov2" else hidden),
    }
    return made[end]()
