"""Tensors whose values are computed on first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mxfp4_fx.core import torch_private

# Attributes that read or change values.
_VALUES = {"data", "T", "mT", "H", "mH", "real", "imag"}
# What needs no values: all other attributes, and these methods.
KNOWN = {
    *("__get__", "__set__", "__len__", "size", "stride", "dim", "ndimension", "numel", "nelement"),
    *("element_size", "storage_offset", "is_contiguous", "is_floating_point", "is_complex"),
    *("untyped_storage", "get_device", "is_inference", "_is_view"),
}


class DeferredTensor(torch.Tensor):
    """A tensor on the CPU whose values are computed on first use.

    ``state_dict`` returns these for freed weights. Saving reads one shard after the other, so the
    values of all weights never exist at once. Shape, dtype, and the storage's size and identity are
    known from the beginning; the storage's memory is not touched before the first use.
    """

    _make: Callable[[], Tensor]

    @classmethod
    def of(cls, like: Tensor, make: Callable[[], Tensor]) -> DeferredTensor:
        """Return a deferred tensor of the shape and dtype of ``like``.

        Args:
            like: the tensor that it stands for.
            make: returns the values, of that shape and dtype, on any device.
        """
        with torch_private.as_plain_tensors():
            room = torch.empty(like.shape, dtype=like.dtype, device="cpu")
        deferred = torch_private.make_subclass(cls, room)
        deferred._make = make
        return deferred

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with torch_private.as_plain_tensors():
            if name_of(func) in KNOWN:
                return func(*args, **(kwargs or {}))
            args, kwargs = torch_private.tree_map_only(cls, cls.values, (args, kwargs or {}))
            return func(*args, **kwargs)

    def values(self) -> Tensor:
        """Compute the values and return a plain tensor on the same memory.

        This tensor becomes a plain one, too: ``nn.Parameter`` needs tensors that detach to their
        own class.
        """
        with torch_private.as_plain_tensors(), torch.no_grad():
            plain = self.as_subclass(torch.Tensor)
            plain.copy_(self._make())
            del self._make
            self.__class__ = torch.Tensor  # type: ignore[assignment]
            return plain


def name_of(func: Callable[..., Any]) -> str:
    """Return the name of a function that ``__torch_function__`` receives.

    Access to an attribute that reads values has the name "ATTRIBUTE" or "set ATTRIBUTE"; access to
    any other attribute has the name "__get__" or "__set__".
    """
    name = getattr(func, "__name__", "")
    if name not in ("__get__", "__set__"):
        return name
    attribute = getattr(getattr(func, "__self__", None), "__name__", "")
    if attribute not in _VALUES:
        return name
    return attribute if name == "__get__" else f"set {attribute}"
