"""Which decoder layers of a graph are in which nested compile regions, and why others are in none.

The decisions for ``regions.py``, in plain Python while Dynamo traces: they leave no guards.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from mxfp4_fx.core import compilation, torch_private
from mxfp4_fx.core import torch_private_capture as capture
from mxfp4_fx.huggingface.likeness import Known, SeenFloats, likeness

MOST = 8  # graphs of one kind of region in one graph; further layers are captured as usual
_STATE = "_mxfp4_fx_regions"  # the attribute of Dynamo's object that holds ours
_decided = threading.local()
_floats = SeenFloats()

# Set by `found_none` or `found`.
_layer_class: Any = None
_known: Known
_why_none: str | None = None


def found_none(layer_class: type, why: str) -> None:
    """Note the class of decoder layers, and why no layer can be in a region."""
    global _layer_class, _why_none
    _layer_class, _why_none = layer_class, why


def found(layer_class: type, known: Known) -> None:
    """Note the class of decoder layers, and the code with which regions were tried."""
    global _layer_class, _known
    _layer_class, _known = layer_class, known


@dataclasses.dataclass
class _Entry:
    """A region in use: likeness, tensors and Dynamo's source of the layer that came first."""

    likeness: Hashable
    fakes: list[Tensor | None]
    source: Any


class _State:
    """What one graph under capture has of regions.

    Attributes:
        is_on: whether the user wants regions.
        entries: kind of region -> its regions in use, in order.
        guards: source of such a layer -> the guards that Dynamo has set on it, if usable.
        layers: how many decoder layers it has.
        whys: why layers are captured as usual -> how many, for this reason.
    """

    def __init__(self) -> None:
        options = compilation.keywords()["options"] or {}
        self.is_on = options.get("regions", True) is True
        self.entries: dict[str, list[_Entry]] = {}
        self.guards: dict[Any, list[Any] | None] = {}
        self.layers = 0
        self.whys: collections.Counter[str] = collections.Counter()


def _state() -> _State:
    of_graph = vars(capture.graph_under_capture())
    if _STATE not in of_graph:
        of_graph[_STATE] = _State()
    state: _State = of_graph[_STATE]
    return state


def decide_on_layer(context: Any) -> None:
    """Decide whether the layer that Dynamo is about to trace may be in a region."""
    state = _state()
    layer, source = capture.object_at_capture(context, "self")
    state.layers += 1
    _decided.state, _decided.source, _decided.firsts = state, source, []
    _decided.likeness = None
    if not state.is_on:
        return
    why = _why_not(context, layer, source)
    if why is None:
        _decided.likeness = likeness(layer)
        if _decided.likeness is None:
            why = "they have hooks, a forward of their own, a tensor twice, or draw random numbers"
    if why is not None:
        state.whys[why] += 1


def _why_not(context: Any, layer: Any, source: Any) -> str | None:
    """Return why a layer that Dynamo is about to trace cannot be in a region, or None."""
    if source is None:
        return "Dynamo does not know where they come from"
    if type(layer) is not _layer_class:
        return f"they are {type(layer).__name__}, and not GptOssDecoderLayer of transformers"
    if torch.is_grad_enabled():  # AOTAutograd takes not all regions with gradients
        return "gradients are recorded"
    stranger = _known.stranger_in(layer)
    if stranger is not None:
        return stranger
    # Other attentions may read arguments that the regions do not pass on.
    attention = layer.self_attn.config._attn_implementation
    if attention != "eager":
        return f"their attention is {attention!r}; regions need 'eager'"
    if not capture.are_tensors(context, "position_embeddings", 2):
        return "their position embeddings are not two tensors"
    if not capture.is_tensor_or_none(context, "attention_mask"):
        return "their mask is no tensor"
    if torch_private.are_transforms_active():
        return "torch.func transforms them"
    if capture.is_in_ddp():
        return "they are called in DistributedDataParallel"
    if capture.are_floats_symbolic():
        return "with dynamic=True, Dynamo makes inputs of numbers, which regions cannot take"
    if _floats.have_changed(layer, source):
        return "a number in them is another than before, so that Dynamo makes it an input"
    return None


