"""Nested compile regions around a model's repeated layer, set while this backend captures.

Dynamo traces a region once and reuses its graph for layers that are alike; so does Inductor with
what it compiles. Without a cache, a region is a whole decoder layer. With one it is two, because a
region may not write to a cache: the *head* computes keys and values, the model updates its cache,
and the *rest* of the layer computes all else.

Both run transformers' own forward of the layer, with an object in the place of the cache: the
head's takes keys and values and ends the forward, the rest's gives them back. What neither needs is
dead code. :func:`_fits` tries this at first, so that nothing of it is taken for granted.

A layer is captured as usual where this would not be known to serve: see :func:`_decide_on_layer`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from mxfp4_fx.core import compilation, torch_private
from mxfp4_fx.core import torch_private_capture as capture
from mxfp4_fx.huggingface import hub_modules
from mxfp4_fx.huggingface.decoder_layers import CacheUseError, Giving, Taken, Taking
from mxfp4_fx.huggingface.likeness import Known, SeenFloats, likeness

log = logging.getLogger("mxfp4_fx.regions")

_MOST = 8  # graphs of one kind of region in one graph; further layers are captured as usual
_decided = threading.local()
_STATE = "_mxfp4_fx_regions"  # the attribute of Dynamo's object that holds ours

# Set by `prepare`: the layer's own forward, and what Dynamo calls while it traces.
_own: Callable[..., Any]
_at_capture: Any
_layer_class: Any
_known: Known


# ---- what regions hold: arguments are positional, because naming them costs Dynamo much time


def _head(layer: Any, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> Any:
    taking = Taking()
    try:
        _own(layer, hidden_states, None, None, taking, False, (cos, sin))
    except Taken:
        return taking.taken
    raise CacheUseError("it does not update its cache")


def _rest(
    layer: Any,
    hidden_states: Tensor,
    mask: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Any:
    return _own(layer, hidden_states, mask, None, Giving(keys, values), False, (cos, sin))


def _whole(layer: Any, hidden_states: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor) -> Any:
    return _own(layer, hidden_states, mask, None, None, False, (cos, sin))


def _regions(function: Any) -> tuple[Callable[..., Any], ...]:
    """Return regions of a function, each with code of its own: Dynamo reuses a graph by code."""
    return tuple(
        capture.region(
            types.FunctionType(
                function.__code__.replace(co_name=f"{function.__name__}_{at}"),
                function.__globals__,
                f"{function.__name__}_{at}",
            ),
            1 << 20,
        )
        for at in range(_MOST)
    )


_HEADS: tuple[Callable[..., Any], ...] = ()
_RESTS: tuple[Callable[..., Any], ...] = ()
_WHOLES: tuple[Callable[..., Any], ...] = ()


def _are_sizes_one(layer: Any, hidden: Tensor, mask: Tensor | None, cos: Tensor) -> bool:
    """Let Dynamo learn outside of a region which sizes are equal; return whether they are.

    A size symbol that is found inside to be another's equal is gone when the graph is reused.
    """
    if hidden.ndim != 3 or hidden.shape[2] != layer.input_layernorm.weight.shape[0]:
        return False
    if cos.ndim != 3 or cos.shape[1] != hidden.shape[1]:
        return False
    if cos.shape[0] != 1 and cos.shape[0] != hidden.shape[0]:
        return False
    if mask is None:
        return True
    return (
        mask.ndim == 4
        and mask.shape[0] == hidden.shape[0]
        and mask.shape[1] == 1
        and mask.shape[2] == hidden.shape[1]
    )


def _forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Any = None,
    past_key_values: Any = None,
    use_cache: Any = False,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> Any:
    """Stand for the decoder layer's forward while Dynamo traces for this backend."""
    _at_capture(_decide_on_layer)
    if _may_share() and _are_sizes_one(self, hidden_states, attention_mask, position_embeddings[0]):
        cos, sin = position_embeddings
        if past_key_values is None:
            return _without_cache(self, hidden_states, attention_mask, cos, sin)
        return _with_cache(self, hidden_states, attention_mask, cos, sin, past_key_values)
    return _own(
        self,
        hidden_states,
        attention_mask,
        position_ids,
        past_key_values,
        use_cache,
        position_embeddings,
        **kwargs,
    )


