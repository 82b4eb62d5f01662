"""The native CPU kernels: operands are prepared and passed to the C++ in ``ops/cpu_kernels/``.

``cpu_library.py`` loads the library. The kernels run on torch's own threads, as many as
``torch.get_num_threads()``.
"""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

from mxfp4_fx.core.layouts import LAYOUTS
from mxfp4_fx.ops.cpu_library import check as _check
from mxfp4_fx.ops.cpu_library import library as _library
from mxfp4_fx.ops.cpu_library import pointer as _pointer
from mxfp4_fx.ops.cpu_structs import ACTIVATIONS as _ACTIVATIONS
from mxfp4_fx.ops.cpu_structs import DTYPES as _DTYPES
from mxfp4_fx.ops.cpu_structs import INDEX_DTYPES as _INDEX_DTYPES
from mxfp4_fx.ops.cpu_structs import MATMUL, ROUTER
from mxfp4_fx.ops.operands import Activation, Rows, Weight, result_shape
from mxfp4_fx.ops.reference import Routes


def matmul_ogs(x: Tensor, weight: Weight, rows: Rows, activation: Activation | None) -> Tensor:
    """Compute ``ops.reference.matmul_ogs`` for ``layout="cpu_panels"``.

    A token's rows are summed in the order of their experts, for any number of threads.

    Raises:
        ValueError: the weight has another layout, or an index or offset points outside its tensor.
        MemoryError: there is no memory for the packed activations.
    """
    blocks, scales, bias, n, k, experts, layout = weight
    offsets, gather, scatter, gammas, per_token, total = rows
    _require_panels(layout)
    row_stride, column_stride = x.stride()
    if column_stride != 1:
        x, row_stride = x.contiguous(), k
    y = x.new_empty(result_shape(weight, rows, activation))
    if y.numel() == 0:
        return y
    # The names keep converted tensors alive until the native call returns.
    blocks, scales, offsets = blocks.contiguous(), scales.contiguous(), _int32(offsets)
    if bias is not None:
        bias = (bias if bias.dtype in _DTYPES else bias.float()).contiguous()
    if gather is not None:
        gather = _int32(gather)
    if scatter is not None:
        scatter = _int32(scatter)
    if gammas is not None:
        gammas = (gammas if gammas.dtype == torch.float32 else gammas.float()).contiguous()
    x_rows = x.shape[0]
    arguments = MATMUL.pack(
        x.data_ptr(), blocks.data_ptr(), scales.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        offsets.data_ptr(),
        0 if gather is None else gather.data_ptr(),
        0 if scatter is None else scatter.data_ptr(),
        0 if gammas is None else gammas.data_ptr(),
        y.data_ptr(),
        x_rows, row_stride, total, experts, n, k, per_token,
        _DTYPES[x.dtype], 0 if bias is None else _DTYPES[bias.dtype],
        0 if activation is None else _ACTIVATIONS[activation.kind], torch.get_num_threads(),
        *((0.0, 0.0, 0.0) if activation is None else activation[1:]),
    )  # fmt: skip
    if status := _library().mxfp4_matmul_ogs(arguments):
        _check(
            status,
            "matmul_ogs: an entry of gather_index, scatter_index or expert_offsets points outside "
            f"its tensor: there are {x_rows} rows of x and {total} routed rows",
        )
    return y


def routing(
    logits: Tensor, top_k: int, first_expert: int = 0, num_experts: int | None = None
) -> Routes:
    """Compute ``ops.reference.routing``: top-k, softmax and sort in one pass."""
    if logits.dtype not in _DTYPES:
        logits = logits.float()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    tokens, experts = logits.shape
    held = experts if num_experts is None else num_experts
    routes = _empty_routes(tokens * top_k, held)
    gammas, gather, scatter, offsets = routes
    arguments = ROUTER.pack(
        logits.data_ptr(), gammas.data_ptr(), gather.data_ptr(), scatter.data_ptr(),
        offsets.data_ptr(), tokens, logits.stride(0), experts, top_k, held, first_expert,
        _DTYPES[logits.dtype], torch.get_num_threads(),
    )  # fmt: skip
    _check(_library().mxfp4_routing(arguments), "routing")
    return routes


def routing_from_routes(
    indices: Tensor, weights: Tensor, num_experts: int, first_expert: int = 0
) -> Routes:
    """Compute ``ops.reference.routing_from_routes``."""
    if indices.dtype not in _INDEX_DTYPES:
        indices = indices.long()
    if weights.dtype not in _DTYPES:
        weights = weights.float()
    indices, weights = indices.contiguous(), weights.contiguous()
    routes = _empty_routes(indices.numel(), num_experts)
    _check(
        _library().mxfp4_routing_routes(
            _pointer(indices),
            _INDEX_DTYPES[indices.dtype],
            _pointer(weights),
            _DTYPES[weights.dtype],
            ctypes.c_int64(indices.shape[0]),
            ctypes.c_int64(indices.shape[1]),
            ctypes.c_int64(num_experts),
            ctypes.c_int64(first_expert),
            *map(_pointer, routes),
            torch.get_num_threads(),
        ),
        "routing.routes",
    )
    return routes


def _require_panels(layout: str) -> None:
    if layout != "cpu_panels":
        raise ValueError(
            f"mxfp4::matmul_ogs: kernels='cpu' reads layout 'cpu_panels', not {layout!r}; "
            f"kernels='reference' reads all of {list(LAYOUTS)}"
        )


def _empty_routes(rows: int, experts: int) -> Routes:
    # Explicit, because the user's default device may be another.
    return (
        torch.empty(rows, dtype=torch.float32, device="cpu"),
        torch.empty(rows, dtype=torch.int32, device="cpu"),
        torch.empty(rows, dtype=torch.int32, device="cpu"),
        torch.empty(experts + 1, dtype=torch.int32, device="cpu"),
    )


def _int32(index: Tensor) -> Tensor:
    if index.dtype != torch.int32:  # to() without a conversion would cost a microsecond
        # Clamped, an index that does not fit int32 still points outside of any tensor.
        info = torch.iinfo(torch.int32)
        index = index.clamp(info.min, info.max).to(torch.int32)
    return index.contiguous()


assert sys.byteorder == "little", "cpu_panels is defined for little-endian machines"
