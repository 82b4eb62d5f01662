"""A program: compiles what kernels="hub" launches of the real ``triton_kernels``, and runs nothing.

``python compiled_hub.py TARGET[:LAYOUT]`` on any machine; TARGET is a CUDA capability such as 90,
or an architecture of AMD's, LAYOUT that of the weights. MXFP4_FX_TRITON_KERNELS names the folder
that holds triton_kernels. Prints the name of each kernel.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from implementations import Kernels, int32, randn
from oracle import Matrices, random_routes, sort_routes
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mxfp4_fx.ops import hub_loader


def compile_only(target: GPUTarget) -> list[str]:
    """From now on kernels are compiled for ``target`` instead of launched; returns their names."""
    names: list[str] = []

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            names.append(kernel.run(*args, grid=grid, warmup=True, **kwargs).metadata.name)

        return run

    JITFunction.__getitem__ = launch
    gpu = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_device_interface=lambda: torch.cuda,
    )
    driver.set_active(gpu)
    properties = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=160 << 10)
    torch.cuda.get_device_properties = lambda *_: properties
    capability = divmod(target.arch, 10) if target.backend == "cuda" else (9, 4)
    torch.cuda.get_device_capability = lambda *_: capability
    return names


def layer(tokens: int, k: int, kernels: Kernels) -> None:
    """The two matmuls of a layer, in bfloat16, with 4 of 8 experts a token."""
    matrices = Matrices.random(8, 512, k)
    gather, scatter, offsets = sort_routes(random_routes(tokens, 8, 4)[0], 8)
    x = randn(tokens, k, dtype=torch.bfloat16)
    kernels.matmul_ogs(x, matrices, int32(offsets), int32(gather), activation="swiglu")
    x = randn(tokens * 4, k, dtype=torch.bfloat16)
    gammas = randn(tokens * 4)
    kernels.matmul_ogs(x, matrices, int32(offsets), None, int32(scatter), gammas, 4)


def main(arch: str, layout: str) -> None:
    sys.path.insert(0, os.environ["MXFP4_FX_TRITON_KERNELS"])
    cuda = arch.isdecimal()
    names = compile_only(GPUTarget("cuda", int(arch), 32) if cuda else GPUTarget("hip", arch, 64))
    import triton_kernels
    import triton_kernels.matmul_ogs
    import triton_kernels.routing
    import triton_kernels.swiglu

    hub_loader.packages.loaded[hub_loader.REPOSITORY] = hub_loader._checked(triton_kernels)
    kernels = Kernels(f"hub:{layout}")
    layer(4, 2880, kernels)
    layer(512, 1024, kernels)
    print("\n".join(names))


if __name__ == "__main__":
    target, _, order = sys.argv[1].partition(":")
    main(target, order)