def _without_cache(
    layer: Any, hidden_states: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor
) -> Any:
    if mask is None or mask.shape[3] == hidden_states.shape[1]:
        _at_capture(_decide_on_whole)
        at = _region_to_use()
        if at is not None:
            hidden_states = _WHOLES[at](layer, hidden_states, mask, cos, sin)
            _at_capture(_guard)
            return hidden_states
    return _whole(layer, hidden_states, mask, cos, sin)


def _with_cache(
    layer: Any, hidden_states: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor, cache: Any
) -> Any:
    _at_capture(_decide_on_head)
    at = _region_to_use()
    if at is None:
        return _own(layer, hidden_states, mask, None, cache, False, (cos, sin))
    keys, values = _HEADS[at](layer, hidden_states, cos, sin)
    keys, values = cache.update(keys, values, layer.self_attn.layer_idx)
    is_one = (
        keys.shape[0] == hidden_states.shape[0]
        and values.shape[0] == hidden_states.shape[0]
        and keys.shape[2] == values.shape[2]
    )
    if is_one and (mask is None or mask.shape[3] == keys.shape[2]):
        _at_capture(_decide_on_rest)
        at = _region_to_use()
        if at is not None:
            hidden_states = _RESTS[at](layer, hidden_states, mask, cos, sin, keys, values)
            _at_capture(_guard)
            return hidden_states
    _at_capture(_guard)
    return _rest(layer, hidden_states, mask, cos, sin, keys, values)


