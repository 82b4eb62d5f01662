"""Compiles matmuls for a GPU on all cores before they are needed, into Triton's cache.

A tile takes Triton seconds, one after the other in one process. Worker processes compile for the
same target and launch nothing, so that they need no GPU; the process that measures finds the
results in the cache on disk. What fails here fails there again and is reported there.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import device_ops
from benchmarks.gpu_device import Device
from benchmarks.sizes import Sizes
from mxfp4_fx.ops import tiles
from mxfp4_fx.ops.tiles import Tile

MOST_WORKERS = 12


@dataclasses.dataclass(frozen=True)
class Job:
    """Both matmuls of an MLP with one tile; or without a tile, routing of so many tokens."""

    tile: Tile | None
    sizes: Sizes
    layout: str = ""
    tokens: int = 0


class Compiler:
    """A pool of processes; without a GPU, or told to use no process, it does nothing."""

    def __init__(self, device: Device, processes: int | None = None) -> None:
        self._pool: ProcessPoolExecutor | None = None
        if processes is None:
            processes = min(MOST_WORKERS, len(os.sched_getaffinity(0)))
        if not device.is_gpu or processes < 2:
            return
        from triton.runtime import driver

        found = driver.active.get_current_target()
        name = device_ops.gpu_name(device.torch)
        self._pool = start_pool(processes, name, (found.backend, found.arch, found.warp_size))

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def compile(self, jobs: Iterable[Job], at_most: float) -> None:
        """Return when all are compiled, or after so many seconds."""
        if self._pool is None:
            return
        try:
            wait([self._pool.submit(compile_job, job) for job in dict.fromkeys(jobs)], at_most)
        except BrokenProcessPool:  # then everything is compiled where it is needed
            self._pool = None


def start_pool(processes: int, name: str, arch: tuple[str, Any, int]) -> ProcessPoolExecutor:
    """Processes that compile for a GPU: its name as tables of tiles have it, and Triton's."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, spawn, _compile_only, (name, arch))


def _compile_only(name: str, arch: tuple[str, Any, int]) -> None:
    """From now on this process compiles kernels for that GPU instead of launching them."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            kernel.run(*args, grid=grid, warmup=True, **kwargs)

        return run

    JITFunction.__getitem__ = launch
    device_ops.pretend_gpu(name)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget(*arch),
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
            get_device_interface=lambda: torch.cuda,
        )
    )


@torch.no_grad()
def compile_job(job: Job) -> str:
    """Call the ops on memory of the CPU's that nobody touches; the error's name, or nothing."""
    try:
        if job.tile is None:
            logits = torch.empty((job.tokens, job.sizes.experts), dtype=torch.bfloat16)
            device_ops.routing(logits, job.sizes.top_k, "triton")
        else:
            with tiles.forced(job.tile):
                _call_matmuls(job.sizes, job.layout)
    except Exception as error:  # of the compiler's many, to be met again where it counts
        return type(error).__name__
    return ""


def _call_matmuls(sizes: Sizes, layout: str) -> None:
    h, i, e, a = sizes.hidden, sizes.intermediate, sizes.experts, sizes.top_k
    index = [torch.empty(count, dtype=torch.int32) for count in (a, a, e + 1)]
    routes = (torch.empty(a), *index)
    x, inner = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((1, h), (a, i)))
    device_ops.gate_up(x, device_ops.empty(e, 2 * i, h, layout), routes, "triton")
    device_ops.down(inner, device_ops.empty(e, h, i, layout), routes, a, "triton")
