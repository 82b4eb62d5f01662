"""Calls of the native CPU library: the library itself, pointers to tensors, status codes.

``native.py`` compiles the library on first use, for the instruction set that ``hardware.cpu_path``
names.
"""

from __future__ import annotations

import ctypes
import errno
from typing import Any

from torch import Tensor

from mxfp4_fx.core import hardware
from mxfp4_fx.ops import native


def library() -> ctypes.CDLL:
    return native.load(hardware.cpu_path())


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def check(status: Any, what: str) -> None:
    if status == errno.EINVAL:
        raise ValueError(f"mxfp4::{what}")
    if status:
        raise MemoryError(f"mxfp4::{what}: no memory left for the kernel's buffers")