# ---- decisions, in plain Python while Dynamo traces: they leave no guards


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
    """

    def __init__(self) -> None:
        options = compilation.keywords()["options"] or {}
        self.is_on = options.get("regions", True) is True
        self.entries: dict[str, list[_Entry]] = {}
        self.guards: dict[Any, list[Any] | None] = {}


def _decide_on_layer(context: Any) -> None:
    of_graph = vars(capture.graph_under_capture())
    state = of_graph.get(_STATE)
    if state is None:
        state = of_graph[_STATE] = _State()
    layer, source = capture.object_at_capture(context, "self")
    _decided.state, _decided.source, _decided.firsts = state, source, []
    is_usable = (
        state.is_on
        and source is not None
        and type(layer) is _layer_class
        and not torch.is_grad_enabled()  # AOTAutograd takes not all regions with gradients
        and _known.is_all_of(layer)
        # Other attentions may read arguments that the regions do not pass on.
        and layer.self_attn.config._attn_implementation == "eager"
        and capture.are_tensors(context, "position_embeddings", 2)
        and capture.is_tensor_or_none(context, "attention_mask")
        and not torch_private.are_transforms_active()
        and not capture.is_in_ddp()
        and not capture.are_floats_symbolic()  # a region takes no floats
    )
    _decided.likeness = (
        likeness(layer) if is_usable and not _floats.have_changed(layer, source) else None
    )


_floats = SeenFloats()


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
            if number < _MOST:
                entries.append(entry)
        _decided.at = number if number < _MOST else None
        first = entry.source
        if first == _decided.source or _decided.at is None:
            return
        if first not in state.guards:
            state.guards[first] = capture.guards_on(first)
        if state.guards[first] is None:
            _decided.at = None
        else:
            _decided.firsts.append(first)

    return decide


_decide_on_whole = _decide_on("whole", "hidden_states", "mask", "cos", "sin")
_decide_on_head = _decide_on("head", "hidden_states", "cos", "sin")
_decide_on_rest = _decide_on("rest", "hidden_states", "mask", "cos", "sin", "keys", "values")


def _guard(context: Any) -> None:
    """Guard a layer that got another's graph as that other layer is guarded.

    Dynamo looks whether the guards hold when it reuses a graph, and sets none of them.
    """
    for first in dict.fromkeys(_decided.firsts):
        guards = _decided.state.guards[first]
        capture.guard_alike(guards, first, _decided.source)


@torch.compiler.assume_constant_result
def _may_share() -> bool:
    return _decided.likeness is not None


@torch.compiler.assume_constant_result
def _region_to_use() -> int | None:
    at: int | None = _decided.at
    return at


# ---- where


def prepare(modeling: types.ModuleType) -> bool:
    """Let Dynamo trace regions in place of a decoder layer's forward; False: it is not there yet.

    Nothing is done if the layer is another than the regions are written for.
    """
    global _own, _at_capture, _layer_class, _known, _HEADS, _RESTS, _WHOLES
    layer_class = getattr(modeling, "GptOssDecoderLayer", None)
    if layer_class is None or not hasattr(modeling, "GptOssForCausalLM"):
        return False
    checkpointed = layer_class.forward
    original = getattr(checkpointed, "__wrapped__", checkpointed)
    _own, _layer_class = hub_modules.unsubstituted(original), layer_class
    if not capture.can_capture_regions() or not _fits(modeling):
        return True
    _at_capture = capture.at_capture()
    _HEADS, _RESTS, _WHOLES = _regions(_head), _regions(_rest), _regions(_whole)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # In a piece of `mxfp4_fx.compile` nothing repeats.
        if torch.compiler.is_dynamo_compiling() and compilation.compiling_whole_for():
            return _forward(self, *args, **kwargs)
        return _own(self, *args, **kwargs)

    torch.compiler.substitute_in_graph(original, skip_signature_check=True)(forward)
    if original is checkpointed:  # before transformers 5.?: Dynamo asks for no substitute of it
        layer_class.forward = functools.wraps(original, updated=())(forward)
    with torch.no_grad():
        _known = Known(_small_layer(modeling, 0), modeling)
    return True


def _fits(modeling: types.ModuleType) -> bool:
    """Return whether head, update and rest of a small layer give the bits that the layer gives."""
    try:
        with torch.device("cpu"), torch.no_grad():
            return all(_fits_layer(modeling, at) for at in (0, 1))
    except Exception as error:
        log.info("no nested compile regions: %r", error)
        return False


def _fits_layer(modeling: types.ModuleType, index: int) -> bool:
    layer = _small_layer(modeling, index)
    hidden = torch.arange(24, dtype=torch.float32).cos().reshape(1, 3, 8)
    mask = torch.arange(9, dtype=torch.float32).reshape(1, 1, 3, 3)
    cos, sin = hidden[..., :2], hidden[..., 2:4]
    given = {"attention_mask": mask, "position_embeddings": (cos, sin), "use_cache": True}
    given["position_ids"] = torch.arange(3)[None]
    for cache in (None, modeling.DynamicCache(config=layer.self_attn.config)):
        want = _own(layer, hidden, past_key_values=cache, **given)
        if cache is None:
            got = _whole(layer, hidden, mask, cos, sin)
        else:
            keys, values = _head(layer, hidden, cos, sin)
            fresh = modeling.DynamicCache(config=layer.self_attn.config).update(keys, values, index)
            got = _rest(layer, hidden, mask, cos, sin, *fresh)
        if not torch.equal(got, want):
            return False
    return True


def _small_layer(modeling: types.ModuleType, index: int) -> Any:
    """Make a decoder layer on the CPU. No random numbers are drawn."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "head_dim": 4, "num_attention_heads": 4}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 2}
    config = modeling.GptOssConfig(
        **sizes, **experts, num_hidden_layers=2, vocab_size=8, sliding_window=2
    )
    config._attn_implementation = config._experts_implementation = "eager"
    with torch.device("meta"):
        layer = modeling.GptOssDecoderLayer(config, index).to(torch.float32).eval()
    layer = layer.to_empty(device="cpu")
    for at, parameter in enumerate(layer.parameters()):
        values = torch.arange(parameter.numel(), dtype=torch.float32) + at
        parameter.copy_(values.sin().reshape(parameter.shape))
    return layer
