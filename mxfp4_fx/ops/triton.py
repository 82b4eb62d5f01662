"""Launches of the Triton kernels: the layout is checked, a tile chosen, the grids computed.

Nothing is read back from the device and every grid follows from shapes alone, so that CUDA graphs
capture the ops. Indices are not checked. As with torch's own kernels, a GPU may not notice an index
that points outside its tensor.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxfp4_fx.core import hardware
from mxfp4_fx.core.layouts import CHECKPOINT_ORDER, LAYOUTS
from mxfp4_fx.ops import tiles
from mxfp4_fx.ops.operands import Activation, Rows, Weight, result_shape
from mxfp4_fx.ops.reference import Routes
from mxfp4_fx.ops.triton_kernels.arithmetic import UNIT
from mxfp4_fx.ops.triton_kernels.epilogue import combine_kernel
from mxfp4_fx.ops.triton_kernels.matmul import matmul_ogs_kernel
from mxfp4_fx.ops.triton_kernels.routing import (
    decide_kernel,
    place_kernel,
    routing_kernel,
    scan_kernel,
)

# Targets and numbers of terms without tl.dot_scaled. gfx942 has no such instruction, and Triton 3.6
# cannot compile it. What Intel's compiler makes of it is not known to be exact. sm_75 multiplies
# float32. The interpreter converts its bfloat16 operand to float16 and loses small terms.
_WITHOUT_DOT_SCALED = {(gpu, terms) for gpu in ("gfx942", "xpu") for terms in (1, 2, 3)}
_WITHOUT_DOT_SCALED |= {("interpreter", 2), ("interpreter", 3), ("sm_75", 1)}
# Beyond so many routes, three launches with many programs are faster than one program.
_ONE_PROGRAM_ROUTES = 2048
# Targets on which a program's threads may not see one another's stores after a barrier: Intel's
# compiler makes it order shared memory only. There the launches are always three.
_WITHOUT_GLOBAL_BARRIER = ("xpu",)
_COMBINE_TILE = (4, 512)  # tokens, columns
_SCAN_TILE = (256, 8)  # blocks, groups


def matmul_ogs(x: Tensor, weight: Weight, rows: Rows, activation: Activation | None) -> Tensor:
    """Compute ``ops.reference.matmul_ogs`` for any of ``tiles.LAYOUTS``.

    There is one launch, and with a scatter a second one, which sums a token's rows in slot order.
    Float32 activations lose digits below 2^-133, the smallest bfloat16 number.

    Raises:
        ValueError: the weight has another layout.
    """
    blocks, scales, bias, n, k, e, layout = weight
    _require_layout(layout)
    y = x.new_empty(result_shape(weight, rows, activation))
    if y.numel() == 0:
        return y
    if e == 0:
        return y.zero_()
    gpu = hardware.gpu_name(x.device)
    products = _products(gpu, x.dtype)
    terms = products["TERMS"]
    # The second launch can sum parts of K, too; an activation needs the whole sum first.
    can_split = rows.scatter is not None and activation is None
    tile = tiles.choose(gpu, layout, rows.total, e, k, terms, can_split)
    out = y
    if rows.scatter is not None:
        out = x.new_empty((tile.splits, rows.total, y.shape[1]), dtype=torch.float32)
    if x.stride(1) != 1:
        x = x.contiguous()
    blocks, scales = blocks.contiguous(), scales.contiguous()
    if layout != CHECKPOINT_ORDER:
        blocks, scales = blocks.view(torch.uint32), scales.view(torch.uint32)
    row_tiles = min(rows.total, e + 1 + rows.total // tile.block_m)  # an upper bound
    grid = (-(-n // tile.block_n) * row_tiles, tile.splits)
    kind, *constants = ("none", 0.0, 0.0, 0.0) if activation is None else activation
    with hardware.on(x.device):
        matmul_ogs_kernel[grid](
            x, blocks, scales, None if bias is None else bias.contiguous(), _int32(rows.offsets),
            None if rows.gather is None else _int32(rows.gather),
            None if rows.scatter is None else _int32(rows.scatter),
            None if rows.gammas is None else rows.gammas.float().contiguous(),
            out, x.stride(0), rows.total, e, *constants,
            N=n, K=k, LAYOUT=layout, ACTIVATION=kind,
            GROUPS=triton.next_power_of_2(e + 1), BM=tile.block_m, BN=tile.block_n,
            BK=tile.block_k, SPLITS=tile.splits, **products,
            **tiles.compiler_options(tile, gpu, terms),
        )  # fmt: skip
        if rows.scatter is not None:
            _combine(out, y, rows.per_token, tile.splits)
    return y


def _products(gpu: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the kernel's constants that say how a GPU multiplies activations of a dtype."""
    terms = hardware.gpu_terms(gpu, dtype)
    return {
        "TERMS": terms,
        "SCALED": (gpu, terms) not in _WITHOUT_DOT_SCALED,
        "OPERAND": tl.float32 if hardware.multiplies_float32(gpu) else UNIT.value,
    }


