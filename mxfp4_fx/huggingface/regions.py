"""Nested compile regions around a model's repeated layer, set while this backend captures.

Dynamo traces a region once and reuses its graph for layers that are alike; so does Inductor with
what it compiles. Without a cache, a region is a whole decoder layer. With one it is two, because a
region may not write to a cache: the *head* computes keys and values, the model updates its cache,
and the *rest* of the layer computes all else.

Both run transformers' own forward of the layer, with an object in the place of the cache: the
head's takes keys and values and ends the forward, the rest's gives them back. What neither needs is
dead code. `region_trial.py` tries this at first, so that nothing of it is taken for granted.

A layer is captured as usual where this would not be known to serve: `region_choice.py` decides, and
says why.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mxfp4_fx.core import compilation
from mxfp4_fx.core import torch_private_capture as capture
from mxfp4_fx.huggingface import hub_modules, region_trial
from mxfp4_fx.huggingface import region_choice as choice
from mxfp4_fx.huggingface.decoder_layers import (
    CACHE_NAMES,
    CacheUseError,
    Giving,
    Taken,
    Taking,
    cache_name,
)
from mxfp4_fx.huggingface.likeness import Known

# Set by `prepare`: the layer's own forward, and what Dynamo calls while it traces.
_own: Callable[..., Any]
_at_capture: Any
_hands_arguments = False  # whether attention hands its cache the arguments that it does not name


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
        for at in range(choice.MOST)
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
    given_cache: Any = None,
    use_cache: Any = False,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> Any:
    """Stand for the decoder layer's forward while Dynamo traces for this backend."""
    _at_capture(choice.decide_on_layer)
    if choice.may_share():
        if not _are_sizes_one(self, hidden_states, attention_mask, position_embeddings[0]):
            _at_capture(choice.note_sizes)
        elif given_cache is None:
            cos, sin = position_embeddings
            return _without_cache(self, hidden_states, attention_mask, cos, sin)
        else:
            cos, sin = position_embeddings
            _at_capture(choice.decide_on_head)
            at = choice.region_to_use()
            if at is not None:
                keys, values = _HEADS[at](self, hidden_states, cos, sin)
                more = {}
                if _hands_arguments:
                    more["kwargs"] = {"position_ids": position_ids, "use_cache": use_cache}
                    more["kwargs"].update(kwargs)
                index = self.self_attn.layer_idx
                keys, values = given_cache.update(keys, values, index, **more)
                return _behind_update(self, hidden_states, attention_mask, cos, sin, keys, values)
    return _own(
        self,
        hidden_states,
        attention_mask,
        position_ids,
        given_cache,
        use_cache,
        position_embeddings,
        **kwargs,
    )


def _without_cache(
    layer: Any, hidden_states: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor
) -> Any:
    if mask is None or mask.shape[3] == hidden_states.shape[1]:
        _at_capture(choice.decide_on_whole)
        at = choice.region_to_use()
        if at is not None:
            hidden_states = _WHOLES[at](layer, hidden_states, mask, cos, sin)
            _at_capture(choice.guard)
            return hidden_states
    else:
        _at_capture(choice.note_sizes)
    return _whole(layer, hidden_states, mask, cos, sin)


def _behind_update(
    layer: Any,
    hidden_states: Tensor,
    mask: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Any:
    is_one = (
        keys.shape[0] == hidden_states.shape[0]
        and values.shape[0] == hidden_states.shape[0]
        and keys.shape[2] == values.shape[2]
    )
    if is_one and (mask is None or mask.shape[3] == keys.shape[2]):
        _at_capture(choice.decide_on_rest)
        at = choice.region_to_use()
        if at is not None:
            hidden_states = _RESTS[at](layer, hidden_states, mask, cos, sin, keys, values)
            _at_capture(choice.guard)
            return hidden_states
    else:
        _at_capture(choice.note_sizes)
    _at_capture(choice.guard)
    return _rest(layer, hidden_states, mask, cos, sin, keys, values)


# ---- where


def prepare(modeling: types.ModuleType) -> bool:
    """Let Dynamo trace regions in place of a decoder layer's forward; False: it is not there yet.

    Nothing is done if the layer is another than the regions are written for.
    """
    global _own, _at_capture, _hands_arguments, _HEADS, _RESTS, _WHOLES
    layer_class = getattr(modeling, "GptOssDecoderLayer", None)
    if layer_class is None or not hasattr(modeling, "GptOssForCausalLM"):
        return False
    checkpointed = layer_class.forward
    original = getattr(checkpointed, "__wrapped__", checkpointed)
    _own = hub_modules.unsubstituted(original)
    if not capture.can_capture_regions():
        choice.found_none(layer_class, "regions need torch 2.13")
        return True
    try:
        tried = region_trial.Regions(_own, _head, _rest, _whole)
        _hands_arguments = region_trial.hands_arguments(tried, modeling)
    except region_trial.NoRegionsError as error:
        choice.found_none(layer_class, f"regions are not for this transformers: {error}")
        return True
    _at_capture = capture.at_capture()
    _HEADS, _RESTS, _WHOLES = _regions(_head), _regions(_rest), _regions(_whole)
    name, others = cache_name(), {*CACHE_NAMES} - {cache_name()}

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # In a piece of `mxfp4_fx.compile` nothing repeats.
        if torch.compiler.is_dynamo_compiling() and compilation.compiling_whole_for():
            if any(other in kwargs for other in others):
                _at_capture(choice.note_name)
                return _own(self, *args, **kwargs)
            if name in kwargs:
                kwargs["given_cache"] = kwargs.pop(name)
            return _forward(self, *args, **kwargs)
        return _own(self, *args, **kwargs)

    torch.compiler.substitute_in_graph(original, skip_signature_check=True)(forward)
    if original is checkpointed:  # before transformers 5.?: Dynamo asks for no substitute of it
        layer_class.forward = functools.wraps(original, updated=())(forward)
    with torch.no_grad():
        choice.found(layer_class, Known(region_trial.small_layer(modeling, 0), modeling))
    return True
