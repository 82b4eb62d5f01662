"""Parameters whose memory was given back: ``options["free_weights"]``.

A freed parameter stays the object that it was, with its shape, dtype and device, because Dynamo's
guards and the swizzled weights go by these. Its values are elsewhere. Who moves, converts, saves or
overwrites it is served; whoever would compute with it gets an error instead of a crash (torch reads
a storage of no bytes without looking).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from mxfp4_fx.core import compilation, torch_private
from mxfp4_fx.core.errors import FreedWeightError
from mxfp4_fx.weights.deferred import KNOWN, DeferredTensor, name_of

_REMEDY = (
    "its memory was given back when it was compiled with options={'free_weights': True}, and its "
    "values are in the compiled graph's layout now. Call the compiled model (if you did, Dynamo "
    "ran a part of it uncompiled: see torch._dynamo.config.recompile_limit), give freed weights "
    "their memory again with mxfp4_fx.restore(model), or compile without free_weights"
)
_MADV_PAGEOUT = 21  # linux/mman.h; kernels before 5.4 refuse it, which is no matter
# What may be asked of a freed parameter besides, or done to it.
_ALLOWED = {
    *("data_ptr", "requires_grad_", "empty_like", "_has_compatible_shallow_copy_type"),
    *KNOWN,
}
# What makes another tensor of it, of another device or dtype, unless there is nothing to do ...
_CONVERSIONS = {
    *("to", "type", "cpu", "cuda", "xpu", "float", "double", "half", "bfloat16"),
}
# ... and what overwrites it.
_OVERWRITES = {"copy_", "zero_", "fill_"}

_read: Callable[[Tensor], Tensor] | None = None


def read_from(values: Callable[[Tensor], Tensor]) -> None:
    """Have freed parameters find their values by this function."""
    global _read
    _read = values


class FreedParameter(nn.Parameter):
    """The class that a parameter has while its memory is given back."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = name_of(func), kwargs or {}
        with torch_private.as_plain_tensors():
            # What another compiler makes of a tensor reads its memory without asking.
            if name in _ALLOWED or (torch.compiler.is_compiling() and compilation.compiling_for()):
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

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # as it is called, so it is
        with torch_private.as_plain_tensors():
            shape, dtype, device = tuple(self.shape), self.dtype, self.device
        return f"FreedParameter({shape}, dtype={dtype}, device='{device}')"

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        _refuse(self, "deepcopy")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse(self, "save")


def is_freed(value: object) -> bool:
    return isinstance(value, FreedParameter)


def can_free(value: Tensor) -> bool:
    """Whether a tensor is a plain parameter: a subclass has its own ways, a buffer has no class.

    One that was made under ``inference_mode`` has no version, by which a change would be noticed.
    """
    if isinstance(value, FreedParameter):
        return True
    # What nn.Parameter makes of a tensor that was deferred is a plain one with a mark.
    is_plain = type(value) is nn.Parameter or (
        type(value) is Tensor and torch_private.has_parameter_mark(value)
    )
    return is_plain and not value.is_inference()


def free(parameters: Sequence[nn.Parameter]) -> bool:
    """Give parameters' memory back; a view of one, if somebody has it, keeps the memory.

    Returns:
        Whether it was; if not, nothing has changed. A device must have room for each of them once
        more for a moment.
    """
    with torch.inference_mode(False), torch.no_grad():
        held = [parameter.detach() for parameter in parameters]
        try:
            rooms = [_no_bytes(tensor) for tensor in held]
        except torch.OutOfMemoryError:
            return False
        for parameter, old, room in zip(parameters, held, rooms, strict=True):
            _page_out(old)
            # The class goes first: an interrupt in between leaves nothing that could be read.
            parameter.__class__ = FreedParameter
            with torch_private.as_plain_tensors():
                parameter.data = room
    return True


def restore(parameter: nn.Parameter, values: Tensor) -> None:
    """Make a freed parameter what it was, with these values of its shape, dtype and device."""
    with torch_private.as_plain_tensors():
        parameter.data = values
    parameter.__class__ = nn.Parameter


def _no_bytes(like: Tensor) -> Tensor:
    """A tensor of the shape, strides, dtype and device of ``like``, with a storage of no bytes."""
    # On a CPU, room that nothing is written to costs nothing.
    room = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    room.untyped_storage().resize_(0)
    return room


def _page_out(tensor: Tensor) -> None:
    """Let go of the pages of a file that is mapped: its mapping lives as long as others use it.

    Nothing is lost: the system reads pages again, and keeps those that were written to.
    """
    storage = tensor.untyped_storage()
    if sys.platform != "linux" or tensor.device.type != "cpu" or storage.resizable():
        return
    start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (storage.data_ptr() + storage.nbytes() - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0:
        advise = ctypes.CDLL(None).madvise
        advise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(_MADV_PAGEOUT))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    elif not isinstance(value, list | tuple):
        yield value
        return
    for item in value:
        yield from _flat(item)


def _values(parameter: Tensor) -> Tensor:
    """What a parameter holds, freed or not."""
    assert _read is not None  # whoever frees can read
    return _read(parameter)


def _converted(freed: FreedParameter, func: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
    """What a conversion makes of it: itself, if it is of that device and dtype already."""
    with torch_private.as_plain_tensors():
        like = torch.empty(0, dtype=freed.dtype, device=freed.device)
    if func(like, *args, **kwargs) is like:
        return freed
    converted: Tensor = func(_values(freed), *args, **kwargs)
    return converted


def _overwritten(freed: FreedParameter, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Give it memory and have that written to."""
    # What is deferred may be its own values.
    args, kwargs = torch_private.tree_map_only(
        DeferredTensor, DeferredTensor.values, (args, kwargs)
    )
    with torch_private.as_plain_tensors(), torch.no_grad():
        room = torch.empty_strided(
            freed.shape, freed.stride(), dtype=freed.dtype, device=freed.device
        )
        func(room, *args, **kwargs)  # before anything is changed: it may fail
    restore(freed, room)
    return freed


def _set_data(freed: FreedParameter, value: Tensor) -> None:
    if value is not freed:
        restore(freed, value.values() if isinstance(value, DeferredTensor) else value)


def _refuse(parameter: FreedParameter, what: str) -> NoReturn:
    raise FreedWeightError(f"{parameter!r} has no values to {what}: {_REMEDY}.")