def _combine(parts: Tensor, y: Tensor, per_token: int, splits: int) -> None:
    """Sum the parts [splits, R, N] of each token's rows into y [T, N]."""
    tokens, columns = y.shape
    bt, bn = _COMBINE_TILE
    combine_kernel[(-(-tokens // bt), -(-columns // bn))](
        parts, y, tokens, N=columns, A=per_token, SPLITS=splits, BT=bt, BN=bn, **tiles.OPTIONS
    )


def routing(
    logits: Tensor, top_k: int, first_expert: int = 0, num_experts: int | None = None
) -> Routes:
    """Compute ``ops.reference.routing``; of equal logits it chooses the first expert.

    There is one launch up to 2048 routes, and three beyond or on an Intel GPU.
    """
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    tokens, every = logits.shape
    held = every if num_experts is None else num_experts
    return _route(logits, None, tokens, top_k, held, first_expert)


def routing_from_routes(
    indices: Tensor, weights: Tensor, num_experts: int, first_expert: int = 0
) -> Routes:
    """Compute ``ops.reference.routing_from_routes``, with as many launches as :func:`routing`."""
    if indices.dtype == torch.bool:
        indices = indices.to(torch.uint8)
    indices, weights = indices.contiguous(), weights.contiguous()
    t, a = indices.shape
    return _route(indices, weights, t, a, num_experts, first_expert)


def _require_layout(layout: str) -> None:
    if layout not in tiles.LAYOUTS:
        raise ValueError(
            f"mxfp4::matmul_ogs: kernels='triton' reads layouts {', '.join(tiles.LAYOUTS)}, not "
            f"{layout!r}; kernels='reference' reads all of {list(LAYOUTS)}"
        )


def _route(
    source: Tensor, weights: Tensor | None, t: int, a: int, e: int, first_expert: int
) -> Routes:
    device, rows = source.device, t * a
    given = weights is not None

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    routes = empty(rows, dtype=torch.float32), empty(rows), empty(rows), empty(e + 1)
    if rows == 0:
        routes[3].zero_()
        return routes
    choices = 0 if given else source.shape[1]
    has_others = given or (first_expert, e) != (0, choices)
    groups = triton.next_power_of_2(max(choices, e + has_others))
    ap = triton.next_power_of_2(a)
    bt = _tokens_per_block(t, ap, groups)
    notes = empty(rows), empty(rows, dtype=torch.float32)
    shape = {"A": a, "AP": ap, "BT": bt, "GROUPS": groups, **tiles.OPTIONS}
    warps = _warps(bt * ap, groups)
    inputs = (source, source.stride(0), weights, *notes)
    blocks = -(-t // bt)
    one_program = hardware.gpu_name(device) not in _WITHOUT_GLOBAL_BARRIER
    with hardware.on(device):
        if rows <= _ONE_PROGRAM_ROUTES and one_program:
            routing_kernel[(1,)](
                *inputs, *routes, t, choices, e, first_expert,
                GIVEN=given, **shape, num_warps=warps,
            )  # fmt: skip
            return routes
        block_counts, counts = empty(blocks, groups), empty(groups)
        decide_kernel[(blocks,)](
            *inputs, block_counts, t, choices, e, first_expert,
            GIVEN=given, **shape, num_warps=warps,
        )  # fmt: skip
        bb, bg = _SCAN_TILE[0], min(_SCAN_TILE[1], groups)
        scan_kernel[(groups // bg,)](
            block_counts, counts, blocks, BB=bb, BG=bg, GROUPS=groups, **tiles.OPTIONS
        )
        place_kernel[(blocks,)](
            *notes, block_counts, counts, *routes, t, e, **shape, num_warps=warps
        )
    return routes


def _tokens_per_block(t: int, ap: int, groups: int) -> int:
    """Return a power of 2 with which a block's slots times groups stay in registers."""
    room = max(1, min(256 // ap, 16384 // (ap * groups)))
    return min(1 << room.bit_length() - 1, triton.next_power_of_2(t))


def _warps(slots: int, groups: int) -> int:
    return 4 if slots * groups <= 2048 else 8


def _int32(index: Tensor) -> Tensor:
    return index.to(torch.int32).contiguous()
