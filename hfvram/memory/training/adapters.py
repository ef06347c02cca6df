"""LoRA and QLoRA: which layers PEFT puts adapters around, what stands then, and the leaves that are trained.

All else is frozen. QLoRA packs linear layers and casts the rest to fp32 (`prepare_model_for_kbit_training`); adapters
are in fp32 unless asked otherwise (`autocast_adapter_dtype`). Source: PEFT 0.21, utils/other.py and
tuners/tuners_utils.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from hfvram.errors import HfvramError, printable
from hfvram.memory.bitsandbytes import ON_LOADING
from hfvram.memory.timeline import Standing, Tag, Timeline
from hfvram.memory.training.kinds import kind_of
from hfvram.memory.training.packed import Packed
from hfvram.memory.training.states import Leaf, Lora
from hfvram.memory.training.tensors import ITEM_BYTES
from hfvram.memory.weights import WEIGHTS, param_bytes, quantized
from hfvram.model.adapter import module_of, targeted
from hfvram.model.architecture import Architecture
from hfvram.model.layers import Layer, Param
from hfvram.request import Request

ADAPTERS = Tag("LoRA adapters", "weights", "", "PEFT 0.21: tuners/lora/layer.py update_layer", "exact")


class Training:
    """What is trained of a model: everything, or PEFT's adapters around some of its layers."""

    def __init__(self, architecture: Architecture, request: Request) -> None:
        self.request = request
        self.transposed = kind_of(architecture).transposed
        self.adapted = request.mode in ("lora", "qlora")
        self.quant = request.quant if request.quant in ON_LOADING else "none"
        self.packs = quantized(architecture, self.quant)
        self.found: dict[int, frozenset[str]] = {}
        """By the identity of a layer, its weights with an adapter."""
        self.layers = architecture.text.layers
        self.outside: frozenset[str] = frozenset()
        """Weights outside of layers that have one."""
        self.params: list[Param] = []
        """All of the adapters' tensors."""
        if self.adapted:
            self._choose(architecture)

    def _choose(self, architecture: Architecture) -> None:
        wanted = targeted(architecture, self.request.lora_targets)
        text, cut = architecture.text, {}
        outside, chosen = [], []
        for param in (*text.before, *text.after, *architecture.head):
            if wanted(param):
                outside.append(param.name)
                chosen.append(param)
        self.outside = frozenset(outside)
        layers = []
        for i, layer in enumerate(text.layers):
            own = [p for p in layer.all_params() if wanted(replace(p, name=f"{text.prefix}.{i}.{p.name}"))]
            chosen += own
            names = frozenset(p.name for p in own)
            key = (id(layer), names)
            if key not in cut:
                cut[key] = layer if id(layer) not in self.found else replace(layer)
                self.found[id(cut[key])] = names
            layers.append(cut[key])
        self.layers = tuple(layers)
        if not chosen:
            raise _nothing(architecture, self.request)
        self.params = [x for p in chosen for x in self._tensors(p)]

    def _tensors(self, param: Param) -> Iterator[Param]:
        """A and B around a layer."""
        if param.kind not in ("linear", "linear_subclass", "head"):
            raise HfvramError(
                "usage", f"--lora-targets: LoRA around {param.name} has no formula yet: --method simulate"
            )
        outputs, inputs = param.shape[::-1] if self.transposed else param.shape
        module, r, dtype = param.name.removesuffix(".weight"), self.request.lora_r, self.request.adapter_dtype
        yield Param(f"{module}.lora_A.weight", (r, inputs), "linear", dtype)
        yield Param(f"{module}.lora_B.weight", (outputs, r), "linear", dtype)

    def make(self, param: Param, layer: Layer | None, segment: int | None) -> Leaf:
        """The leaf of a parameter, with its adapter."""
        request = self.request
        packed = self.packs(param)
        leaf = Leaf(param, self.dtype(param), not self.adapted, segment)
        if packed:
            shape = param.shape[::-1] if self.transposed else param.shape
            leaf.packed = Packed(self.quant, request.dtype, request.double_quant, shape)
        if self.adapted and param.name in (self.outside if layer is None else self.found[id(layer)]):
            parts = [Leaf(p, p.dtype or "", True, segment) for p in self._tensors(param)]
            leaf.lora = Lora(tuple(parts), request.lora_dropout)
        return leaf

    def dtype(self, param: Param) -> str:
        """A parameter's dtype while it is trained with."""
        own = param.dtype or self.request.dtype
        if self.request.mode == "qlora" and own in ("bf16", "fp16") and not self.packs(param):
            return "fp32"
        return own

    def stands(self, t: Timeline, architecture: Architecture) -> list[tuple[int, int]]:
        """What stands before adapters come, and of what QLoRA casts (handle, bytes in fp32)."""
        tensors: list[tuple[int, Tag]] = []
        casts: list[Param] = []
        for param in architecture.all_params:
            quant = self.quant if self.packs(param) else "none"
            if param.kind != "buffer" and self.dtype(param) != (param.dtype or self.request.dtype):
                casts.append(param)
            else:
                tensors += param_bytes(param, self.request.dtype, quant, self.request.double_quant)
        t.standing = Standing(tuple(tensors))
        e = ITEM_BYTES[self.request.dtype]
        return [(t.alloc(p.numel * e, WEIGHTS), p.numel * 4) for p in casts]

    def adapt(self, t: Timeline, casts: list[tuple[int, int]], held: Callable[[Param], Param]) -> None:
        """Cast what is not packed, and make the adapters, of which one GPU holds a part."""
        for handle, nbytes in casts:
            t.alloc(nbytes, WEIGHTS)
            t.free(handle)
        if {"params", "params=nvme"} & set(self.request.offload):
            return
        for param in map(held, self.params):
            t.alloc(param.numel * ITEM_BYTES[param.dtype or ""], ADAPTERS)


def _nothing(architecture: Architecture, request: Request) -> HfvramError:
    """Targets that match no layer: what would be valid."""
    asked = request.lora_targets if isinstance(request.lora_targets, str) else ",".join(request.lora_targets)
    every = targeted(architecture, "all-linear")
    names = {module_of(p).rsplit(".", 1)[-1] for p in architecture.all_params if every(p)}
    valid = ", ".join(("all-linear", *sorted(names)))
    return HfvramError("usage", f"--lora-targets {printable(asked, 60)} matches no layer: valid are {valid}")
