"""A program: the real ``triton_kernels`` behind kernels="hub", in Triton's interpreter, on a CPU.

``python interpreted_hub.py CASE`` with TRITON_INTERPRET=1 and MXFP4_FX_TRITON_KERNELS, the folder
that holds triton_kernels. The package is its own but for what the interpreter lacks:

- a GPU to ask for its size. It is told of one whose kernel for simulated MXFP4 is used;
- ``specialize``, which rewrites compiled kernels and knows no interpreted ones;
- arguments that are the package's own tensors;
- ``and`` of a mask with one boolean, which makes integers of both.

Not to be seen here: results in bfloat16, which the interpreter cuts off instead of rounding.
"""

from __future__ import annotations

import inspect
import itertools
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from implementations import Kernels, check_matmul, int32, randn
from oracle import Bounded, Matrices, assert_within, grouped_linear, random_routes
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.interpreter import InterpreterBuilder

from mxfp4_fx.ops import hub_loader

GPU = SimpleNamespace(multi_processor_count=4, shared_memory_per_block_optin=160 << 10)
HUB = Kernels("hub")


class Launch:
    """An interpreted kernel that takes the package's tensors."""

    def __init__(self, kernel: Any, wrapped: type) -> None:
        self.kernel, self.wrapped = kernel, wrapped

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            plain = [a.storage.data if isinstance(a, self.wrapped) else a for a in args]
            self.kernel[grid](*plain, **kwargs)

        return run


def interpret(package: Any, folder: str) -> None:
    """Make up for what the interpreter lacks."""
    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 80, 32),
        get_current_device=lambda: 0,
        get_device_interface=lambda: torch.cuda,
    )
    driver.set_active(target)
    torch.cuda.get_device_properties = lambda *_: GPU
    torch.cuda.get_device_capability = lambda *_: (8, 0)
    made = itertools.count()

    def specialize(
        kernel: Any, module: Any, constants: dict[str, Any], tuples: dict[str, Any], **_: Any
    ) -> Launch:
        source = textwrap.dedent(inspect.getsource(kernel.fn))
        head, body = re.split(r"\)\s*:\n", source[source.index("def ") + 4 :], maxsplit=1)
        name, _, head = head.partition("(")
        parameters = []
        for parameter in filter(None, map(str.strip, re.sub("#.*", "", head).split(","))):
            key = re.split("[:=]", parameter)[0].strip()
            if key not in constants:
                parameters += tuples.get(key, [parameter])
        lines = [f"def {name}({', '.join(parameters)}):"]
        lines += [f"    {key} = _constants[{key!r}]" for key in constants]
        lines += [f"    {key} = ({''.join(f'{n}, ' for n in ns)})" for key, ns in tuples.items()]
        text = "\n".join([*lines, body])
        path = os.path.join(folder, f"{name}_{next(made)}.py")  # the interpreter reads it again
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        scope = {
            key: value.value if isinstance(value, tl.constexpr) else value
            for key, value in kernel.fn.__globals__.items()
        }
        scope["_constants"] = constants
        exec(compile(text, path, "exec"), scope)
        return Launch(triton.jit(scope[name]), package.tensor.Tensor)

    package.matmul_ogs.specialize = specialize
    splat = InterpreterBuilder.create_splat

    def create_splat(self: Any, shape: Any, arg: Any) -> Any:
        handle = splat(self, shape, arg)
        if arg.data.dtype == bool:
            handle.data = handle.data.astype(bool)
        return handle

    InterpreterBuilder.create_splat = create_splat


def combinations(gather: bool) -> None:
    """With and without scatter, gammas and activation."""
    matrices, indices = Matrices.random(4, 48, 64), random_routes(7, 4, 2)[0]
    for scatter, gammas, activation, dtype in itertools.product(
        (False, True), (False, True), ("none", "swiglu"), (torch.float16, torch.float32)
    ):
        x = randn(7 if gather else 14, 64, dtype=dtype)
        check_matmul(HUB, x, matrices, indices, gather, scatter, gammas, activation)


def bfloat16() -> None:
    matrices, x = Matrices.random(4, 48, 64), randn(7, 64, dtype=torch.bfloat16)
    indices = random_routes(7, 4, 2)[0]
    check_matmul(HUB, x, matrices, indices, activation="none")
    check_matmul(HUB, x, matrices, indices)


def split_k() -> None:
    """Few tiles and a long K on a large GPU: the package adds up parts of K afterwards."""
    GPU.multi_processor_count = 400
    matrices, indices = Matrices.random(3, 32, 1056), random_routes(3, 3, 2)[0]
    for scatter, activation in itertools.product((False, True), ("none", "swiglu")):
        x = randn(3, 1056, dtype=torch.float16)
        check_matmul(HUB, x, matrices, indices, scatter=scatter, activation=activation)


def experts_per_token() -> None:
    for a in (1, 3, 4):
        matrices, indices = Matrices.random(5, 48, 96), random_routes(9, 5, a)[0]
        check_matmul(HUB, randn(9, 96), matrices, indices, activation="none")


def many_rows() -> None:
    """Several tiles an expert, N beyond one tile, experts without rows."""
    matrices = Matrices.random(3, 160, 32)
    indices = torch.tensor([[2], [0]]).repeat(70, 1)
    check_matmul(HUB, randn(140, 32, dtype=torch.float16), matrices, indices, activation="none")


def rows_of_nobody() -> None:
    """Rows from expert_offsets[E] on are zero, and weigh nothing in a token's sum."""
    matrices, x = Matrices.random(2, 16, 32), randn(6, 32)
    x[4:] = torch.nan
    offsets, expert = int32([0, 1, 4]), torch.tensor([0, 1, 1, 1, 2, 2])
    y = HUB.matmul_ogs(x, matrices, offsets)
    expected = grouped_linear(Bounded.exact(x[:4]), expert[:4], *matrices.exact)
    assert_within(y[:4], expected.rounded(torch.float32))
    assert torch.equal(y[4:], torch.zeros(2, 16))
    slots = int32([0, 2, 5, 1, 4, 3])  # tokens 1 and 2 have one row each
    y = HUB.matmul_ogs(x, matrices, offsets, None, slots, None, 2)
    rows = grouped_linear(Bounded.exact(x[:4]), expert[:4], *matrices.exact)
    assert_within(y[1:], rows[[1, 2]].rounded(torch.float32))
    y = HUB.matmul_ogs(x, matrices, int32([0, 0, 0]), None, slots, None, 2)
    assert torch.equal(y, torch.zeros(3, 16))


CASES: dict[str, Callable[[], None]] = {
    "gather": lambda: combinations(True),
    "no_gather": lambda: combinations(False),
    "bfloat16": bfloat16,
    "split_k": split_k,
    "experts_per_token": experts_per_token,
    "many_rows": many_rows,
    "rows_of_nobody": rows_of_nobody,
}


def main(case: str) -> None:
    sys.path.insert(0, os.environ["MXFP4_FX_TRITON_KERNELS"])
    import triton_kernels
    import triton_kernels.matmul_ogs
    import triton_kernels.routing
    import triton_kernels.swiglu

    hub_loader.packages.loaded[hub_loader.REPOSITORY] = hub_loader._checked(triton_kernels)
    with tempfile.TemporaryDirectory() as folder:
        interpret(triton_kernels, folder)
        CASES[case]()


if __name__ == "__main__":
    main(sys.argv[1])
