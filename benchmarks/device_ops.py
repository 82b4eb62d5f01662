"""Every call into the kernels that are measured: the one place that knows their ops and paths."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mxfp4_fx.ops.schemas  # noqa: F401  (declares the ops)
from benchmarks.moe import Projection
from mxfp4_fx.core import hardware, mxfp8
from mxfp4_fx.core.layouts import LAYOUTS, MXFP8_ROWS
from mxfp4_fx.ops import target, tiles
from mxfp4_fx.ops.operands import Activation
from mxfp4_fx.ops.tiles import Tile
from mxfp4_fx.weights.source import LINEAR, MXFP4, Source
from mxfp4_fx.weights.swizzle import swizzle_weight

OPS = torch.ops.mxfp4
_GPT_OSS = Activation("swiglu")


class Packed(NamedTuple):
    """A projection's weights in a layout of the kernels."""

    blocks: Tensor
    scales: Tensor
    bias: Tensor | None  # [E, N] bfloat16
    n: int
    layout: str


def swizzled(part: Projection, layout: str) -> Packed:
    """In memory of its own."""
    blocks, scales = swizzle_weight(
        Source((part.blocks.clone(), part.scales.clone()), MXFP4), layout
    )
    bias = None if part.bias is None else part.bias.clone()
    return Packed(blocks, scales, bias, part.n, layout)


def empty(experts: int, n: int, k: int, layout: str) -> Packed:
    """On the CPU, of any values: to compile kernels with."""
    blocks, scales = LAYOUTS[layout].empty(experts, n, k, torch.device("cpu"))
    return Packed(blocks, scales, torch.empty((experts, n), dtype=torch.bfloat16), n, layout)


def routing(logits: Tensor, top_k: int, kernels: str) -> Any:
    """(gammas, gather index, scatter index, offsets)"""
    return OPS.routing(logits, top_k, kernels=kernels)


def gate_up(
    hidden: Tensor,
    weight: Packed,
    routes: Any,
    kernels: str,
    activation: Activation = _GPT_OSS,
) -> Tensor:
    """[R, I] of hidden [T, H], behind the activation."""
    kind, alpha, limit, up_offset = activation
    return OPS.matmul_ogs(
        hidden,
        *weight[:4],
        routes[3],
        gather_index=routes[1],
        activation=kind,
        alpha=alpha,
        limit=limit,
        up_offset=up_offset,
        layout=weight.layout,
        kernels=kernels,
    )


def down(inner: Tensor, weight: Packed, routes: Any, top_k: int, kernels: str) -> Tensor:
    """[T, H] of [R, I], weighted and summed."""
    return OPS.matmul_ogs(
        inner,
        *weight[:4],
        routes[3],
        scatter_index=routes[2],
        gammas=routes[0],
        experts_per_token=top_k,
        layout=weight.layout,
        kernels=kernels,
    )


def in_mxfp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a linear's weight [N, K]."""
    codes, scales = swizzle_weight(Source((weight,), LINEAR), MXFP8_ROWS)
    return codes, scales


def of_mxfp8(weight: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """The values [N, K] of codes and scales."""
    return mxfp8.dequantize(weight[0][0], weight[1][0], dtype)


def linears_mxfp8(x: Tensor, weights: Sequence[tuple[Tensor, Tensor]], kernels: str) -> Any:
    """[R, N] for each weight."""
    codes, scales = zip(*weights, strict=True)
    return OPS.linears_mxfp8(x, codes, scales, [None] * len(weights), kernels)


def linears_mxfp8_backward(
    grads: Sequence[Tensor], weights: Sequence[tuple[Tensor, Tensor]], kernels: str
) -> Tensor:
    """[R, K] of a gradient [R, N] for each weight."""
    codes, scales = zip(*weights, strict=True)
    return OPS.linears_mxfp8_backward(grads, codes, scales, kernels)


# ---- the CPU's instruction-set paths ------------------------------------------------------------


def chosen_for_cpu() -> dict[str, str]:
    """What the backend would take."""
    chosen = target.choose(torch.device("cpu"))
    name = f"{chosen.kernels} ({chosen.layout})"
    return {"chosen_by_backend": name, "reason": chosen.reason}


def has_amx() -> bool:
    """Whether this process may use AMX for bfloat16; asks the system for it."""
    return "amx" in hardware.runnable_paths()


def native_paths() -> tuple[list[str], dict[str, str]]:
    """(instruction-set paths that work here, the chosen one first; the others with the reason).

    Each is compiled and called once, for what cannot be built must not fall back in silence.
    """
    best = hardware.cpu_path()
    works, reasons = [], {}
    for path in (best, *(path for path in hardware.runnable_paths() if path != best)):
        try:
            with restored_path():
                force_path(path)
                routing(torch.zeros(1, 4), 2, "cpu")
        except Exception as error:  # whatever it is, it is reported with the path
            line = str(error).partition("\n")[0].replace(str(Path.home()), "~")
            reasons[path] = f"{type(error).__name__}: {line}"
        else:
            works.append(path)
    return works, reasons


def force_path(path: str) -> None:
    """Let the native kernels use this path from now on; see :func:`restored_path`."""
    if os.environ.get(hardware.CPU_PATH_VARIABLE) != path:
        os.environ[hardware.CPU_PATH_VARIABLE] = path
        hardware.cpu_path.cache_clear()
    if hardware.cpu_path() != path:
        raise RuntimeError(f"{path} was not followed: {hardware.cpu_path()} is used")


@contextmanager
def restored_path() -> Iterator[None]:
    """Afterwards the path is again what it was."""
    before = os.environ.get(hardware.CPU_PATH_VARIABLE)
    try:
        yield
    finally:
        os.environ.pop(hardware.CPU_PATH_VARIABLE, None)
        if before is not None:
            os.environ[hardware.CPU_PATH_VARIABLE] = before
        hardware.cpu_path.cache_clear()


# ---- a GPU's tiles ------------------------------------------------------------------------------


def gpu_name(device: torch.device) -> str:
    """As the tables of tiles are named."""
    return hardware.gpu_name(device)


def gpu_layout(device: torch.device) -> str:
    """The layout that the backend would take."""
    return target.choose(device, "triton").layout


def gpu_tiles(device: torch.device, layout: str) -> tuple[Tile, ...]:
    """The table that serves a device."""
    return tiles.table(tiles.table_name(gpu_name(device), layout))


def pretend_gpu(name: str) -> None:
    """From now on every device of this process counts as that GPU: to compile for it."""

    def named(_: torch.device) -> str:
        return name

    hardware.gpu_name = named  # type: ignore[assignment]
