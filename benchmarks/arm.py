"""Instructions that the CPU kernels execute for a weight, on ARM, in an emulator.

    python -m benchmarks.arm --output benchmarks/results/arm.json

Weights are those of experts (MXFP4), linears as a model holds them, and linears in MXFP8. It wants
aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user). Counted is the
second of two products. A count says nothing of speed beyond that: how long an instruction takes
differs between CPUs.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import command
from benchmarks.report import table
from mxfp4_fx.core.hardware import CPU_PATHS
from mxfp4_fx.ops.cpu_structs import DTYPES

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
KERNELS = Path(__file__).parent.parent / "mxfp4_fx" / "ops" / "cpu_kernels"
DRIVER = Path(__file__).parent / "arm_driver.cpp"
WEIGHTS = 4096 * 256  # of the driver
PATHS = ("portable", *(name for name, path in CPU_PATHS.items() if path.is_for_arm))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    missing = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
    if missing:
        print(f"benchmarks.arm: {' and '.join(missing)} not found; see the docstring")
        return 2
    log = command.start(args)
    counts: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for path in PATHS:
            log(f"compiling {path}")
            program = build(path, Path(folder))
            for weights, dtype, rows in itertools.product(args.weights, args.dtypes, args.rows):
                name = f"{weights}, {dtype}, {rows} row{'s' if rows > 1 else ''}"
                log(f"{path}: {name}")
                counts.setdefault(name, {})[path] = per_weight(program, weights, dtype, rows)
    command.finish(args, {"instructions_per_weight": counts}, text(counts))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.add_argument("--weights", type=command.names, default=("experts", "linear", "mxfp8"))
    parser.add_argument("--dtypes", type=command.names, default=("bfloat16", "float16", "float32"))
    parser.add_argument("--rows", type=command.numbers, default=(1, 2, 3, 6, 8))
    return parser.parse_args(argv)


def build(path: str, folder: Path) -> Path:
    program = folder / path
    flags = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-static", "-fopenmp")
    define = f"-DMXFP4_PATH_{path.upper()}=1"
    subprocess.run(
        [COMPILER, *flags, *CPU_PATHS[path].compiler_flags, define, f"-I{KERNELS}", DRIVER, "-o",
         program], check=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return program


def per_weight(program: Path, weights: str, dtype: str, rows: int) -> float:
    number = str(DTYPES[getattr(torch, dtype)])
    return executed([program, weights, number, str(rows)]) / WEIGHTS


def executed(program: list[Any]) -> int:
    """The instructions that a program executes between two functions of the driver.

    The emulator lists the instructions of each block of them once, when it translates the block,
    and writes a line each time it executes it.
    """
    sizes: dict[bytes, int] = {}
    executions: collections.Counter[bytes] = collections.Counter()
    block: bytes | None = None
    counts = False
    options = ("-d", "exec,in_asm,nochain", "-D", "/dev/stdout")
    with subprocess.Popen([EMULATOR, *options, *program], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if line.startswith(b"Trace"):  # Trace 0: 0x7f19dae00100 [.../0000000000403540/...] name
                if line.endswith((b" counting_begins\n", b" counting_ends\n")):
                    counts = line.endswith(b"begins\n")
                elif counts:
                    executions[line.split(b"/", 2)[1]] += 1
            elif line.startswith(b"IN:"):
                block = None
            elif line.startswith(b"0x"):  # 0x00403540:  d503201f  nop
                if block is None:
                    block = line[2 : line.index(b":")].zfill(16)
                    sizes[block] = 0
                sizes[block] += 1
    if running.returncode:
        raise RuntimeError(f"{program[0]} ended with {running.returncode}")
    if not executions:
        raise RuntimeError(
            f"{program[0]} executed nothing between counting_begins and counting_ends"
        )
    return sum(sizes[block] * count for block, count in executions.items())


def text(counts: dict[str, dict[str, float]]) -> str:
    rows = [[name, *(f"{found[path]:.2f}" for path in PATHS)] for name, found in counts.items()]
    return "instructions for a weight\n" + table(["weights, activations", *PATHS], rows)


if __name__ == "__main__":
    sys.exit(main())
