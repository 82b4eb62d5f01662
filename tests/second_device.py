"""A second device, "far", on a machine without one: its memory is the CPU's, in Python's hands.

Importing this file registers it with torch for the rest of the process. An op on tensors of the
device runs on the CPU tensors behind them, so that its bits are those of the CPU.
"""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "far"

_setup_privateuseone_for_python_backend(NAME)
_on_cpu: dict[int, Tensor] = {}  # key of a storage on the device -> the CPU tensor behind it


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _behind(value: Any) -> Any:
    is_far = isinstance(value, Tensor) and value.device.type == NAME
    return _on_cpu[_key(value)] if is_far else value


def _made_of(value: Any) -> Any:
    """A tensor on the device, made of a CPU tensor."""
    if not isinstance(value, Tensor) or value.device.type == NAME:
        return value
    far = torch._C._acc.create_empty_tensor(tuple(value.shape), value.dtype)
    _on_cpu[_key(far)] = value
    return far


def _empty(size: Any, dtype: torch.dtype | None) -> Tensor:
    # Inside of a kernel of the device, torch cannot choose the CPU by itself.
    return _made_of(torch.from_numpy(numpy.zeros(size, numpy.uint8)).to(dtype or torch.float32))


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    name = str(op)
    if name == "aten.empty.memory_format" or name == "aten.empty_strided.default":
        return _empty(args[0], kwargs.get("dtype"))
    args, kwargs = tree_map(_behind, (args, kwargs))
    if name == "aten._copy_from.default":
        source, target = args[:2]
        target.copy_(source)
        return target if target.device.type != NAME else None
    if name in ("aten.view.default", "aten._reshape_alias.default"):  # strides may be others
        return _made_of(args[0].reshape(args[1]))
    cpu = torch.device("cpu")
    args, kwargs = tree_map_only(torch.device, lambda _: cpu, (args, kwargs))
    return tree_map(_made_of, op(*args, **kwargs))


_LIBRARY = torch.library.Library("_", "IMPL")
_LIBRARY.fallback(_run, "PrivateUse1")
