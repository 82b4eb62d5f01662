"""What the compilers of Triton's oldest and newest supported version make of the kernels.

Compiled for GPUs that need not be there (``aot.py``), with every tile that the launcher may choose.
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
from aot import TARGETS, TERMS

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
# Where `make` installs it beside the newest.
OLDEST = Path(os.environ.get("MXFP4_FX_OLDEST_TRITON", ROOT / "build" / "triton-3.6"))

# bfloat16 activations for all, other types once for each layout with the newest.
ALL_DTYPES = ("sm_80", "sm_90", "sm_100")

# Tests of one target run in one worker, which compiles once.
BY_TARGET = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in TARGETS]


@pytest.fixture(params=["newest", "oldest"])
def triton(request: pytest.FixtureRequest) -> str:
    if request.param == "oldest" and not OLDEST.exists():
        pytest.skip(f"needs Triton 3.6 in {OLDEST.name}: make test installs it")
    return str(request.param)


@functools.cache
def facts(triton: str, target: str) -> list[dict[str, Any]]:
    path = [str(OLDEST)] if triton == "oldest" else []
    dtypes = list(TERMS) if triton == "newest" and target in ALL_DTYPES else ["bf16"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*path, str(ROOT)])
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "aot.py", target, ",".join(dtypes)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return made


def wgmma_facts(triton: str) -> list[dict[str, Any]]:
    """The matmuls of bfloat16 activations on sm_90."""
    found = [f for f in facts(triton, "sm_90") if f["regime"] and f["kernel"].endswith("bf16")]
    assert {fact["regime"] for fact in found} == {"decode", "streaming", "prefill"}
    return found


def told(fact: dict[str, Any], *names: str) -> str:
    return f"{fact['kernel']} {fact['tile']}: " + ", ".join(f"{n} {fact[n]}" for n in names)


@pytest.mark.parametrize("target", BY_TARGET)
def test_nothing_spills_to_local_memory(triton: str, target: str) -> None:
    assert not [told(f, "stack", "registers") for f in facts(triton, target) if f["stack"]]


@pytest.mark.parametrize("target", BY_TARGET)
def test_shared_memory_is_within_the_target(triton: str, target: str) -> None:
    limit = TARGETS[target][1]
    assert not [told(f, "shared") for f in facts(triton, target) if f["shared"] > limit]


@pytest.mark.xdist_group("sm_90")
def test_wgmma_is_used_and_not_waited_for_one_by_one(triton: str) -> None:
    """The compiler that loses track of its pipeline puts a wait after each instruction."""
    for fact in wgmma_facts(triton):
        waits = fact["instructions"].get("WARPGROUP.DEPBAR.LE", 0)
        assert fact["wgmma"] == fact["mma"] > 2 * waits, told(fact, "mma", "wgmma", "instructions")


@pytest.mark.xdist_group("sm_90")
def test_weights_are_loaded_sixteen_bytes_at_a_time(triton: str) -> None:
    for fact in wgmma_facts(triton):
        assert fact["load_bytes"] == 16, told(fact, "load_bytes")
        threads = 32 * fact["tile"]["warps"]
        tile = fact["tile"]["block_n"] * fact["tile"]["block_k"] // 2  # bytes of codes
        activations = fact["tile"]["block_m"] * fact["tile"]["block_k"] * 2
        wide = fact["instructions"]["LDGSTS.E.BYPASS.128"]
        assert wide * threads * 16 >= tile + activations, told(fact, "instructions")


@pytest.mark.xdist_group("sm_90")
def test_instructions_per_weight(triton: str) -> None:
    for fact in wgmma_facts(triton):
        limit = 3.5 if fact["regime"] == "decode" else 3.2
        assert fact["per_weight"] <= limit, told(fact, "per_weight")


FRAGMENT_TARGETS = [
    pytest.param(name, marks=pytest.mark.xdist_group(name))
    for name in ("sm_80", "sm_89", "sm_90", "sm_120")
]


@pytest.mark.parametrize("target", FRAGMENT_TARGETS)
def test_subnormal_codes_are_not_flushed(triton: str, target: str) -> None:
    """The code of 0.5 in its place is a subnormal bfloat16 number until the scale is multiplied."""
    for fact in facts(triton, target):
        products = [n for n in fact["instructions"] if n.startswith(("HMUL2.BF16", "HFMA2.BF16"))]
        assert bool(products) == bool(fact["regime"]), told(fact, "instructions")
        assert not [name for name in products if "FTZ" in name], told(fact, "instructions")


@pytest.mark.xdist_group("sm_90")
def test_each_weight_is_decoded_by_one_thread(triton: str) -> None:
    assert {fact["copies"] for fact in wgmma_facts(triton)} == {1}


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(name, marks=pytest.mark.xdist_group(name))
        for name in ("sm_80", "sm_89", "sm_120")
    ],
)
def test_few_rows_on_mma_sync_decode_each_weight_once(triton: str, target: str) -> None:
    """And take no more instructions than when this was written: the limit follows from nothing."""
    found = [
        f for f in facts(triton, target)
        if f["kernel"].endswith("bf16") and f["tile"]["block_m"] <= 32
    ]  # fmt: skip
    assert len(found) == 6
    for fact in found:
        assert fact["mma"] > 0, told(fact, "mma")
        assert fact["copies"] == 1, told(fact, "copies")
        assert fact["per_weight"] <= 4.2, told(fact, "per_weight")
