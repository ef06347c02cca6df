"""What tensors turn out to be: activations that backward needs or computes again, gradients, optimizer states."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from hfvram.memory.exact.tracker import IN_BACKWARD, Tracker
from hfvram.memory.timeline import Tag

SAVED = "saved activations"
RECOMPUTED = "recomputed"
NO_MODULE = (IN_BACKWARD, "kernel scratch")


def label(tracker: Tracker, handles: Iterable[int], what: str) -> None:
    """Add to the names of these activations what they are."""
    tags, labelled = tracker.timeline.tags, dict[Tag, Tag]()
    for handle in handles:
        tag = tags[handle]
        if tag.category == "activations" and not tag.name.endswith((")", *NO_MODULE)):
            if tag not in labelled:
                labelled[tag] = tag._replace(name=f"{tag.name} ({what})")
            tags[handle] = labelled[tag]


def name_gradients(tracker: Tracker, parameters: Mapping[str, Any]) -> None:
    """What lies in `grad` of these parameters are gradients, each its parameter's."""
    grads = {path_of(name): p.grad for name, p in parameters.items() if p.grad is not None}
    tracker.retag(grads.values(), "gradients", "gradients", grads)


def name_states(tracker: Tracker, parameters: Mapping[str, Any], optimizer: Any) -> None:
    """What the optimizer keeps, by the name of the state, each its parameter's."""
    paths = {id(p): path_of(name) for name, p in parameters.items()}
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
