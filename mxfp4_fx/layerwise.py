"""``mxfp4_fx.compile``: a model compiled layer by layer, the shortest way to its first token.

``torch.compile`` captures the model as a whole, and each layer again. Here all decoder layers share
two compiled pieces, with the update of the KV cache between them, uncompiled. The model around the
layers stays uncompiled too; a large head on a CPU is computed by its native kernel. A call of the
model is one ``calls.Call``, as if it were compiled as a whole.
"""

from __future__ import annotations

import functools
import itertools
import logging
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from mxfp4_fx import calls, limits
from mxfp4_fx.backend import CompiledGraph, compile_graph, mxfp4
from mxfp4_fx.core import (
    compilation,
    torch_private,
    torch_private_dynamo,
    torch_private_forget,
)
from mxfp4_fx.core.errors import OptionError, WholeModelWarning
from mxfp4_fx.core.options import Options
from mxfp4_fx.core.skip import EXACT_LINEARS, Skip, bare
from mxfp4_fx.core.torch_private_direct import Direct
from mxfp4_fx.experts import look_at
from mxfp4_fx.huggingface import decoder_layers, sharing
from mxfp4_fx.layerwise_head import Head
from mxfp4_fx.ops import target
from mxfp4_fx.telling import warn
from mxfp4_fx.weights import mapped

log = logging.getLogger("mxfp4_fx.layerwise")

_numbers = itertools.count()


