"""LoRA and QLoRA: which layers PEFT puts adapters around, what stands then, and the leaves that are trained.

All else is frozen. QLoRA packs linear layers and casts the rest to fp32 (`prepare_model_for_kbit_training`); adapters
are in fp32 unless asked otherwise (`autocast_adapter_dtype`). Source: PEFT 0.21, utils/other.py and
tuners/tuners_utils.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod, sqrt

from hfvram.errors import HfvramError, printable
from hfvram.memory.bitsandbytes import ON_LOADING
from hfvram.memory.mesh import mesh_of
from hfvram.memory.timeline import Standing, Tag, Timeline
from hfvram.memory.training.blocks import unknown
from hfvram.memory.training.kinds import kind_of
from hfvram.memory.training.packed import Packed
from hfvram.memory.training.states import Leaf, Lora
from hfvram.memory.training.tape import Tape
from hfvram.memory.training.tensors import ITEM_BYTES
from hfvram.memory.weights import WEIGHTS, param_bytes, quantized
from hfvram.model.adapter import module_of, targeted
from hfvram.model.architecture import Architecture
from hfvram.model.fused_targets import Targets, fused_targets
from hfvram.model.layers import Layer, Param
from hfvram.model.parts import frozen, saved
from hfvram.request import Request

ALPHA = 32
"""What products of adapters are scaled by, over their rank."""
ADAPTERS = Tag("LoRA adapters", "weights", "", "PEFT 0.21: tuners/lora/layer.py update_layer", "exact")
COPIES = Tag("modules trained whole", "weights", "P·e", "PEFT 0.21: utils/other.py ModulesToSaveWrapper", "exact")


class Training:
    """What is trained of a model: everything, or PEFT's adapters around some of its layers."""

    def __init__(self, architecture: Architecture, request: Request) -> None:
        self.request = request
        self.transposed = kind_of(architecture).transposed
        self.adapted = request.mode in ("lora", "qlora")
        self.quant = request.quant if request.quant in ON_LOADING else "none"
        self.packs = quantized(architecture, self.quant)
        self.targets: Targets | None = None
        """Where layers were fused, what is targeted instead."""
        self.embedding = architecture.text.before[0].name if architecture.text.before else ""
        self.found: dict[int, dict[str, str]] = {}
        """By the identity of a layer, of its parameters what is done with them: `adapter`, `copy`, `frozen`."""
        self.layers = architecture.text.layers
        self.outside: dict[str, str] = {}
        """The same of parameters outside of layers."""
        self.frozen: frozenset[str] = frozenset()
        """Parameters that stay as they are where all others are trained."""
        self.head: list[Param] = []
        """The copy of a head that is tied to the embedding."""
        self.params: list[Param] = []
        """All of the adapters' tensors, and copies that are trained whole."""
        if self.adapted:
            self._choose(architecture)
        elif request.freeze:
            self.frozen = frozen((p.name for p in architecture.all_params if p.kind != "buffer"), request.freeze)
            self._mark(architecture, lambda p: "frozen" if p.name in self.frozen else None)

    def _choose(self, architecture: Architecture) -> None:
        copied = self._copied(architecture)
        asked = self.request.lora_targets
        self.targets = fused_targets(architecture, asked)
        modules = asked if self.targets is None else self.targets.layers
        of_layers = targeted(architecture, modules) if modules else lambda param: False

        def wanted(param: Param) -> bool:
            return of_layers(param) or bool(self.targets and self.targets.of(param))

        def what(param: Param) -> str | None:
            if self.targets and self.targets.of(param) and param.name in copied:
                raise unknown(f"--modules-to-save of {param.name}, which is a target, too,")
            return "copy" if param.name in copied else "adapter" if wanted(param) else None

        chosen = self._mark(architecture, what)
        if "adapter" not in (mark for _, mark in chosen):
            raise _nothing(architecture, self.request)
        for param, mark in chosen:
            self.params += [param] if mark == "copy" else self._tensors(param)
        self.params += self.head
        self.outside |= {p.name: "copy" for p in self.head}

    def _copied(self, architecture: Architecture) -> frozenset[str]:
        """What PEFT trains as a copy of its own."""
        if not (asked := self.request.modules_to_save):
            return frozenset()
        tied = [Param("lm_head.weight", architecture.text.before[0].shape, "head")] if architecture.tied_head else []
        params = [*architecture.all_params, *tied]
        copied = saved((p.name for p in params if p.kind != "buffer"), asked)
        if packed := next((p for p in params if p.name in copied and self.packs(p)), None):
            raise HfvramError("usage", f"--modules-to-save: {packed.name} is packed, and can't be trained")
        self.head = [head for head in tied if head.name in copied]
        return copied

    def _mark(self, architecture: Architecture, what: Callable[[Param], str | None]) -> list[tuple[Param, str]]:
        """What is done with parameters; layers with whom nothing, or other things, are done are layers of their own."""
        text, cut, layers = architecture.text, dict[tuple[int, frozenset[tuple[str, str]]], Layer](), []
        chosen = [(p, m) for p in (*text.before, *text.after, *architecture.head) if (m := what(p))]
        self.outside = {p.name: mark for p, mark in chosen}
        for i, layer in enumerate(text.layers):
            named = ((p, what(replace(p, name=f"{text.prefix}.{i}.{p.name}"))) for p in layer.all_params())
            own = [(p, mark) for p, mark in named if mark]
            chosen += own
            key = id(layer), frozenset((p.name, mark) for p, mark in own)
            if key not in cut:
                cut[key] = layer if id(layer) not in self.found else replace(layer)
                self.found[id(cut[key])] = {p.name: mark for p, mark in own}
            layers.append(cut[key])
        self.layers = tuple(layers)
        return chosen

    def _tensors(self, param: Param) -> Iterator[Param]:
        """A and B around a layer, and DoRA's magnitudes; or around a parameter, for each of its experts."""
        request, dora = self.request, self.request.dora
        r, dtype = request.lora_r, request.adapter_dtype
        if self.targets and (times := self.targets.of(param)):
            if dora or request.lora_dropout:
                option = "--dora" if dora else "--lora-dropout"
                raise HfvramError("usage", f"{option}: PEFT has none around {param.name}, which is no layer")
            *experts, outputs, inputs = param.shape
            rows = r * times * prod(experts)
            yield Param(f"{param.name}.lora_A.weight", (rows, inputs), "linear", dtype)
            yield Param(f"{param.name}.lora_B.weight", (outputs, rows), "linear", dtype)
            return
        if param.kind == "embedding" and not dora and param.name == self.embedding:
            if mesh_of(request).gpus > 1 or request.zero or request.fsdp or request.offload:
                raise unknown(f"LoRA around {param.name} over several GPUs, sharded or offloaded,")
            module, (rows, width) = param.name.removesuffix(".weight"), param.shape
            yield Param(f"{module}.lora_embedding_A", (request.lora_r, rows), "other", request.adapter_dtype)
            yield Param(f"{module}.lora_embedding_B", (width, request.lora_r), "other", request.adapter_dtype)
            return
        if dora and (param.kind not in ("linear", "linear_subclass", "head") or self.packs(param)):
            raise unknown(f"--dora around {param.name}{' in ' + self.quant if self.packs(param) else ''}")
        if param.split and param.split.how not in ("columns", "rows"):
            raise HfvramError(
                "usage",
                f"--lora-targets: PEFT splits no adapter around {param.name}, which --tp gathers: valid is --tp 1",
            )
        if param.kind not in ("linear", "linear_subclass", "head"):
            raise HfvramError(
                "usage", f"--lora-targets: LoRA around {param.name} has no formula yet: --method simulate"
            )
        outputs, inputs = param.shape[::-1] if self.transposed else param.shape
        module = param.name.removesuffix(".weight")
        yield Param(f"{module}.lora_A.weight", (r, inputs), "linear", dtype)
        yield Param(f"{module}.lora_B.weight", (outputs, r), "linear", dtype)
        if dora:
            yield Param(f"{module}.lora_magnitude_vector", (outputs,), "other", dtype)

    def make(self, param: Param, layer: Layer | None, segment: int | None) -> Leaf:
        """The leaf of a parameter, with its adapter."""
        request = self.request
        packed = self.packs(param)
        mark = (self.outside if layer is None else self.found.get(id(layer), {})).get(param.name)
        leaf = Leaf(param, self.dtype(param), mark == "copy" if self.adapted else mark != "frozen", segment)
        if mark == "copy":
            leaf.original = leaf.tensor.alias()
        if packed:
            shape = param.shape[::-1] if self.transposed else param.shape
            leaf.packed = Packed(self.quant, request.dtype, request.double_quant, shape)
        if mark == "adapter":
            parts = [Leaf(p, p.dtype or "", True, segment) for p in self._tensors(param)]
            times = (self.targets.of(param) if self.targets else 0) or 1
            divisor = request.lora_r * times if not request.rslora else sqrt(request.lora_r * times)
            experts = param.shape[0] if len(param.shape) == 3 else 1
            leaf.lora = Lora(tuple(parts), request.lora_dropout, experts, ALPHA * times != divisor)
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

    def adapt(self, tape: Tape, casts: list[tuple[int, int]], held: Callable[[Param], Param]) -> None:
        """Cast what is not packed, and make the adapters, of which one GPU holds a part; magnitudes take a product."""
        t = tape.timeline
        if self.request.dora:
            tape.multiplies()
        for handle, nbytes in casts:
            t.alloc(nbytes, WEIGHTS)
            t.free(handle)
        if {"params", "params=nvme"} & set(self.request.offload):
            return
        for param in map(held, self.params):
            adds = param.name.rpartition(".lora_")[1]
            t.alloc(param.numel * ITEM_BYTES[self.dtype(param)], ADAPTERS if adds else COPIES)


def _nothing(architecture: Architecture, request: Request) -> HfvramError:
    """Targets that match no layer: what would be valid."""
    asked = request.lora_targets if isinstance(request.lora_targets, str) else ",".join(request.lora_targets)
    every = targeted(architecture, "all-linear")
    names = {module_of(p).rsplit(".", 1)[-1] for p in architecture.all_params if every(p)}
    valid = ", ".join(("all-linear", *sorted(names)))
    return HfvramError("usage", f"--lora-targets {printable(asked, 60)} matches no layer: valid are {valid}")
