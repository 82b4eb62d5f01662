"""What the compilers of Triton's oldest and newest supported version make of the kernels.

Compiled for GPUs that need not be there (``aot.py``): with one tile of a regime of each layout, and
exhaustively with those that the launcher may choose, for other targets, by the oldest version.
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
from aot import TARGETS

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
# Where `make` installs it beside the newest.
OLDEST = Path(os.environ.get("MXFP4_FX_OLDEST_TRITON", ROOT / "build" / "triton-3.6"))

# What a run of aot.py compiles: target and regimes -> dtypes of activations.
EACH = ":decode,streaming,prefill"
RUNS: dict[str, dict[str, str]] = {
    "newest": dict.fromkeys(
        (f"sm_90{EACH}", "sm_75:decode", "sm_80:decode", "sm_100:prefill", "gfx942:decode"), "bf16"
    ),
    "all tiles": dict.fromkeys(("sm_75", "sm_90", "sm_100", "sm_120", "gfx942"), "bf16"),
    "more targets": dict.fromkeys((f"sm_80{EACH}", f"sm_89{EACH}", f"gfx950{EACH}"), "bf16"),
    # Two terms and three in each regime and on each kind of matrix unit.
    "more terms": {
        "sm_80:streaming": "fp16,fp32",
        "sm_90:decode,prefill": "fp16,fp32",
        "sm_100:prefill": "fp32",
    },
    "more dtypes": {f"sm_75{EACH}": "fp16,fp32"},
    # Each target in a regime, and one in all: which regimes a target has is not the compiler's.
    "oldest": dict.fromkeys(
        (
            *("sm_75:decode", "sm_80:decode", "sm_89:streaming", f"sm_90{EACH}", "sm_100:prefill"),
            *("sm_120:decode", "gfx942:streaming", "gfx950:prefill"),
        ),
        "bf16",
    ),
}


def of_runs(*targets: str, terms: bool = True) -> pytest.MarkDecorator:
    """Parametrizes a test by all runs and their targets, or those of these that there are.

    Those of a run are tested by one worker, which compiles once; without ``terms`` activations are
    bfloat16.
    """
    cases = []
    for run, asked in RUNS.items():
        marks = [pytest.mark.exhaustive] * (run != "newest")
        if terms or set(asked.values()) == {"bf16"}:
            found = [target.partition(":")[0] for target in asked]
            found = [target for target in found if not targets or target in targets]
            cases += [pytest.param(run, target, marks=marks) for target in found]
    return pytest.mark.parametrize(("run", "target"), cases)


def facts(run: str, target: str) -> list[dict[str, Any]]:
    if run == "oldest" and not OLDEST.exists():
        pytest.skip(f"needs Triton 3.6 in {OLDEST.name}: make test installs it")
    return compiled(run)[target]


@functools.cache
def compiled(run: str) -> dict[str, list[dict[str, Any]]]:
    path = [str(OLDEST.absolute())] if run == "oldest" else []
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path += [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    arguments = [word for pair in RUNS[run].items() for word in pair]
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "aot.py", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made: dict[str, list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return made


def wgmma_facts(run: str, target: str) -> list[dict[str, Any]]:
    """The matmuls of bfloat16 activations on sm_90."""
    found = [f for f in facts(run, target) if f["regime"] and f["kernel"].endswith("bf16")]
    assert {fact["regime"] for fact in found} == {"decode", "streaming", "prefill"}
    return found


def linears_facts(run: str, target: str) -> list[dict[str, Any]]:
    """The kernels for linears in MXFP8, of any dtype of activations."""
    found = [f for f in facts(run, target) if "linears" in f["kernel"]]
    assert found
    return found


def told(fact: dict[str, Any], *names: str) -> str:
    return f"{fact['kernel']} {fact['tile']}: " + ", ".join(f"{n} {fact[n]}" for n in names)


@of_runs()
def test_nothing_spills_to_local_memory(run: str, target: str) -> None:
    assert not [told(f, "stack", "registers") for f in facts(run, target) if f["stack"]]


@of_runs()
def test_shared_memory_is_within_the_target(run: str, target: str) -> None:
    limit = TARGETS[target][1]
    assert not [told(f, "shared") for f in facts(run, target) if f["shared"] > limit]


@of_runs("sm_90", terms=False)
def test_wgmma_is_used_and_not_waited_for_one_by_one(run: str, target: str) -> None:
    """The compiler that loses track of its pipeline puts a wait after each instruction."""
    for fact in wgmma_facts(run, target):
        waits = fact["instructions"].get("WARPGROUP.DEPBAR.LE", 0)
        assert fact["wgmma"] == fact["mma"] > 2 * waits, told(fact, "mma", "wgmma", "instructions")


@of_runs("sm_90", terms=False)
def test_weights_are_loaded_sixteen_bytes_at_a_time(run: str, target: str) -> None:
    for fact in wgmma_facts(run, target):
        assert fact["load_bytes"] == 16, told(fact, "load_bytes")
        threads = 32 * fact["tile"]["warps"]
        tile = fact["tile"]["block_n"] * fact["tile"]["block_k"] // 2  # bytes of codes
        activations = fact["tile"]["block_m"] * fact["tile"]["block_k"] * 2
        wide = fact["instructions"]["LDGSTS.E.BYPASS.128"]
        assert wide * threads * 16 >= tile + activations, told(fact, "instructions")


@of_runs("sm_90", terms=False)
def test_instructions_per_weight(run: str, target: str) -> None:
    for fact in wgmma_facts(run, target):
        limit = 3.5 if fact["regime"] == "decode" else 3.2
        assert fact["per_weight"] <= limit, told(fact, "per_weight")


@of_runs("sm_80", "sm_89", "sm_90", "sm_120")
def test_subnormal_codes_are_not_flushed(run: str, target: str) -> None:
    """The code of 0.5 in its place is a subnormal bfloat16 number until the scale is multiplied."""
    for fact in facts(run, target):
        products = [n for n in fact["instructions"] if n.startswith(("HMUL2.BF16", "HFMA2.BF16"))]
        assert bool(products) == bool(fact["regime"]), told(fact, "instructions")
        assert not [name for name in products if "FTZ" in name], told(fact, "instructions")


@of_runs("sm_90", terms=False)
def test_each_weight_is_decoded_by_one_thread(run: str, target: str) -> None:
    assert {fact["copies"] for fact in wgmma_facts(run, target)} == {1}


@of_runs("sm_80", "sm_89", "sm_120", terms=False)
def test_few_rows_on_mma_sync_decode_each_weight_once(run: str, target: str) -> None:
    """And take no more instructions than when this was written: the limit follows from nothing."""
    found = [
        f for f in facts(run, target)
        if f["kernel"].endswith("bf16") and f["tile"]["block_m"] <= 32
    ]  # fmt: skip
    assert len(found) >= 1
    for fact in found:
        assert fact["mma"] > 0, told(fact, "mma")
        assert fact["copies"] == 1, told(fact, "copies")
        assert fact["per_weight"] <= 4.2, told(fact, "per_weight")


@of_runs("sm_80", "sm_89", "sm_90", "sm_120")
def test_each_weight_of_linears_is_decoded_by_one_thread(run: str, target: str) -> None:
    """In two products, for its own missing factor and for its scale."""
    for fact in linears_facts(run, target):
        assert fact["copies"] == 2, told(fact, "copies")


@of_runs("sm_90")
def test_linears_use_wgmma(run: str, target: str) -> None:
    for fact in linears_facts(run, target):
        assert fact["wgmma"] == fact["mma"] > 0, told(fact, "mma", "wgmma")


@of_runs("sm_80", "sm_89", "sm_90", "sm_120", terms=False)
def test_instructions_per_weight_of_linears_of_few_rows(run: str, target: str) -> None:
    """No more than when this was written: the limit follows from nothing."""
    for fact in linears_facts(run, target):
        if fact["tile"]["block_m"] == 16:
            assert fact["load_bytes"] == 16, told(fact, "load_bytes")
            assert fact["per_weight"] <= 8, told(fact, "per_weight")


@of_runs("sm_75")
def test_sm_75_adds_each_product_of_float32_in_one_instruction(run: str, target: str) -> None:
    """And takes no more others than when this was written: the limit follows from nothing."""
    found = [fact for fact in facts(run, target) if fact["regime"]]
    assert {"linears" in fact["kernel"] for fact in found} == {False, True}
    for fact in found:
        assert fact["mma"] == 0, told(fact, "mma")
        assert fact["fma"] == fact["tile"]["block_m"], told(fact, "fma")
        assert fact["per_weight"] <= 16 + 1.15 * fact["tile"]["block_m"], told(fact, "per_weight")


@of_runs("sm_75")
def test_sm_75_keeps_subnormal_numbers(run: str, target: str) -> None:
    for fact in facts(run, target):
        flushing = [name for name in fact["instructions"] if "FTZ" in name]
        assert not flushing, told(fact, "instructions")
