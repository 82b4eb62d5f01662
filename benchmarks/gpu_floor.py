"""Floors: what a GPU copies and multiplies at best, measured in the same run, and what work needs.

The bandwidth is that of a copy within the device's memory, bytes read and bytes written; the rate
is that of torch's bfloat16 matmul on random data.
"""

from __future__ import annotations

from typing import Any

import torch
from gpu_device import Device
from moe import Sizes
from samples import summary

COPY_BYTES = 4 << 30  # read, and as many written: many times any cache
MATMUL = 8192
PROBE_SECONDS = 0.3


class Floors:
    """The samples of both rates. :meth:`measure` adds some; the first and last of a run count."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.copy_rates: list[float] = []  # bytes a second
        self.matmul_rates: list[float] = []  # floating-point operations a second

    def measure(self) -> None:
        device = self.device
        copied, n = (COPY_BYTES, MATMUL) if device.is_gpu else (8 << 20, 256)
        free = device.free_bytes()
        if free is not None:
            copied = min(copied, free // 4)
        self.copy_rates += [2 * copied / seconds for seconds in _copy_times(device, copied)]
        self.matmul_rates += [2.0 * n**3 / seconds for seconds in _matmul_times(device, n)]
        device.release()

    def data(self) -> dict[str, Any]:
        """For JSON: bytes a second, operations a second; empty before the first measurement."""
        if not self.copy_rates:
            return {}
        return {"copy": summary(self.copy_rates), "matmul": summary(self.matmul_rates)}


def _copy_times(device: Device, copied: int) -> list[float]:
    source = torch.randint(0, 256, (copied,), dtype=torch.uint8, device=device.torch)
    room = torch.empty_like(source)
    return device.samples(lambda: room.copy_(source), PROBE_SECONDS)


def _matmul_times(device: Device, n: int) -> list[float]:
    a, b = (torch.randn(n, n, device=device.torch).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return device.samples(lambda: torch.mm(a, b, out=out), PROBE_SECONDS)


def work(sizes: Sizes, tokens: int, hit: int) -> dict[str, float]:
    """The fewest bytes and operations of one MLP, whose tokens choose ``hit`` experts.

    Bytes: the experts that are hit in MXFP4 with their biases, the router, hidden states and
    result, and what lies between the two matmuls, written and read. All activations are bfloat16.
    """
    h, i = sizes.hidden, sizes.intermediate
    biases = 2 * (2 * i + h)
    router = 2 * sizes.experts * (h + 1)
    between = 2 * 2 * tokens * sizes.top_k * i
    around = 2 * 2 * tokens * h
    return {
        "bytes": hit * (sizes.mxfp4_bytes + biases) + router + between + around,
        "flops": sizes.flops(tokens) + 2.0 * tokens * h * sizes.experts,
    }


def floor(work: dict[str, float], floors: dict[str, Any]) -> dict[str, Any] | None:
    """The larger of two times in milliseconds, and which it is; None without floors."""
    if not floors:
        return None
    memory = 1e3 * work["bytes"] / floors["copy"]["median"]
    matrix = 1e3 * work["flops"] / floors["matmul"]["median"]
    by = "memory" if memory > matrix else "matrix"
    return {"ms": max(memory, matrix), "by": by, "memory_ms": memory, "matrix_ms": matrix}
