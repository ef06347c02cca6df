"""What tensors turn out to be: activations that backward needs or computes again, gradients, optimizer states."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from hfvram.memory.exact.tracker import IN_BACKWARD, Tracker
from hfvram.memory.timeline import Tag

SAVED = "saved activations"
RECOMPUTED = "recomputed"
NO_MODULE = (IN_BACKWARD, "kernel scratch")


def name_tensors(tracker: Tracker, model: Any) -> None:
    """Weights by what they belong to, buffers apart, quantization scales among the weights."""
    for name, parameter in model.named_parameters():
        _name(tracker, name, parameter, "weights")
    for name, buffer in model.named_buffers():
        _name(tracker, name, buffer, "weights" if getattr(buffer, "_hfvram_scale", False) else "buffers")


def _name(tracker: Tracker, name: str, tensor: Any, category: Any) -> None:
    handle = tracker.add(tensor)
    if handle is not None:
        shown = tracker.tag(name.rpartition(".")[0] if name.endswith((".weight", ".bias")) else name).name
        tracker.timeline.tags[handle] = Tag(shown, category, "", "the model's own tensors", "exact")
        tracker.timeline.made[handle] = path_of(name), *tracker.timeline.made[handle][1:]


def label(tracker: Tracker, handles: Iterable[int], what: str) -> None:
    """Add to the names of these activations what they are."""
    tags, labelled = tracker.timeline.tags, dict[Tag, Tag]()
    for handle in handles:
        tag = tags[handle]
        if tag.category == "activations" and not tag.name.endswith((")", *NO_MODULE)):
            if tag not in labelled:
                labelled[tag] = tag._replace(name=f"{tag.name} ({what})")
            tags[handle] = labelled[tag]


def name_gradients(tracker: Tracker, parameters: Iterable[tuple[str, Any]]) -> None:
    """What lies in `grad` of these parameters are gradients, each its parameter's."""
    for name, parameter in parameters:
        if parameter.grad is not None:
            tracker.retag([parameter.grad], "gradients", "gradients", [path_of(name)])


def name_states(tracker: Tracker, parameters: Iterable[tuple[str, Any]], optimizer: Any) -> None:
    """What the optimizer keeps, by the name of the state, each its parameter's."""
    paths = {id(parameter): path_of(name) for name, parameter in parameters}
    for parameter, kept in optimizer.state.items():
        for key, tensor in states_of(kept):
            tracker.retag([tensor], "optimizer", f"optimizer states: {key}", [paths.get(id(parameter), "")])
    for key, tensor in states_of(getattr(optimizer, "maps", {})):
        tracker.retag([tensor], "optimizer", f"optimizer states: {key}")


def states_of(kept: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every tensor that an optimizer keeps for one parameter, with its name."""
    for key, value in kept.items():
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(tensor, torch.Tensor):
                yield key, tensor


def path_of(parameter: str) -> str:
    """A parameter's name, of a module's main one the module's.

    >>> path_of("model.layers.3.mlp.up_proj.weight"), path_of("model.layers.3.mlp.up_proj.bias")
    ('model.layers.3.mlp.up_proj', 'model.layers.3.mlp.up_proj.bias')
    """
    return parameter.removesuffix(".weight")