def compile(
    model: nn.Module,
    *,
    dynamic: bool | None = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Compile a GPT-OSS model of transformers in place, layer by layer, and return it.

    It computes what ``model.compile(backend="mxfp4")`` computes, and takes a fraction of the time
    to compile, because all layers share what is compiled: two pieces, once for prompts and once for
    decoding. A model with layers that cannot be cut so is compiled as a whole, with a
    :class:`WholeModelWarning`.

    Args:
        model: a model, or a part of one; the result of ``torch.compile`` is unwrapped.
        dynamic, mode: as for ``torch.compile``.
        options: as for ``torch.compile(backend="mxfp4", options=...)``.

    Raises:
        OptionError: an option is unknown or has a bad value, or ``model`` is no module.
    """
    model = torch_private.unwrapped(model)
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"mxfp4_fx.compile takes a module, not a {type(model).__name__}: compile functions "
            'with torch.compile(function, backend="mxfp4")'
        )
    parsed = Options.parse(options, mode)
    experts = [module for _, module in look_at(model)[1]]
    # The disk is read while compilers are loaded and work.
    mapped.read_model_ahead(model, experts)
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.is_cpu:
        target.load_ahead(parsed.kernels, parameter.device)
        if parsed.inner == "inductor":
            torch_private_dynamo.prepare_inductor()
    arguments = {"dynamic": dynamic, "mode": mode, "options": dict(options) if options else None}
    found = decoder_layers.layers_of(model, experts)
    shared = _Shared(parsed, arguments, len(found))
    layers = [_Layer(shared, layer, *names) for layer, names in found.items()]
    for module in model.modules():
        if isinstance(torch_private.called_through(module), _Layer | Head | _Top):
            torch_private.call_through(module, None)  # of an earlier call
    if not layers or not all(layer.check() for layer in layers):
        torch_private.call_through(model, shared.compiled_whole(model))
        return model
    _mark_exact_linears(model, layers, parsed)
    shared.compile_pieces()
    sharing.share(found)
    for layer in layers:
        torch_private.call_through(layer.layer, layer)
    if model not in found:
        head = decoder_layers.head_of(model) if parsed.linears else None
        if head is not None:
            name = next(name for name, module in model.named_modules() if module is head)
            torch_private.call_through(head, Head(head, bare(name), parsed))
        torch_private.call_through(model, _Top(shared, model, layers, head))
    return model


def _mark_exact_linears(model: nn.Module, layers: list[_Layer], options: Options) -> None:
    """Let layers of which ``options["skip"]`` names other linears have graphs of their own."""
    skip = Skip(options.skip if options.linears == "mxfp8" else ())
    names = {module: bare(name) for name, module in model.named_modules()}
    for layer in layers:
        exact = [
            name
            for name, module in layer.layer.named_modules()
            if isinstance(module, nn.Linear) and skip.names(names[module])
        ]
        vars(layer.layer)[EXACT_LINEARS] = ",".join(exact)


@compilation.ours_for_parts
def _mxfp4_of_parts(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> CompiledGraph:
    """The backend of the pieces, whose calls belong to the call of the model or the layer."""
    torch_private_forget.forget_sizes()
    called, call = compilation.compiled_function(), calls.current()
    others = None
    if called is not None and call is not None:
        call.traced()
        others = functools.partial(
            sharing.inputs_of_others, called[1][0], called=set(call.called.experts)
        )
    return compile_graph(gm, example_inputs, Options.parse(options, mode), others)


class _Shared:
    """What the layers of a model share.

    Attributes:
        options: the options of :func:`compile`.
        why: why layers are no longer computed in pieces, if they are not.
        cache: the name of the argument that is a layer's cache.
        head, rest, whole: the compiled functions of :class:`decoder_layers.Pieces`.
        plain: (layer, args, kwargs) -> the layer's result, compiled as far as Dynamo gets.
    """

    head: Callable[..., Any]
    rest: Callable[..., Any]
    whole: Callable[..., Any]
    plain: Callable[..., Any]
    cache: str

    def __init__(self, options: Options, arguments: dict[str, Any], count: int) -> None:
        self.options = options
        self.why: str | None = None
        self._arguments = arguments
        self._count = count
        self._kinds: set[tuple[Any, ...]] = set()  # of calls, for which pieces have been compiled

    def compile_pieces(self) -> None:
        pieces = decoder_layers.pieces()
        self.cache = decoder_layers.cache_name()
        self.head, self.rest, self.whole = (self._compiled(piece, True) for piece in pieces)
        self.plain = self._compiled(_plain, False)

    def compiled_whole(self, model: nn.Module) -> Callable[..., Any]:
        return torch.compile(torch_private.uncompiled(model), backend=mxfp4, **self._arguments)

    def _compiled(self, function: Callable[..., Any], fullgraph: bool) -> Callable[..., Any]:
        # Dynamo counts by code: each model has its own, so that none uses up another's limits.
        name = f"{function.__name__}_{next(_numbers)}"
        code = function.__code__.replace(co_name=name)
        limits.share(code, self._count)
        own = types.FunctionType(code, function.__globals__, name, None, function.__closure__)
        torch_private_forget.forget_with(own)
        compiled = torch.compile(
            own, backend=_mxfp4_of_parts, fullgraph=fullgraph, **self._arguments
        )
        torch_private_forget.forget_backend_with(own, compiled)
        return Direct(own, compiled) if fullgraph else compiled

    def is_first(self, kind: tuple[Any, ...]) -> bool:
        """Return whether a call is the first of a kind, for which lengths should be symbolic."""
        if kind in self._kinds or self._arguments["dynamic"] is False:
            return False
        self._kinds.add(kind)
        return True

    def give_up(self, layer: str, why: str) -> None:
        if self.why is None:
            warn(
                f"mxfp4_fx.compile compiles the model as a whole, which takes longer, because "
                f"{layer} cannot be compiled in pieces: {why}",
                WholeModelWarning,
            )
            self.why = why


class _Layer:
    """Calls a decoder layer by its pieces.

    Dynamo, if it captures the call, gets the layer as it is.
    """

    def __init__(self, shared: _Shared, layer: nn.Module, name: str, experts: nn.Module) -> None:
        self.shared = shared
        self.layer: Any = layer
        self.name, self.experts = name or type(layer).__name__, experts
        self._hooks: list[Mapping[int, Any]] = []
        self._count = -1
        self._records = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch_private_dynamo.is_traced():
            return torch_private.uncompiled(self.layer)(*args, **kwargs)
        call = calls.current()
        if call is not None and self.experts in call.called.experts:
            return self._run(args, kwargs)
        with calls.Call(self.shared.options, torch_private.uncompiled(self.layer)):
            return self._run(args, kwargs)

    def check(self) -> bool:
        """Return whether the layer can be computed in pieces; if not, say so."""
        if sum(map(len, self._hooks)) == self._count and "forward" not in vars(self.layer):
            return True
        why = decoder_layers.why_not(self.layer, calls.HOOK)
        if why is not None:
            self.shared.give_up(self.name, why)
            return False
        self._hooks = torch_private.hooks(self.layer.modules())
        self._count = sum(map(len, self._hooks))
        self._records = decoder_layers.has_recorders(self._hooks)
        return True

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        shared, layer = self.shared, self.layer
        why = decoder_layers.why_not_called(shared.cache, kwargs)
        if why is not None:
            shared.give_up(self.name, why)
        if shared.why is not None or not self.check():
            return shared.plain(layer, args, kwargs)
        if len(args) != 1:
            named = {**dict(zip(decoder_layers.argument_names(), args, strict=False)), **kwargs}
            if "hidden_states" not in named:
                return torch_private.uncompiled(layer)(*args, **kwargs)  # the error is the layer's
            args, kwargs = (named.pop("hidden_states"),), named
        updated = cache = None
        try:
            recording = decoder_layers.Recording() if self._records else None
            keys = recording.keys if recording else None
            hidden, named = args[0], kwargs
            if not decoder_layers.drops_cache(layer):
                cache = kwargs.get(shared.cache)
                named = {name: value for name, value in kwargs.items() if name != shared.cache}
            is_first = shared.is_first(_kind(hidden, cache))
            if is_first:
                decoder_layers.let_lengths_vary(hidden, named)
            if cache is None:
                output, found = shared.whole(layer, hidden, named, keys)
            else:
                k, v, more, more_named = shared.head(layer, hidden, named)
                index = layer.self_attn.layer_idx
                updated = decoder_layers.update(cache, k, v, index, more, more_named)
                k, v, changes = updated
                k, v = decoder_layers.for_any_layer(k), decoder_layers.for_any_layer(v)
                if is_first:
                    decoder_layers.let_cache_lengths_vary(k, v)
                output, found = shared.rest(layer, (k, v), changes, hidden, named, keys)
        except _errors() as error:
            shared.give_up(self.name, str(error).partition("\n")[0])
            if updated is not None:  # the cache is
                kwargs = {**kwargs, shared.cache: decoder_layers.GoingOn(*updated, cache)}
            return shared.plain(layer, args, kwargs)
        if recording is not None:
            recording.add(layer, args[0], output, found)
        return output


def _errors() -> tuple[type[Exception], ...]:
    return decoder_layers.CacheUseError, *torch_private_dynamo.capture_errors()


def _kind(hidden: Tensor, cache: Any) -> tuple[Any, ...]:
    return hidden.shape[0], hidden.shape[1] == 1, cache is None, torch.is_grad_enabled()


def _plain(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return torch_private.uncompiled(layer)(*args, **kwargs)


class _Top:
    """Calls the model around the layers, uncompiled."""

    def __init__(
        self, shared: _Shared, model: nn.Module, layers: list[_Layer], head: nn.Module | None
    ) -> None:
        self._shared, self._model = shared, model
        self._parts = [layer.layer for layer in layers] + ([head] if head else [])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = torch_private.uncompiled(self._model)
        if torch_private_dynamo.is_traced():
            return call(*args, **kwargs)
        if self._shared.why is None:
            with calls.Call(self._shared.options, call):
                return call(*args, **kwargs)
        for part in self._parts:
            torch_private.call_through(part, None)
        compiled = self._shared.compiled_whole(self._model)
        torch_private.call_through(self._model, compiled)
        return compiled(*args, **kwargs)