def note_sizes(context: Any) -> None:
    """Note that a layer's inputs do not have the sizes that regions are written for."""
    _decided.state.whys["the sizes of what they are given do not fit together"] += 1


def note_name(context: Any) -> None:
    """Note a layer that gets a cache by another name than its own."""
    state = _state()
    state.layers += 1
    state.whys["their cache is given by the name that it has in other transformers"] += 1


def _decide_on(kind: str, *tensors: str) -> Callable[[Any], None]:
    def decide(context: Any) -> None:
        state, alike = _decided.state, _decided.likeness
        fakes = [capture.tensor_at_capture(context, name) for name in tensors]
        sizes = [*map(capture.sizes, fakes)]
        entries = state.entries.setdefault(kind, [])
        for number, entry in enumerate(entries):  # noqa: B007
            # Sizes are compared as they are known now, which may be more than at first.
            if entry.likeness == alike and [*map(capture.sizes, entry.fakes)] == sizes:
                break
        else:
            number, entry = len(entries), _Entry(alike, fakes, _decided.source)
            if number < MOST:
                entries.append(entry)
        _decided.at = number if number < MOST else None
        if _decided.at is None:
            state.whys[f"they and their inputs are of more than {MOST} kinds"] += 1
        first = entry.source
        if first == _decided.source or _decided.at is None:
            return
        if first not in state.guards:
            state.guards[first] = capture.guards_on(first)
        if state.guards[first] is None:
            _decided.at = None
            state.whys["Dynamo's guards on the first of their kind are not known to be theirs"] += 1
        else:
            _decided.firsts.append(first)

    return decide


decide_on_whole = _decide_on("whole", "hidden_states", "mask", "cos", "sin")
decide_on_head = _decide_on("head", "hidden_states", "cos", "sin")
decide_on_rest = _decide_on("rest", "hidden_states", "mask", "cos", "sin", "keys", "values")


def guard(context: Any) -> None:
    """Guard a layer that got another's graph as that other layer is guarded.

    Dynamo looks whether the guards hold when it reuses a graph, and sets none of them.
    """
    for first in dict.fromkeys(_decided.firsts):
        guards = _decided.state.guards[first]
        capture.guard_alike(guards, first, _decided.source)


@torch.compiler.assume_constant_result
def may_share() -> bool:
    """Return whether the layer may be in a region."""
    return _decided.likeness is not None


@torch.compiler.assume_constant_result
def region_to_use() -> int | None:
    """Return which region of its kind the layer is in, or None."""
    at: int | None = _decided.at
    return at


def notes(gm: fx.GraphModule) -> list[str]:
    """Return why repeated layers of a graph are captured one by one.

    Args:
        gm: the graph that Dynamo has just captured.
    """
    count, whys = _layers_and_whys(gm)
    if count < 2:
        return []
    return [
        f"{_layers(number)} captured by itself, which takes longer to compile: {why}"
        for why, number in whys.items()
    ]


def _layers_and_whys(gm: fx.GraphModule) -> tuple[int, Mapping[str, int]]:
    if _why_none is not None:
        stacks = (node.meta.get("nn_module_stack", {}).values() for node in gm.graph.nodes)
        paths = {path for stack in stacks for path, kind in stack if kind is _layer_class}
        return len(paths), {_why_none: len(paths)}
    graph = capture.graph_under_capture() if _layer_class is not None else None
    state: _State | None = vars(graph).get(_STATE) if graph is not None else None
    return (0, {}) if state is None else (state.layers, state.whys)


def _layers(count: int) -> str:
    return "1 decoder layer is" if count == 1 else f"each of {count} decoder layers is"
