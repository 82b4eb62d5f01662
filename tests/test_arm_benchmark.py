"""Instructions that ARM's kernels take for a weight, as ``python -m benchmarks.arm`` counts them.

Counts are the same in each run of a program. A compiler may make others; the bounds leave it room.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from implementations import ARM_PATHS

from benchmarks import arm
from mxfp4_fx.core.hardware import CPU_PATHS

RESULTS = Path(arm.__file__).parent / "results" / "arm.json"
COUNTS = json.loads(RESULTS.read_text("utf-8"))["instructions_per_weight"]

counts = pytest.mark.skipif(
    not all(map(shutil.which, (arm.COMPILER, arm.EMULATOR))),
    reason=f"wants {arm.COMPILER} and {arm.EMULATOR} (Debian: g++-aarch64-linux-gnu, qemu-user)",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("arm")


@counts
@pytest.mark.exhaustive
@pytest.mark.parametrize("path", arm.PATHS)
def test_kernels_take_about_the_stored_instructions(path: str, folder: Path) -> None:
    program = arm.build(path, folder)
    for name, stored in COUNTS.items():
        weights, dtype, rows = name.split(", ")
        if rows == "1 row" or (dtype, rows) == ("bfloat16", "6 rows"):
            found = arm.per_weight(program, weights, dtype, int(rows.split()[0]))
            assert 0.9 * stored[path] < found < 1.1 * stored[path], name


@pytest.mark.parametrize("path", ARM_PATHS)
def test_one_row_takes_3_6_times_fewer_instructions_than_the_portable_path(path: str) -> None:
    stored = COUNTS["experts, bfloat16, 1 row"]
    assert stored["portable"] > 3.6 * stored[path]


@pytest.mark.parametrize("path", ARM_PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linears_are_native_while_a_byte_takes_one_instruction(
    path: str, dtype: torch.dtype
) -> None:
    rows = CPU_PATHS[path].linear_rows[dtype]
    name = f"linear, {str(dtype).removeprefix('torch.')}, {rows} row{'s' * (rows > 1)}"
    assert COUNTS[name][path] <= dtype.itemsize


@pytest.fixture
def emulate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Takes what the emulator writes."""

    def set_up(log: str) -> None:
        (tmp_path / "log").write_text(log, encoding="utf-8")
        emulator = tmp_path / "emulator"
        emulator.write_text(f"#!/bin/sh\ncat {tmp_path / 'log'}\n", encoding="utf-8")
        emulator.chmod(0o755)
        monkeypatch.setattr(arm, "EMULATOR", str(emulator))

    return set_up


def test_instructions_are_counted_by_blocks(emulate: Callable[[str], None]) -> None:
    """A block of two instructions runs three times, one of one once, and more around them."""
    emulate(
        "IN: main\n0x00000008:  d503201f  nop\n\n"
        "Trace 0: 0x7d8 [00/0000000000000008/00/00] main\n"
        "IN: counting_begins\n0x00000020:  d65f03c0  ret\n\n"
        "Trace 0: 0x7e0 [00/0000000000000020/00/00] counting_begins\n"
        "IN: main\n0x00000010:  d503201f  nop\n0x00000014:  d503201f  nop\n\n"
        "Trace 0: 0x7f0 [00/0000000000000010/00/00] main\n"
        "IN: main\n0x00000018:  d503201f  nop\n\n"
        "Trace 0: 0x7f8 [00/0000000000000018/00/00] main\n"
        "Trace 0: 0x7f0 [00/0000000000000010/00/00] main\n"
        "Trace 0: 0x7f0 [00/0000000000000010/00/00] main\n"
        "IN: counting_ends\n0x00000024:  d65f03c0  ret\n\n"
        "Trace 0: 0x7e8 [00/0000000000000024/00/00] counting_ends\n"
        "Trace 0: 0x7d8 [00/0000000000000008/00/00] main\n"
    )
    assert arm.executed([]) == 7


def test_a_log_without_the_names_of_functions_is_an_error(emulate: Callable[[str], None]) -> None:
    emulate(
        "IN:\n0x00000010:  d503201f  nop\n\n"
        "Trace 0: 0x7f0 [00/0000000000000010/00/00]\n"
        "Trace 0: 0x7f0 [00/0000000000000010/00/00]\n"
    )
    with pytest.raises(RuntimeError, match="program executed nothing between"):
        arm.executed(["program"])
