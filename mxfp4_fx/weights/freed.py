"""Tensors whose memory was freed: ``options["free_weights"]``.

A freed parameter stays the same object with its shape, dtype and device, because Dynamo's guards
and the store compare these. The store holds its values. Code can move, convert, save and overwrite
it. Code that computes with it gets a ``FreedWeightError``; without that the process would crash,
for torch does not check whether a storage has bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from mxfp4_fx.core import compilation, torch_private
from mxfp4_fx.core.errors import FreedWeightError
from mxfp4_fx.weights import mapped
from mxfp4_fx.weights.deferred import KNOWN, DeferredTensor, name_of

_REMEDY = (
    "its memory was given back when it was compiled with options={'free_weights': True}, and its "
    "values are in the compiled graph's layout now. Call the compiled model (if you did, Dynamo "
    "ran a part of it uncompiled: see torch._dynamo.config.recompile_limit), give freed weights "
    "their memory again with mxfp4_fx.restore(model), or compile without free_weights"
)
# Functions that a freed parameter allows: these read no values.
_ALLOWED = {
    *("data_ptr", "requires_grad_", "empty_like", "_has_compatible_shallow_copy_type"),
    *KNOWN,
}
# What torch 2.12's Dynamo asks while it is not "compiling". An export goes on to read the values.
_ASKED = {"is_conj", "is_neg"}
# Functions that convert it to another device or dtype, or return it if it has these already.
_CONVERSIONS = {
    *("to", "type", "cpu", "cuda", "xpu", "float", "double", "half", "bfloat16"),
}
# Functions that reorder a freed plain tensor.
_REORDERS = {"transpose", "mT", "__getitem__"}
# Functions that overwrite it.
_OVERWRITES = {"copy_", "zero_", "fill_"}

_read: Callable[[Tensor], Tensor] | None = None


def read_from(values: Callable[[Tensor], Tensor]) -> None:
    """Set the function that returns the values of a freed parameter."""
    global _read
    _read = values


class FreedParameter(nn.Parameter):
    """The class of a parameter while its memory is freed."""

    def __new__(cls, data: Any = None, requires_grad: bool = True) -> Any:
        """Return a plain parameter.

        Code that replaces a parameter, such as accelerate's, calls the class of the old one. The
        new one has its own memory.
        """
        return nn.Parameter(data, requires_grad)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = name_of(func), kwargs or {}
        with torch_private.as_plain_tensors():
            # A graph for another backend would read the memory without this check.
            is_asked = name in _ASKED or torch.compiler.is_compiling()
            if name in _ALLOWED or (is_asked and compilation.compiling_for()):
                return func(*args, **kwargs)
        freed = next(a for a in _flat([args, kwargs]) if isinstance(a, FreedParameter))
        if args and args[0] is freed and not torch.compiler.is_compiling():
            if name == "detach":
                return DeferredTensor.of(freed, functools.partial(_values, freed))
            if name in _CONVERSIONS:
                return _converted(freed, func, args[1:], kwargs)
            if name in _OVERWRITES:
                return _overwritten(freed, func, args[1:], kwargs)
            if name == "set data":
                return _set_data(freed, args[1])
        return _refuse(freed, name)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # tensor_contents is ignored
        with torch_private.as_plain_tensors():
            shape, dtype, device = tuple(self.shape), self.dtype, self.device
        return f"FreedParameter({shape}, dtype={dtype}, device='{device}')"

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        _refuse(self, "deepcopy")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse(self, "save")


class FreedTensor(FreedParameter):
    """The class of a plain tensor while its memory is freed: one of transformers' MXFP4 modules.

    Their saving reorders the values, which begins with one of ``_REORDERS``.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        is_first = args and isinstance(args[0], FreedTensor)
        if is_first and name_of(func) in _REORDERS and not torch.compiler.is_compiling():
            return func(_values(args[0]), *args[1:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def is_freed(value: object) -> bool:
    return isinstance(value, FreedParameter)


def can_free(value: Tensor) -> bool:
    """Return whether a tensor can be freed: whether it is a plain parameter with a version.

    Subclasses may behave in other ways, and buffers have no class of their own. A parameter that
    was made under ``inference_mode`` has no version, so the store could not notice a change.
    """
    if isinstance(value, FreedParameter):
        return True
    # nn.Parameter(deferred tensor) is a plain tensor with torch's mark of a parameter.
    is_plain = type(value) is nn.Parameter or (
        type(value) is Tensor and torch_private.has_parameter_mark(value)
    )
    return is_plain and not value.is_inference()


def can_free_plain(value: Tensor) -> bool:
    """Return :func:`can_free` for a tensor that need not be a parameter."""
    return can_free(value) or (type(value) is Tensor and not value.is_inference())


def free(parameters: Sequence[Tensor]) -> bool:
    """Free the memory of parameters, or of plain tensors, which may be views.

    While other tensors have the memory, they keep it. A device needs room for a second copy of
    each tensor for a moment.

    Returns:
        Whether the memory was freed; if not, nothing has changed.
    """
    with torch.inference_mode(False), torch.no_grad():
        held = [parameter.detach() for parameter in parameters]
        try:
            rooms = [_no_bytes(tensor) for tensor in held]
            for parameter in parameters:
                _part_from_base(parameter)
        except (torch.OutOfMemoryError, _StillAView):
            return False
        for parameter, old, room in zip(parameters, held, rooms, strict=True):
            mapped.page_out([old])
            is_parameter = isinstance(parameter, nn.Parameter)
            # The class changes first: an interrupt between the two must leave nothing readable.
            parameter.__class__ = FreedParameter if is_parameter else FreedTensor
            with torch_private.as_plain_tensors():
                parameter.data = room
    return True


def restore(parameter: Tensor, values: Tensor) -> None:
    """Make a freed tensor what it was, with values of its shape, dtype and device."""
    with torch_private.as_plain_tensors():
        parameter.data = values
    parameter.__class__ = Tensor if isinstance(parameter, FreedTensor) else nn.Parameter


class _StillAView(Exception):
    """A view cannot be parted from its base."""


def _part_from_base(tensor: Tensor) -> None:
    """Make a view the same tensor without a base, which would keep the memory alive."""
    if tensor._base is None:
        return
    try:
        torch.utils.swap_tensors(tensor, tensor.data)
    except RuntimeError as error:  # something in torch, or a weak reference, holds it
        raise _StillAView from error


def _no_bytes(like: Tensor) -> Tensor:
    """Return a tensor like ``like`` (shape, strides, dtype, device) with a storage of no bytes."""
    # On a CPU, memory costs nothing until something writes to it.
    room = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    room.untyped_storage().resize_(0)
    return room


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    elif not isinstance(value, list | tuple):
        yield value
        return
    for item in value:
        yield from _flat(item)


def _values(parameter: Tensor) -> Tensor:
    """Return the values of a parameter, freed or not."""
    assert _read is not None  # the store sets it when it is imported
    return _read(parameter)


def _converted(freed: FreedParameter, func: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
    """Return the result of a conversion: ``freed`` itself if it has that device and dtype."""
    with torch_private.as_plain_tensors():
        like = torch.empty(0, dtype=freed.dtype, device=freed.device)
        made = func(like, *args, **kwargs)
        if made is like:
            return freed
        if made.is_meta:  # has no values either; accelerate asks for it after each call
            return func(freed, *args, **kwargs)
    converted: Tensor = func(_values(freed), *args, **kwargs)
    return converted


def _overwritten(freed: FreedParameter, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Give a freed parameter new memory and overwrite that."""
    # A deferred argument may stand for the values of this very parameter.
    args, kwargs = torch_private.tree_map_only(
        DeferredTensor, DeferredTensor.values, (args, kwargs)
    )
    with torch_private.as_plain_tensors(), torch.no_grad():
        room = torch.empty_strided(
            freed.shape, freed.stride(), dtype=freed.dtype, device=freed.device
        )
        func(room, *args, **kwargs)  # it may fail, so the parameter changes after it
    restore(freed, room)
    return freed


def _set_data(freed: FreedParameter, value: Tensor) -> None:
    if value is not freed:
        restore(freed, value.values() if isinstance(value, DeferredTensor) else value)


def _refuse(parameter: FreedParameter, what: str) -> NoReturn:
    raise FreedWeightError(f"{parameter!r} has no values to {what}: {_REMEDY}.")
