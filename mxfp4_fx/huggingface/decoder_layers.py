"""GPT-OSS's decoder layers in two pieces, with the update of the KV cache between them.

A layer's attention hands the new keys and values to the cache and goes on with those that the cache
returns. The pieces run the layer's own code with a cache of this file in place of the model's:
:class:`Taking` takes the keys and values and ends the layer there, :class:`Giving` returns given
ones. So nothing of a piece depends on the cache or on the layer's number, and all layers share the
code that is compiled. The input's norm is computed in both pieces; what else the first computes is
not used in the second, and compilers drop it.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from mxfp4_fx.core import torch_private, torch_private_dynamo
from mxfp4_fx.core.skip import EXACT_LINEARS

_MODELING = "transformers.models.gpt_oss.modeling_gpt_oss"
_CAPTURING = "transformers.utils.output_capturing"
CACHE_NAMES = ("past_key_values", "cache")  # before and from transformers 5.24
# Dimensions of a layer's inputs that are numbers of tokens.
_LENGTHS = {
    "attention_mask": (-2, -1),
    "position_ids": (-1,),
    "position_embeddings": (1,),
    "cache_position": (0,),
}


class CacheUseError(Exception):
    """A layer uses its cache in another way than by one ``update``."""


class Taken(Exception):
    """Ends a layer's forward: its keys and values are taken."""


class Taking:
    """A cache that takes the new keys and values, and lets the layer come no further."""

    def __init__(self) -> None:
        self.taken: tuple[Tensor, Tensor] | None = None
        self.more: tuple[Any, ...] = ()
        self.named: dict[str, Any] = {}

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *more: Any, **named: Any) -> None:
        # Not even reading the number of the layer: Dynamo would guard it.
        self.taken, self.more, self.named = (k, v), more, named
        raise Taken


