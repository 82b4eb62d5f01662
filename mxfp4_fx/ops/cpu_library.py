"""Calls of the native CPU libraries: the libraries themselves, pointers to tensors, status codes.

``native.py`` compiles them on first use, for the instruction set that ``hardware.cpu_path`` names.
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


def weights_library() -> ctypes.CDLL:
    """Return a library with the functions of weights, which does not wait for the kernels."""
    return native.load_weights(hardware.cpu_path())


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def check(status: Any, what: str) -> None:
    if status == errno.EINVAL:
        raise ValueError(f"mxfp4::{what}")
    if status:
        raise MemoryError(f"mxfp4::{what}: no memory left for the kernel's buffers")
