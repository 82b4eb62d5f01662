"""Which tensor is which, and the state that it is in.

A tensor is the same while its `Mark` is; its state is its storage, address and version, and its
geometry. What neither of them shows, such as writes through numpy, nobody can see.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mxfp4_fx.core.torch_private import TensorGuards, is_wrapper

MARK = "_mxfp4_fx_mark"
Geometry = tuple[Any, ...]


class Mark:
    """Stands for a tensor, as an attribute of it, and dies with it.

    A weak reference to the tensor would keep ``torch.utils.swap_tensors`` from it. Here attributes
    and implementation change places together, and go on belonging to each other.

    Attributes:
        impl: the tensor's implementation: a copy that has the attribute, too, has another.
        keep: the user had the tensor restored: it is not freed again.
        told: the user knows that it is swizzled at each call.
    """

    __slots__ = ("__weakref__", "impl", "keep", "told")

    def __init__(self, impl: int) -> None:
        self.impl, self.keep, self.told = impl, False, False

    def __reduce__(self) -> tuple[Any, ...]:
        return set, ()  # a parameter that is saved takes nothing of this package along


def owner_of(tensor: Tensor) -> Tensor:
    """The tensor itself, or what it is a view of: views may be made anew for each call."""
    base = tensor._base
    return tensor if base is None else base


def mark_of(tensor: Tensor) -> Mark:
    """The mark of a tensor, or of what it is a view of; made if there is none."""
    owner = owner_of(tensor)
    mark = getattr(owner, MARK, None)
    if type(mark) is not Mark or mark.impl != owner._cdata:
        mark = Mark(owner._cdata)
        setattr(owner, MARK, mark)
    return mark


@dataclasses.dataclass(slots=True)
class State:
    """Where a tensor's values are, and how often autograd saw them change.

    Attributes:
        end: the address behind the last element.
        version: None of an inference tensor, which has none.
    """

    storage: weakref.ref[torch.UntypedStorage]
    address: int
    end: int
    version: int | None

    def overlaps(self, other: State) -> bool:
        storage = self.storage()
        return (
            storage is not None
            and storage is other.storage()
            and self.address < other.end
            and other.address < self.end
        )


@dataclasses.dataclass(slots=True)
class TensorState(State):
    """A tensor and the state that it was in.

    Attributes:
        is_freed: its values are in what was swizzled from it, and nowhere else.
    """

    mark: weakref.ref[Mark]
    impl: int
    is_freed: bool

    @classmethod
    def of(
        cls, tensor: Tensor, is_freed: bool, forget: Callable[[weakref.ref[Mark]], None]
    ) -> TensorState:
        """The present state; ``forget`` is called when the tensor is gone."""
        mark = mark_of(tensor)
        return cls(*_state(tensor), weakref.ref(mark, forget), mark.impl, is_freed)

    def renew(self, tensor: Tensor) -> None:
        """The tensor's memory was given back, or given again, and nothing else was changed."""
        self.storage, self.address, self.end, self.version = _state(tensor)

    def is_current(self, tensor: Tensor, impl: int) -> bool:
        """Whether this is the state of a tensor; ``impl``: of it, or of what it is a view of."""
        return (
            self.impl == impl
            # Not by its address, which may be that of an earlier one.
            and self.storage() is tensor.untyped_storage()
            and self.address == tensor.data_ptr()
            and (self.version is None or self.version == tensor._version)
        )


def states_of(tensor: Tensor) -> Iterator[State]:
    """The state of a tensor, or of those that it wraps, such as a DTensor's part of it."""
    if is_wrapper(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from states_of(getattr(tensor, name))
    elif tensor.layout is torch.strided:
        yield State(*_state(tensor))


def geometry_of(tensor: Tensor) -> Geometry:
    """How the values are read from memory."""
    place = (tensor.shape, tensor.stride(), tensor.storage_offset())
    return *place, tensor.dtype, tensor.device, tensor.is_neg(), tensor.is_conj()


def guards_of(tensors: tuple[Tensor, ...]) -> Callable[..., bool]:
    """Whether tensors have this geometry, asked at once; and this class, mode and so on."""
    check: Callable[..., bool] = TensorGuards(
        *tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None
    ).check
    return check


def _state(tensor: Tensor) -> tuple[weakref.ref[torch.UntypedStorage], int, int, int | None]:
    address = tensor.data_ptr()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    version = None if tensor.is_inference() else tensor._version
    end = address + (last + 1) * tensor.element_size()
    return weakref.ref(tensor.untyped_storage()), address, end, version