class Giving:
    """A cache whose first update has been made; it returns the keys and values of that one.

    ``changes`` are those of that update: see :func:`update`.
    """

    def __init__(self, k: Tensor, v: Tensor, changes: Mapping[str, Any] | None = None) -> None:
        self.given: tuple[Tensor, Tensor] | None = (k, v)
        self.changes = changes

    def update(
        self, k: Tensor, v: Tensor, layer_idx: int, *more: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        given, self.given = self.given, None
        if given is None:
            raise CacheUseError("it updates its cache more than once")
        if self.changes:
            named["kwargs"].update(self.changes)
        return given


class GoingOn(Giving):
    """The same in place of a real cache, which serves what follows the first update."""

    def __init__(self, k: Tensor, v: Tensor, changes: Mapping[str, Any], cache: Any) -> None:
        super().__init__(k, v, changes)
        self._cache = cache

    def update(self, *args: Any, **kwargs: Any) -> Any:
        update = self._cache.update if self.given is None else super().update
        return update(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class Pieces(NamedTuple):
    """Functions to compile.

    Attributes:
        head: (layer, hidden states, other arguments) -> new keys and values, and the further
            arguments of the cache's update.
        rest: (layer, keys and values of the cache, changes by its update, hidden states, other
            arguments, what to record) -> the layer's output, and what was recorded.
        whole: (layer, hidden states, other arguments, what to record) -> the same.
    """

    head: Callable[..., Any]
    rest: Callable[..., Any]
    whole: Callable[..., Any]


def pieces() -> Pieces:
    """Return new functions, which share code with those of other calls."""
    cache = cache_name()
    collector = _collector()

    def head(layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Any:
        len(getattr(layer, EXACT_LINEARS, ""))  # Dynamo guards what it reads
        taking = Taking()
        try:  # noqa: SIM105 - Dynamo traces this better
            layer.forward(hidden, **kwargs, **{cache: taking})
        except Taken:
            pass
        if taking.taken is None:
            raise CacheUseError("it does not update its cache")
        return *taking.taken, taking.more, taking.named

    def recorded(layer: Any, hidden: Tensor, kwargs: dict[str, Any], keys: Any) -> Any:
        len(getattr(layer, EXACT_LINEARS, ""))
        if keys is None:  # nothing in the layer has a hook that records
            return layer.forward(hidden, **kwargs), None
        # While Dynamo traces, the collector is a global variable, which is reset here too.
        found: dict[str, list[Any]] = {key: [] for key in keys}
        token = collector.set(found)
        try:
            output = layer.forward(hidden, **kwargs)
        finally:
            collector.reset(token)
        return output, found

    def rest(
        layer: Any, kv: Any, changes: Any, hidden: Tensor, kwargs: dict[str, Any], keys: Any
    ) -> Any:
        k, v = kv
        return recorded(layer, hidden, {**kwargs, cache: Giving(k, v, changes)}, keys)

    def whole(layer: Any, hidden: Tensor, kwargs: dict[str, Any], keys: Any) -> Any:
        return recorded(layer, hidden, kwargs, keys)

    return Pieces(head, rest, whole)


def update(
    cache: Any, k: Tensor, v: Tensor, index: int, more: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Update a cache as a layer does, with what the head returned.

    Returns:
        The cache's keys and values, and what it changed of the arguments that attention handed it
        (``kwargs``, from transformers 5.24 on): paged caches tell attention so where they are.
    """
    handed = named.get("kwargs") or {}
    before = dict(handed)
    k, v = cache.update(k, v, index, *more, **named)
    missing = object()
    changes = {n: value for n, value in handed.items() if before.get(n, missing) is not value}
    return k, v, changes


def cache_name() -> str:
    """Return the name of the argument that is a decoder layer's cache."""
    known = inspect.signature(sys.modules[_MODELING].GptOssDecoderLayer.forward).parameters
    return next(name for name in reversed(CACHE_NAMES) if name in known)


@functools.cache
def argument_names() -> tuple[str, ...]:
    """Return the names of a decoder layer's arguments, in order."""
    known = inspect.signature(sys.modules[_MODELING].GptOssDecoderLayer.forward).parameters
    return tuple(known)[1:]


def drops_cache(layer: Any) -> bool:
    """Return whether a layer takes no cache because it will be computed again in the backward."""
    return layer.training and getattr(layer, "gradient_checkpointing", False)


def layers_of(top: nn.Module, experts: Iterable[nn.Module]) -> dict[nn.Module, tuple[str, Any]]:
    """Return the layers that hold experts -> (name, experts).

    A layer is a decoder layer of GPT-OSS, or else the outermost entry of a ``ModuleList`` with the
    experts in it, or the experts alone.
    """
    modules = dict(top.named_modules())
    names = {module: name for name, module in modules.items()}
    found = {}
    for module in experts:
        parts = names[module].split(".")
        above = [".".join(parts[:count]) for count in range(len(parts) + 1)]
        chosen = [name for name in above if type(modules[name]) is _known_class()]
        listed = [
            inner
            for outer, inner in itertools.pairwise(above)
            if isinstance(modules[outer], nn.ModuleList)
        ]
        name = [*chosen, *listed, names[module]][0]
        found[modules[name]] = name, module
    return found


def head_of(model: Any) -> nn.Linear | None:
    """Return the linear that gives a transformers model's logits, if it is torch's own class."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return head if type(head) is nn.Linear and torch_private.called_through(head) is None else None


def _known_class() -> Any:
    return getattr(sys.modules.get(_MODELING), "GptOssDecoderLayer", None)


def why_not(layer: Any, ours: int) -> str | None:
    """Return why a layer cannot be computed in pieces, or None.

    Args:
        ours: the key of this package's own hooks.
    """
    if type(layer) is not _known_class():
        return f"it is a {type(layer).__name__}, and not a GptOssDecoderLayer of transformers"
    attention = layer.self_attn
    if type(attention) is not sys.modules[_MODELING].GptOssAttention:
        return f"its attention is a {type(attention).__name__}, and not a GptOssAttention"
    for name, module in _before_the_update(layer):
        if "forward" in vars(module):
            return f"the forward of {name or 'it'} was replaced"
    for name, module in [("", None), *layer.named_modules()]:
        for held in torch_private.hooks([module] if module is not None else []):
            for key, hook in held.items():
                if key != ours and not is_recorder(hook):
                    where = "every module" if module is None else name or "it"
                    told = getattr(hook, "__qualname__", type(hook).__name__)
                    return f"{where} has a hook, {told}, which would run in each piece"
    return None


def why_not_called(cache: str, kwargs: Mapping[str, Any]) -> str | None:
    """Return why a call of a layer cannot be computed in pieces, or None.

    Args:
        cache: the name of the argument that is a layer's cache.
        kwargs: the call's arguments; a paged cache, of continuous batching, is always ``cache``.
    """
    if cache != "cache" and kwargs.get("cache") is not None:
        return (
            "its attention updates the cache of continuous batching out of a compiler's sight; "
            "transformers 5.24 updates it in the layer, which is then compiled in pieces"
        )
    return None


def _before_the_update(layer: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that both pieces call."""
    yield "", layer
    yield from layer.input_layernorm.named_modules(prefix="input_layernorm")
    yield from layer.self_attn.named_modules(prefix="self_attn")


def _collector() -> Any:
    """Return transformers' variable with the lists in which hooks record outputs."""
    return sys.modules[_CAPTURING]._active_collector


def is_recorder(hook: Any) -> bool:
    """Return whether a hook is transformers', for ``output_attentions`` and the like."""
    name = getattr(hook, "__qualname__", "")
    return getattr(hook, "__module__", "") == _CAPTURING and name.endswith("output_capturing_hook")


def has_recorders(hooks: Iterable[Mapping[int, Any]]) -> bool:
    return any(is_recorder(hook) for held in hooks for hook in held.values())


class Recording:
    """What transformers' hooks are to record of one layer's call.

    Attributes:
        keys: the outputs of modules in the layer that are wanted.
    """

    def __init__(self) -> None:
        self._lists: Mapping[str, Any] = _collector().get() or {}
        self.keys = tuple(
            key for key in self._lists if key != "hidden_states" and not key.startswith("_")
        )

    def add(self, layer: nn.Module, hidden: Tensor, output: Any, found: Mapping[str, Any]) -> None:
        """Record what the pieces found; the layer's own hooks run now, uncompiled."""
        for key in self.keys:
            self._lists[key].extend(found[key])
        for hook in layer._forward_hooks.values():
            hook(layer, (hidden,), output)


def let_lengths_vary(hidden: Tensor, kwargs: Mapping[str, Any]) -> None:
    """Let Dynamo compile what takes a layer's inputs for any number of tokens."""
    torch_private_dynamo.let_vary(hidden, [1])
    for name, dims in _LENGTHS.items():
        given = kwargs.get(name)
        for value in given if isinstance(given, tuple) else (given,):
            if isinstance(value, Tensor):
                torch_private_dynamo.let_vary(value, [dim for dim in dims if -dim <= value.ndim])


def let_cache_lengths_vary(*states: Tensor) -> None:
    """The same for keys and values [batch, heads, tokens, head_dim]."""
    for state in states:
        torch_private_dynamo.let_vary(state, [2])


def for_any_layer(states: Tensor) -> Tensor:
    """Return keys or values of a cache as an object that Dynamo does not tell from other layers'.

    Of a prompt that is longer than its window, a static cache returns what it was given: values
    with other strides than those that it stores.
    """
    states = torch_private_dynamo.without_address(states)
    return states if states.is_contiguous() else states.contiguous()
