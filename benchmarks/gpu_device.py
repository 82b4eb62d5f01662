"""The device that is measured: a CUDA GPU, or a CPU in whose interpreter Triton's kernels run.

On a CPU nothing is captured, a sample is one call, and times mean nothing: it is there so that the
benchmark can be tested where there is no GPU. Nothing here changes the device's settings.
"""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import device_ops
from benchmarks.machine import machine
from benchmarks.timing import Clock, seconds, summary

# Floors: bytes that are copied, many times any cache, and N of an N x N matmul.
COPY_BYTES, MATMUL = 4 << 30, 8192
PROBE_SECONDS = 0.3
REPLAYS = 10  # of a graph, by do_bench_cudagraph

Work = Callable[[], Tensor]


class Device:
    """Runs work on the device and times it.

    Args:
        name: cuda or cpu.
        clock: of a CPU's times, and of how long the run takes.
    """

    def __init__(self, name: str, clock: Clock) -> None:
        self.clock = clock
        self.torch = torch.device(name)
        self.is_gpu = self.torch.type == "cuda"
        if self.is_gpu:
            self.torch = torch.device("cuda", torch.cuda.current_device())
        self._rates: dict[str, list[float]] = {"copy": [], "matmul": []}

    def synchronize(self) -> None:
        """Wait for the device; raises if it failed."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def release(self) -> None:
        """Give back a GPU's memory that is no longer referred to."""
        if self.is_gpu:
            gc.collect()
            torch.cuda.empty_cache()

    def free_bytes(self) -> int | None:
        """Memory that can still be had; None on a CPU."""
        if not self.is_gpu:
            return None
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused

    def l2_bytes(self) -> int:
        if not self.is_gpu:
            return 0
        return int(torch.cuda.get_device_properties(self.torch).L2_cache_size)

    def in_graph(self, work: Work, at_most: float) -> tuple[list[float], Tensor]:
        """Seconds of a call in a CUDA graph, and what the last replay wrote.

        Raises:
            RuntimeError: something in ``work`` waits for the device.
        """
        out: list[Tensor] = []

        def call() -> None:
            out[:] = [work()]

        if not self.is_gpu:
            started = self.clock()
            call()
            return [self.clock() - started], out[0]
        from triton.testing import do_bench_cudagraph

        # The result lies in the graph's memory, which lives as long as the result does.
        ms = do_bench_cudagraph(call, rep=1e3 * at_most / REPLAYS, return_mode="all")
        return [each / 1e3 for each in ms], out[0]

    def one_by_one(self, work: Work, at_most: float) -> list[float]:
        """Seconds of a call whose kernels are launched one by one."""
        return seconds(work, at_most)

    def launches(self, work: Work) -> int | None:
        """Kernels that one call launches, memory operations among them; None if nobody tells."""
        if not self.is_gpu:
            return None
        from torch.profiler import ProfilerActivity, profile

        try:
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                work()
                torch.cuda.synchronize()
            events = profiler.events()
        except Exception:  # a driver that does not let anybody profile
            return None
        return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in events) or None

    def measure_floors(self) -> None:
        """Once more: what the device copies, read and written, and multiplies in bfloat16."""
        copied, n = (COPY_BYTES, MATMUL) if self.is_gpu else (1 << 20, 64)
        copied = min(copied, (self.free_bytes() or 4 * copied) // 4)
        source = torch.randint(0, 256, (copied,), dtype=torch.uint8, device=self.torch)
        a, b = (torch.randn(n, n, device=self.torch).bfloat16() for _ in range(2))
        room, out = torch.empty_like(source), torch.empty_like(a)
        copying, _ = self.in_graph(lambda: room.copy_(source), PROBE_SECONDS)
        multiplying, _ = self.in_graph(lambda: torch.mm(a, b, out=out), PROBE_SECONDS)
        self._rates["copy"] += [2 * copied / each for each in copying]
        self._rates["matmul"] += [2.0 * n**3 / each for each in multiplying]

    def floors(self) -> dict[str, Any]:
        """Bytes a second, operations a second; empty before the first measurement."""
        return {name: summary(rates) for name, rates in self._rates.items() if rates}

    def facts(self) -> dict[str, Any]:
        """Device, driver, versions and the date; nothing that names the machine or its users."""
        import triton

        facts = {**machine(), "triton": triton.__version__, "device": "cpu, Triton's interpreter"}
        if not self.is_gpu:
            return facts
        properties = torch.cuda.get_device_properties(self.torch)
        return {
            **facts,
            "device": properties.name,
            "architecture": device_ops.gpu_name(self.torch),
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": self.l2_bytes(),
            "device_memory_bytes": properties.total_memory,
        }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0]
