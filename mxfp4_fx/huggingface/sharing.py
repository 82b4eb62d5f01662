"""The layers of a model that share what is compiled of one of them, and what they give it."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Sequence, Set
from typing import Any

from torch import nn

from mxfp4_fx.core import torch_private
from mxfp4_fx.core.skip import EXACT_LINEARS, KEEP_DENSE, SKIPPED

# A layer -> all layers of its model. References are weak, so that they keep no model alive.
_together: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[nn.Module]] = (
    weakref.WeakKeyDictionary()
)


def share(layers: Iterable[nn.Module]) -> None:
    """Let these layers, and no others, share what is compiled of any of them.

    Those that they shared with before do so no longer.
    """
    together = weakref.WeakSet(layers)
    for layer in together:
        if layer in _together:
            _together[layer].discard(layer)
        _together[layer] = together


def inputs_of_others(
    layer: nn.Module, inputs: Sequence[Any], called: Set[nn.Module]
) -> list[tuple[Any, ...]] | None:
    """Return what a graph captured in one layer gets from each other layer that shares it.

    Args:
        layer: a layer of which Dynamo has captured a graph.
        inputs: the graph's inputs, the layer's parameters among them.
        called: the experts of the present call.

    Returns:
        For each other layer, ``inputs`` with its parameters in place of this layer's. None if some
        layer is not known to share the graph: it computes something else, or is not called.
    """
    layers = list(_together.get(layer, ()))
    if layer not in layers or len(set(map(_likeness, layers))) != 1:
        return None
    if any(called.isdisjoint(one.modules()) for one in layers):
        return None
    names = {id(parameter): name for name, parameter in layer.named_parameters()}
    held = [dict(one.named_parameters()) for one in layers if one is not layer]
    return [
        tuple(its[names[id(value)]] if id(value) in names else value for value in inputs)
        for its in held
    ]


def _likeness(layer: nn.Module) -> Hashable:
    """Return what is equal for layers whose weights have one form and are to be treated alike."""
    marks = KEEP_DENSE, SKIPPED, EXACT_LINEARS
    parts = [(layer.training,), *((name, type(one)) for name, one in layer.named_modules())]
    parts += [tuple(vars(one).get(mark) for mark in marks) for one in layer.modules()]
    # What runs around a forward or in its place: a layer that differs in it is called otherwise.
    parts += [("forward" in vars(one),) for one in layer.modules()]
    parts.append(tuple(map(len, torch_private.hooks(layer.modules()))))
    for name, value in layer.named_parameters():
        about = value.shape, value.stride(), value.dtype, value.device, value.requires_grad
        parts.append((name, type(value), *about))
    return tuple(parts)
