"""`Architecture`: what a model is made of, as the `memory` room needs it. It says nothing of requests or bytes."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from hfvram.model.layers import Attention, Layer, MixtureOfExperts, Param
from hfvram.model.packing import Scheme

Task = Literal["causal", "seq2seq", "encoder"]
Counted = Literal["headers", "closed form", "meta device", "catalogue"]


@dataclass(frozen=True)
class Stack:
    """A tower: the text decoder, an encoder, a vision or audio tower. `before` and `after` its layers stand embeddings,
    norms, projectors. Layers of one shape are one object repeated, with names relative to the layer."""

    name: str
    layers: tuple[Layer, ...]
    prefix: str = ""
    """Module path of layer i is `{prefix}.{i}`."""
    before: tuple[Param, ...] = ()
    after: tuple[Param, ...] = ()
    hidden_size: int = 0
    repeated: frozenset[int] = frozenset()
    """Indices of layers whose weights are an earlier layer's (ALBERT, Zamba2): they run, but own no parameter."""
    tokens: int | None = None
    """Tokens that it sees whatever the prompt: an image's patches, Whisper's frames; None for the prompt's own."""
    pixels: int = 0
    """Numbers of the image that it is given: channels × height × width; 0 where it reads something else."""

    def params(self) -> Iterator[Param]:
        """All of its tensors, named in full, in the order in which transformers builds them."""
        yield from self.before
        for i, layer in enumerate(self.layers):
            if i not in self.repeated:
                for p in layer.all_params():
                    name = f"{self.prefix}.{i}.{p.name}" if self.prefix else p.name
                    yield Param(name, p.shape, p.kind, p.dtype, p.split)
        yield from self.after


@dataclass(frozen=True, eq=False)
class Architecture:
    """A model: stacks in the order in which they are built, the main one (`text`) by name, and the head."""

    model_type: str
    class_name: str
    task: Task
    stacks: tuple[Stack, ...]
    main: str
    """Name of the stack that generates, or that encodes the text."""
    vocab_size: int
    hidden_size: int
    max_positions: int | None
    dtype: str
    """The checkpoint's: `bf16`, `fp16`, `fp32`."""
    head: tuple[Param, ...] = ()
    """Language-model head, classifier, pooler: built last. Empty where the head is tied to the embedding."""
    adapter: tuple[Param, ...] = ()
    """Tensors of a PEFT adapter on top."""
    tied_head: bool = False
    final_norm: Literal["rms", "layer"] | None = "rms"
    logits_softcap: bool = False
    z_loss: bool = False
    """Training adds the square of the logits' log-sum-exp to the loss (Bamba's `z_loss_coefficient`)."""
    scales_output: bool = False
    """What the decoder returns is scaled before the head (T5)."""
    generates_cache: bool = True
    """False where the model's generation configuration says `use_cache: false` (MPT)."""
    logits_of_all_tokens: bool = False
    """The class has no `logits_to_keep`: a prefill computes the logits of every token."""
    fp32_in_fp16: tuple[str, ...] = ()
    """Modules whose weights `from_pretrained` keeps in fp32 where the rest is loaded in fp16 (T5's `wo`)."""
    text_type: str | None = None
    """The nested language model's type, where there is one."""
    quantization: str | None = None
    """The checkpoint's own: `fp8`, `gptq-4`, `awq-4`, `nf4`, `int8`, `mxfp4`, `nvfp4`…"""
    scheme: Scheme | None = None
    """How that packs its weights."""
    stored_sizes: tuple[int, ...] = ()
    """Bytes of each stored tensor that is loaded, where a quantized checkpoint's headers were read."""
    unquantized: tuple[str, ...] = ()
    """Parts of module names that the checkpoint's quantization leaves alone."""
    closed_form: bool = True
    """False where only the model's own code says what it takes: its layers are counted, not understood."""
    warnings: tuple[str, ...] = ()

    def stack(self, name: str) -> Stack:
        return next(s for s in self.stacks if s.name == name)

    @cached_property
    def text(self) -> Stack:
        return self.stack(self.main)

    @cached_property
    def generates(self) -> bool:
        """Whether the class has a head over the vocabulary: a bare model (of embeddings, say) has none."""
        heads = (p for p in (*self.head, *self.text.after) if p.kind == "head")
        return self.tied_head or any(p.split or p.shape[0] == self.vocab_size for p in heads)

    @cached_property
    def all_params(self) -> tuple[Param, ...]:
        """Every tensor, buffers included, once."""
        return tuple(p for s in self.stacks for p in s.params()) + self.head + self.adapter

    @cached_property
    def parameters(self) -> int:
        """Unique parameters: tied tensors once, buffers not at all."""
        return sum(p.numel for p in self.all_params if p.kind != "buffer")

    @cached_property
    def active_parameters(self) -> int:
        """Parameters that one token passes: all but the experts that are not chosen (Mixtral, arXiv 2401.04088)."""
        idle = 0
        for stack in self.stacks:
            for i, layer in enumerate(stack.layers):
                moe = layer.feed_forward
                if i not in stack.repeated and isinstance(moe, MixtureOfExperts):
                    routed = sum(p.numel for p in moe.params if p.kind == "experts")
                    idle += routed // moe.experts * (moe.experts - moe.top_k)
        return self.parameters - idle

    @cached_property
    def layer_kinds(self) -> dict[str, int]:
        """How many layers of the main stack have a mixer of each kind, and a feed-forward of each."""
        kinds: Counter[str] = Counter()
        for layer in self.text.layers:
            kinds.update(m.kind for m in layer.mixers)
            if layer.feed_forward:
                kinds[layer.feed_forward.kind] += 1
        return dict(kinds)

    @cached_property
    def attention(self) -> Attention | None:
        """The first self-attention of the main stack, for headline figures."""
        mixers = (m for layer in self.text.layers for m in layer.mixers)
        return next((m for m in mixers if isinstance(m, Attention)), None)

    @cached_property
    def moe(self) -> MixtureOfExperts | None:
        feeds = (layer.feed_forward for layer in self.text.layers)
        return next((f for f in feeds if isinstance(f, MixtureOfExperts)), None)
