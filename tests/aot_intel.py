"""Compiles the Triton kernels for an Intel GPU, to SPIR-V, and says what came out.

``python tests/aot_intel.py DTYPE,...`` with Intel's build of Triton first in the path compiles
every tile of the table, and the other kernels that an Intel GPU gets; it prints a JSON list of
:class:`Fact` objects. No GPU is needed. SPIR-V is what Triton makes; the GPU's driver compiles it.

PyPI has only a beta of Intel's Triton, which is older than the oldest that the package takes. It
lacks ``triton.knobs``, and asks SYCL what an architecture is called. This program makes up for
both.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

# A Data Center GPU Max, which the first Triton for Intel was made for.
MAX = {
    "name": "Intel(R) Data Center GPU Max 1550",
    "sub_group_sizes": [16, 32],
    "has_fp64": True,
    "has_subgroup_matrix_multiply_accumulate": True,
    "has_subgroup_2d_block_io": True,
    "has_bfloat16_conversions": True,
}


@dataclasses.dataclass
class Fact:
    """What came out of one compilation.

    Attributes:
        shared: bytes of shared memory.
        spirv: bytes of SPIR-V.
        mma: calls of matrix instructions.
        assembly: calls of inline assembly.
        fast_math: floating-point instructions that need not be exact.
    """

    kernel: str
    regime: str
    tile: dict[str, Any]
    shared: int
    spirv: int
    mma: int
    assembly: int
    fast_math: int


def prepare() -> tuple[str, Any, int]:
    if not hasattr(triton, "knobs"):
        triton.knobs = SimpleNamespace(runtime=SimpleNamespace(interpret=False))
    parser = SimpleNamespace(parse_device_arch=lambda _: "")
    names = backends["intel"].compiler.__init__.__globals__
    names["compile_module_from_src"] = lambda *_: parser
    target = GPUTarget("xpu", MAX, 16)
    driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    return "xpu", MAX, 16


def main(dtypes: str) -> None:
    target = prepare()
    import aot

    wanted = [
        each
        for dtype in dtypes.split(",")
        for some in (aot.matmuls, aot.linears)
        for each in some("xpu", dtype)
    ]
    facts = []
    for each in (*wanted, *aot.others(aot.MANY_PROGRAMS)):
        made = aot.compile_kernel(each.kernel, target, each.values, each.options)
        code = re.sub(r"^!.*", "", made.asm["llir"], flags=re.MULTILINE)
        fact = Fact(
            each.described,
            each.regime,
            each.tile,
            made.metadata.shared,
            len(made.asm["spv"]),
            mma=len(re.findall(r"call .*@\w*matrix_mad", code)),
            assembly=len(re.findall(r"call .*\basm\b", code)),
            fast_math=len(re.findall(r"= f\w+ (?:fast|nnan|ninf|nsz|arcp|afn|reassoc)\b", code)),
        )
        facts.append(dataclasses.asdict(fact))
    print(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1])
