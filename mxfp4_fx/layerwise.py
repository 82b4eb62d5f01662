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
    profiling,
    torch_private,
    torch_private_dynamo,
    torch_private_forget,
)
from mxfp4_fx.core.errors import OptionError, WholeModelWarning
from mxfp4_fx.core.formats import BLOCK
from mxfp4_fx.core.hardware import DTYPES
from mxfp4_fx.core.layouts import MXFP8_ROWS
from mxfp4_fx.core.options import Options
from mxfp4_fx.core.skip import EXACT_LINEARS, Skip, bare
from mxfp4_fx.core.torch_private_direct import Direct
from mxfp4_fx.experts import look_at
from mxfp4_fx.huggingface import decoder_layers, sharing
from mxfp4_fx.ops import target
from mxfp4_fx.passes import linear_verification
from mxfp4_fx.passes.report import Miss
from mxfp4_fx.telling import tell_of_linears, warn
from mxfp4_fx.weights import mapped
from mxfp4_fx.weights.freed import FreedParameter
from mxfp4_fx.weights.source import LINEAR, Source
from mxfp4_fx.weights.store import STORE

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
    mapped.read_ahead(tensor for module in experts for tensor in module.parameters())
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
        if isinstance(torch_private.called_through(module), _Layer | _Head | _Top):
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
            torch_private.call_through(head, _Head(head, bare(name), parsed))
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


class _Head:
    """Calls the model's last linear as an op that reads the weight once, or reads it in MXFP8.

    Compiled, it would be a graph for prompts, one for decoding and one for further prompts.
    """

    def __init__(self, head: nn.Linear, name: str, options: Options) -> None:
        self._head, self._name, self._options = head, name, options
        self._hooks = torch_private.hooks([head])
        self._is_verified = not options.verify
        self._is_skipped = Skip(options.skip).names(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and type(args[0]) is Tensor:
            head, x = self._head, args[0]
            if self._options.linears == "mxfp8" and not self._is_skipped:
                why = self._why_exact(x)
                if why is None:
                    return self._in_mxfp8(x)
                miss = Miss(self._name, why)
                log.info("not in MXFP8: %s", miss)
                tell_of_linears([miss], [head], self._options)
            if self._is_for_op(x):
                return torch.ops.mxfp4.linears(x, [head.weight], [head.bias], "cpu")[0]
        return torch_private.uncompiled(self._head)(*args, **kwargs)

    def _is_for_op(self, x: Tensor) -> bool:
        """Return whether the op computes what the linear does now, as ``lower_linears`` has it."""
        head = self._head
        held = [head.weight, *([] if head.bias is None else [head.bias])]
        return (
            all(type(tensor) is nn.Parameter for tensor in held)
            and all(tensor.is_cpu and tensor.dtype == x.dtype for tensor in (x, *held))
            and target.linears_pay(held[:1])
            and not any(self._hooks)
            and "forward" not in vars(head)
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch_private.are_transforms_active()
            and not torch_private_dynamo.is_traced()
            and self._has_kernels
        )

    def _why_exact(self, x: Tensor) -> str | None:
        """Return why the op does not compute what the linear does now, or None if it does."""
        head = self._head
        held = [head.weight, *([] if head.bias is None else [head.bias])]
        if not all(type(tensor) in (nn.Parameter, FreedParameter) for tensor in held):
            return "an operand is of a subclass of Tensor"
        if any(tensor.dtype != x.dtype for tensor in held) or x.dtype not in DTYPES:
            return "its operands must have one dtype of float32, bfloat16 and float16"
        if any(tensor.device != x.device for tensor in held):
            return "its operands are on several devices"
        if x.shape[-1:] != (head.in_features,) or head.in_features % BLOCK:
            return f"MXFP8 needs a multiple of {BLOCK} input features"
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in held):
            return "its weight requires a gradient: run under torch.no_grad()"
        if any(self._hooks) or "forward" in vars(head):
            return "it has hooks or a forward of its own"
        if torch.is_autocast_enabled(x.device.type):
            return "autocast is on"
        if torch_private.are_transforms_active() or torch_private_dynamo.is_traced():
            return "it is inside a function transform or another compilation"
        return None

    def _in_mxfp8(self, x: Tensor) -> Tensor:
        head, options = self._head, self._options
        chosen = target.choose(x.device, options.kernels)
        kernels = target.mxfp8_kernels(chosen, x.device)
        source, name = Source((head.weight,), LINEAR), f"weight of {self._name}"
        call = calls.current()
        with torch_private.as_plain_tensors():
            if (
                options.free_weights
                and call is not None
                and STORE.can_free(source, MXFP8_ROWS)
                and not call.called.is_shared(head.weight)
            ):
                STORE.free(source, MXFP8_ROWS, name)
            codes, scales = STORE.get(source, MXFP8_ROWS, name)
            if profiling.is_on():
                profiling.name(codes, self._name)
            # The op reads no freed memory.
            result = torch.ops.mxfp4.linears_mxfp8(x, [codes], [scales], [head.bias], kernels)[0]
            if not self._is_verified:
                original = nn.functional.linear(x, head.weight, head.bias)
                operands = (x, head.weight, head.bias)
                linear_verification.compare(self._name, original, result, *operands)
                self._is_verified = True
        return result

    @functools.cached_property
    def _has_kernels(self) -> bool:
        return target.has_native_linears(self._options.kernels)


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
