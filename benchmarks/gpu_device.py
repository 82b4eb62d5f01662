"""The device that is measured: a CUDA GPU, or a CPU in whose interpreter Triton's kernels run.

On a CPU nothing is captured, and times mean nothing: it is there so that
the benchmark can be tested where there is no GPU.
"""

from __future__ import annotations

import gc
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import machine
from samples import Clock
from torch import Tensor

from mxfp4_fx.core import hardware

SAMPLE_SECONDS = 0.003  # a sample lasts so long, or one call
LEAST_SAMPLES = 5

Work = Callable[[], Tensor]


class Device:
    """Runs work on the device and times it. Nothing here changes the device's settings.

    Args:
        name: cuda or cpu.
        clock: times everything that a GPU's events do not.
    """

    def __init__(self, name: str, clock: Clock = time.perf_counter) -> None:
        self.clock = clock
        self.torch = torch.device(name)
        self.is_gpu = self.torch.type == "cuda"
        if self.is_gpu:
            self.torch = torch.device("cuda", torch.cuda.current_device())

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def free_bytes(self) -> int | None:
        """Memory that can still be had; None on a CPU."""
        if not self.is_gpu:
            return None
        free, _ = torch.cuda.mem_get_info()
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return free + unused

    def release(self) -> None:
        """Give back what is no longer referred to."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()

    def capture(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        """Record all launches of ``work`` in one CUDA graph: (replay, what a replay writes).

        ``work`` must have run before, so that nothing is compiled now.
        """
        if not self.is_gpu:
            out = work()
            return lambda: (out.copy_(work()), None)[1], out
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = work()
        return graph.replay, out

    def samples(
        self, work: Callable[[], object], seconds: float, least: int = LEAST_SAMPLES
    ) -> list[float]:
        """Seconds a call, one for each sample: as many as fit into ``seconds``, ``least`` at least.

        A sample is a row of calls between two events of the device, or a single slow one. On a CPU
        there are two samples of a call.
        """
        if not self.is_gpu:
            return [self._seconds(work, 1) for _ in range(2)]
        work()
        once = self._seconds(work, 1)
        once = min(once, self._seconds(work, 1))
        calls = max(1, int(SAMPLE_SECONDS / max(once, 1e-7)))
        calls = min(calls, 1000)
        most = max(least, min(50, int(seconds / (calls * max(once, 1e-7)))))
        return [self._seconds(work, calls) for _ in range(most)]

    def _seconds(self, work: Callable[[], object], calls: int) -> float:
        if not self.is_gpu:
            started = self.clock()
            for _ in range(calls):
                work()
            return (self.clock() - started) / calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def launches(self, work: Callable[[], object]) -> int | None:
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
        kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        return len(kernels) or None

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
            "architecture": hardware.gpu_name(self.torch),
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "device_memory_bytes": properties.total_memory,
        }

    def l2_bytes(self) -> int:
        if not self.is_gpu:
            return 0
        return int(getattr(torch.cuda.get_device_properties(self.torch), "L2_cache_size", 0))


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0]
