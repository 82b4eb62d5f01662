"""The arguments of the native CPU kernels as bytes: the structs of ``cpu_kernels/api.h``.

Packing bytes costs a tenth of filling a ``ctypes.Structure``. All pointers and 8-byte numbers of a
struct come before its 4-byte numbers, so that nothing lies between them.
"""

from __future__ import annotations

import functools
import itertools
import re
import struct

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # mxfp4_dtype
INDEX_DTYPES = {torch.int32: 0, torch.int64: 1}  # mxfp4_index_dtype
ACTIVATIONS = {"none": 0, "swiglu": 1, "geglu_tanh": 2, "relu2": 3}  # mxfp4_activation

MATMUL = struct.Struct("9P7q4i3f")
ROUTER = struct.Struct("5P6q2i")
ATTENTION = struct.Struct("6P16q2if")
ELEMENTWISE = struct.Struct("3P16q4if")
INSTRUCTION = struct.Struct("2i")
LINK = struct.Struct("3q")
PROGRAM = struct.Struct("2P2q")


@functools.cache
def linear_group(count: int) -> struct.Struct:
    """Return the struct of ``mxfp4_linear_group`` with ``count`` times ``mxfp4_linear``."""
    return struct.Struct("P4q2i" + "3P2q" * count)


@functools.cache
def mxfp8_group(count: int) -> struct.Struct:
    """Return the struct of ``mxfp4_linear_group`` with ``count`` times ``mxfp8_linear``."""
    return struct.Struct("P4q2i" + "4Pq" * count)


@functools.cache
def offsets(form: struct.Struct) -> tuple[int, ...]:
    """Return where each field of a struct lies, in bytes."""
    kinds = "".join(kind * int(count or 1) for count, kind in re.findall(r"(\d*)(\w)", form.format))
    sizes = [struct.calcsize(kind) for kind in kinds]
    return tuple(itertools.accumulate(sizes[:-1], initial=0))
