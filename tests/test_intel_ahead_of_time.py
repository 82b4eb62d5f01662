"""What Intel's compiler makes of the Triton kernels, for a GPU that need not be there.

``aot_intel.py`` compiles every tile of Intel's table, for all dtypes of activations, to SPIR-V.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
# Where `make test-all` installs it.
INTEL = Path(os.environ.get("MXFP4_FX_INTEL_TRITON", ROOT / "build" / "triton-xpu"))
# What a program may use on any of Intel's GPUs that Triton serves.
SHARED = 64 << 10

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(
        not (INTEL / "triton" / "backends" / "intel").exists(),
        reason=f"needs Intel's Triton in {INTEL.name}: make test-all installs it",
    ),
]


@functools.cache
def facts() -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(INTEL.absolute()), str(ROOT)])
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "aot_intel.py", "bf16,fp16,fp32"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return made


def test_every_tile_becomes_spirv() -> None:
    kernels = {(f["kernel"], f["tile"].get("block_m")) for f in facts() if f["spirv"] > 0}
    assert (
        len(kernels) == 3 * 4 * 3 + 5
    )  # dtypes, kernels with tiles, their heights; and the others


@pytest.mark.parametrize(("dtype", "terms"), [("bf16", 1), ("fp16", 2), ("fp32", 3)])
def test_matrix_units_multiply_each_term(dtype: str, terms: int) -> None:
    """One instruction multiplies 8 x 16 x 16 numbers, once for each 16 threads."""
    found = [fact for fact in facts() if fact["kernel"].endswith(dtype)]
    assert found
    for fact in found:
        tile = fact["tile"]
        products = tile["block_m"] * tile["block_n"] * tile["block_k"] // tile["warps"]
        assert fact["mma"] == terms * products // (8 * 16 * 16), fact


def test_shared_memory_is_within_that_of_any_gpu() -> None:
    assert not [fact for fact in facts() if fact["shared"] > SHARED]


def test_no_assembly_of_other_gpus_is_reached() -> None:
    assert not [fact for fact in facts() if fact["assembly"]]


def test_arithmetic_stays_exact() -> None:
    """No instruction may assume that there is no NaN, or add in another order."""
    assert not [fact for fact in facts() if fact["fast_math"]]
