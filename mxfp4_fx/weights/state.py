"""The identity and the state of a tensor.

A tensor is the same as long as its `Mark` is the same. Its state is its storage, address, version
and geometry. A change that alters none of these, such as a write through numpy, cannot be noticed.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mxfp4_fx.core.torch_private import TensorGuards, is_wrapper
from mxfp4_fx.core.torch_private_distributed import shard_of

MARK = "_mxfp4_fx_mark"
Geometry = tuple[Any, ...]


class Trace:
    """What is known of a tensor after it is gone.

    Attributes:
        was_found: a call found its weight swizzled, which thus served more than one call.
    """

    __slots__ = ("was_found",)

    def __init__(self) -> None:
        self.was_found = False


class Mark:
    """An attribute of a tensor, or of its storage, that identifies it and is collected with it.

    ``torch.utils.swap_tensors`` refuses tensors that have weak references. It swaps attributes
    and implementation together, so the mark stays with its implementation.

    Attributes:
        impl: the address of its owner's implementation. A copy of a tensor may copy the attribute,
            but has another implementation.
        keep: the user restored the tensor, so it is not freed again.
        kept: the tensor's memory could not be freed, and is not tried again.
        told: the store has warned that the weight is swizzled at each call.
        trace: outlives the mark where somebody holds it.
        is_shard: the tensor is what a DTensor wraps.
        moved: when the weight was swizzled last, its storage had new memory.
        seen: the version of a DTensor when the store last saw it; None if it has not.
    """

    __slots__ = (
        "__weakref__", "impl", "is_shard", "keep", "kept", "moved", "seen", "told", "trace",
    )  # fmt: skip

    def __init__(self, impl: int) -> None:
        self.impl, self.keep, self.kept, self.told = impl, False, False, False
        self.is_shard = self.moved = False
        self.seen: int | None = None
        self.trace = Trace()

    def __reduce__(self) -> tuple[Any, ...]:
        return set, ()  # a pickled parameter refers to nothing of this package


Owner = Tensor | torch.UntypedStorage


def owner_of(tensor: Tensor) -> Owner:
    """Return what has the mark of a tensor.

    That is its storage if :func:`mark_storage` marked that, otherwise the tensor itself, or the
    base of a view: each call may make its views anew. Views of inference tensors know no base, so
    the storage has their mark, too.
    """
    storage = tensor.untyped_storage()
    if hasattr(storage, MARK):
        return storage
    base = tensor._base
    if base is None and tensor.is_inference() and not isinstance(tensor, nn.Parameter):
        return storage
    return tensor if base is None else base


def is_written(whole: Tensor) -> bool:
    """Return whether a DTensor is new to the store, or was written to since this was last asked.

    A write through a DTensor (``copy_``, ``load_state_dict``, an optimizer's step) raises its own
    version only, a write to its shard the shard's. An inference tensor has no version.
    """
    mark = _mark(whole)
    version = 0 if whole.is_inference() else whole._version
    if mark.seen == version:
        return False
    mark.seen = version
    mark_of(shard_of(whole)).is_shard = True
    return True


def mark_of(tensor: Tensor) -> Mark:
    """Return the mark of a tensor; make it if there is none."""
    return _mark(owner_of(tensor))


def mark_storage(tensor: Tensor, mark: Mark | None = None) -> Mark:
    """Mark a tensor's storage, because other code replaces the tensor by views of it.

    Args:
        tensor: the tensor.
        mark: the mark that its former storage had, if it has a new one.
    """
    storage = tensor.untyped_storage()
    if mark is not None:
        mark.impl = storage._cdata
        setattr(storage, MARK, mark)
    return _mark(storage)


def _mark(owner: Owner) -> Mark:
    mark = getattr(owner, MARK, None)
    if type(mark) is not Mark or mark.impl != owner._cdata:
        mark = Mark(owner._cdata)
        setattr(owner, MARK, mark)
    return mark


@dataclasses.dataclass(slots=True)
class State:
    """Where a tensor's values are, and autograd's count of their changes.

    Attributes:
        storage: the tensor's storage.
        address: the address of the first element.
        end: the address behind the last element.
        version: autograd's count; None for an inference tensor, which has none.
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
    """The state of a certain tensor at one time.

    Attributes:
        mark: the tensor's mark.
        impl: the address of the tensor's implementation.
        is_freed: only the weight swizzled from the tensor holds its values.
    """

    mark: weakref.ref[Mark]
    impl: int
    is_freed: bool

    @classmethod
    def of(
        cls, tensor: Tensor, is_freed: bool, forget: Callable[[weakref.ref[Mark]], None]
    ) -> TensorState:
        """Return the present state. Python calls ``forget`` when the tensor is collected."""
        mark = mark_of(tensor)
        return cls(*_state(tensor), weakref.ref(mark, forget), mark.impl, is_freed)

    def renew(self, tensor: Tensor) -> None:
        """Take on the tensor's present state after its memory was freed or restored."""
        self.impl = mark_of(tensor).impl
        self.storage, self.address, self.end, self.version = _state(tensor)

    def is_current(self, tensor: Tensor, impl: int) -> bool:
        """Return whether a tensor is in this state.

        Args:
            tensor: the tensor.
            impl: the address of its implementation, or of its base's if it is a view.
        """
        return (
            self.impl == impl
            # The storage's address would not do: a new storage may have that of an earlier one.
            and self.storage() is tensor.untyped_storage()
            and self.address == tensor.data_ptr()
            and (self.version is None or self.version == tensor._version)
        )


def states_of(tensor: Tensor) -> Iterator[State]:
    """Yield the state of a tensor, or of the tensors that it wraps, as a DTensor does."""
    if is_wrapper(tensor):
        parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        for part in parts:  # a DTensor's mesh is among them
            if isinstance(part, Tensor):
                yield from states_of(part)
    elif tensor.layout is torch.strided:
        yield State(*_state(tensor))


def geometry_of(tensor: Tensor) -> Geometry:
    """Return what decides how the values are read from memory, such as strides and dtype."""
    place = (tensor.shape, tensor.stride(), tensor.storage_offset())
    return *place, tensor.dtype, tensor.device, tensor.is_neg(), tensor.is_conj()


def guards_of(tensors: tuple[Tensor, ...]) -> Callable[..., bool]:
    """Return a fast check that other tensors have the geometry, class and modes of these."""
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
