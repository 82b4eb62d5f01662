"""Tensors whose values are made when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mxfp4_fx.core import torch_private

# Attributes that show or change values ...
_VALUES = {"data", "T", "mT", "H", "mH", "real", "imag"}
# ... and what is known without them: all other attributes, and these methods.
KNOWN = {
    *("__get__", "__set__", "__len__", "size", "stride", "dim", "ndimension", "numel", "nelement"),
    *("element_size", "storage_offset", "is_contiguous", "is_floating_point", "is_complex"),
    *("untyped_storage", "get_device", "is_inference"),
}


class DeferredTensor(torch.Tensor):
    """A tensor on the CPU whose values are made when they are first asked for.

    ``state_dict`` has these in the place of freed weights, so that saving, which asks for one shard
    after the other, never holds them all. Shape, dtype, bytes and identity of the storage are there
    from the beginning; its memory is not touched before.
    """

    _make: Callable[[], Tensor]

    @classmethod
    def of(cls, like: Tensor, make: Callable[[], Tensor]) -> DeferredTensor:
        """``make()`` gives the values, of the shape and dtype of ``like``, on any device."""
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
        """The same memory as a plain tensor, with its values; this one is plain from now on, too.

        (``nn.Parameter`` wants tensors that detach to their own class.)
        """
        with torch_private.as_plain_tensors(), torch.no_grad():
            plain = self.as_subclass(torch.Tensor)
            plain.copy_(self._make())
            del self._make
            self.__class__ = torch.Tensor  # type: ignore[assignment]
            return plain


def name_of(func: Callable[..., Any]) -> str:
    """The name of a function or method, "__get__" or "__set__" of an attribute without values."""
    name = getattr(func, "__name__", "")
    if name not in ("__get__", "__set__"):
        return name
    attribute = getattr(getattr(func, "__self__", None), "__name__", "")
    if attribute not in _VALUES:
        return name
    return attribute if name == "__get__" else f"set {attribute}"
