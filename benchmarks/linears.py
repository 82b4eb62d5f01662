"""Linears on a CPU: the native kernel of few rows beside torch's, and weights in MXFP8.

    python -m benchmarks.linears --output build/linears.json
    python -m benchmarks.linears --rows 1,4 --shapes 64x64 --rounds 2    # in seconds

The result says up to how many rows the native kernel is faster: what ``CpuPath.linear_rows`` in
``core/hardware.py`` should have for the instruction-set path of this machine. Weights rotate, so
that they come from memory, as those of a model's layers do. Weights in MXFP8 are measured as they
are served, with few and with many rows, beside the faster of the two ways with exact weights.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import command
from benchmarks.contenders import WrongResult
from benchmarks.machine import machine
from benchmarks.moe import relative_error
from benchmarks.timing import Clock, seconds, summary
from mxfp4_fx.core import hardware, mxfp8
from mxfp4_fx.core.hardware import DTYPES
from mxfp4_fx.ops import cpu_linear, cpu_mxfp8, reference_around

# gpt-oss-20b's k and v together, and its o.
SHAPES = ("1024x2880", "2880x4096")
ROWS = (1, 2, 4, 8, 10, 12, 16, 32, 48, 64, 128, 256)
_ROTATING = 256 << 20  # bytes of weights, more than any cache holds
_SAMPLE_SECONDS = 0.03
_MOST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}

Linear = Callable[[Tensor, list[Any], list[None]], list[Tensor]]


def in_mxfp8(x: Tensor, weights: list[tuple[Tensor, Tensor]], biases: list[None]) -> list[Tensor]:
    codes, scales = zip(*weights, strict=True)
    return cpu_mxfp8.linears(x, codes, scales, biases)


WAYS: dict[str, Linear] = {
    "native": cpu_linear.linears,
    "torch": reference_around.linears,
    "mxfp8": in_mxfp8,
}


def main(argv: list[str] | None = None, clock: Clock = time.perf_counter) -> int:
    parser = command.parser(__doc__)
    add = parser.add_argument
    add("--rows", type=command.numbers, default=ROWS, help=f"({','.join(map(str, ROWS))})")
    add("--shapes", type=command.names, default=SHAPES, help=f"N x K ({','.join(SHAPES)})")
    names = [_name(dtype) for dtype in DTYPES]
    add("--dtypes", type=command.names, default=names, help=f"({','.join(names)})")
    add("--rounds", type=int, default=5, help="that are measured (%(default)s)")
    add("--threads", type=int, default=2, help="(%(default)s)")
    args = parser.parse_args(argv)
    log = command.start(args, clock)
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {
        "machine": machine(args.threads),
        "path": hardware.cpu_path(),
        "settings": {k: v for k, v in vars(args).items() if k not in ("output", "silent")},
        "linears": [],
    }
    with torch.no_grad():
        for dtype in args.dtypes:
            for shape in args.shapes:
                log(f"{dtype} {shape}")
                found = measure(getattr(torch, dtype), shape, args, clock)
                results["linears"] += found
                command.write(args.output, results)
    results["faster_up_to"] = limits(results["linears"])
    command.write(args.output, results)
    command.finish(args, results, text(results))
    return 0


def measure(
    dtype: torch.dtype, shape: str, args: argparse.Namespace, clock: Clock
) -> list[dict[str, Any]]:
    """Time all ways with one weight's shape, for each number of rows.

    Raises:
        WrongResult: rounding does not explain how far a result is from float64's.
    """
    n, k = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    first = (torch.randn((n, k), generator=generator) * k**-0.5).to(dtype)
    codes, scales = (part[None] for part in mxfp8.quantize(first))
    values = mxfp8.dequantize(codes[0], scales[0], torch.float32)
    count = _ROTATING // first.nbytes
    exact = [first, *(first.clone() for _ in range(count))]
    of_8_bits = [(codes, scales), *((codes.clone(), scales.clone()) for _ in range(2 * count))]
    weights: dict[str, list[Any]] = {"native": exact, "torch": exact, "mxfp8": of_8_bits}
    samples: dict[tuple[int, str], list[float]] = {(r, way): [] for r in args.rows for way in WAYS}
    inputs = {r: torch.randn((r, k), generator=generator).to(dtype) for r in args.rows}
    with native_for_all_rows():
        for way, run in WAYS.items():
            for x in inputs.values():
                held = values if way == "mxfp8" else first
                found = run(x, weights[way][:1], [None])[0]
                error = relative_error(found, x.double() @ held.double().T)
                if not error <= _MOST_ERROR[dtype]:
                    raise WrongResult(f"{way}: off by {error:.3g}, {x.shape[0]} rows of {shape}")
        turns = {way: _forever(held) for way, held in weights.items()}
        for turn in range(args.rounds):
            mixed = random.Random(turn)
            for r, way in mixed.sample(list(samples), len(samples)):
                call = _call(WAYS[way], inputs[r], turns[way])
                samples[r, way].append(statistics.median(seconds(call, _SAMPLE_SECONDS, clock)))
    return [
        {
            "dtype": _name(dtype),
            "shape": shape,
            "rows": r,
            "milliseconds": {way: summary([1e3 * s for s in samples[r, way]]) for way in WAYS},
            "times_faster": summary(
                [t / n for t, n in zip(samples[r, "torch"], samples[r, "native"], strict=True)]
            ),
            "bytes_per_second": first.nbytes / statistics.median(samples[r, "native"]),
            "mxfp8": {
                "times_faster": summary(
                    [
                        min(exact) / m
                        for *exact, m in zip(*(samples[r, way] for way in WAYS), strict=True)
                    ]
                ),
                "bytes_per_second": (codes.nbytes + scales.nbytes)
                / statistics.median(samples[r, "mxfp8"]),
            },
        }
        for r in args.rows
    ]


def limits(results: list[dict[str, Any]]) -> dict[str, int]:
    """Return dtype -> up to how many of the rows the native kernel is faster with every shape."""
    found: dict[str, int] = {}
    for dtype in dict.fromkeys(result["dtype"] for result in results):
        slower = [
            result["rows"]
            for result in results
            if result["dtype"] == dtype and result["times_faster"]["median"] < 1
        ]
        rows = [result["rows"] for result in results if result["dtype"] == dtype]
        found[dtype] = max((r for r in rows if r < min(slower, default=max(rows) + 1)), default=0)
    return found


def native_for_all_rows() -> Any:
    """Return a context in which the native kernel computes any number of rows."""
    return mock.patch.object(hardware, "linear_rows", return_value=1 << 30)


def text(results: dict[str, Any]) -> str:
    lines = [f"path {results['path']}: times faster than torch"]
    for dtype in dict.fromkeys(result["dtype"] for result in results["linears"]):
        for shape in dict.fromkeys(result["shape"] for result in results["linears"]):
            each = "  ".join(
                f"{result['rows']}: {result['times_faster']['median']:.2f}"
                for result in results["linears"]
                if (result["dtype"], result["shape"]) == (dtype, shape)
            )
            lines.append(f"{dtype} {shape}   {each}")
    lines.append("weights in MXFP8: times faster than the faster of both; GB/s of the native ones")
    for dtype in dict.fromkeys(result["dtype"] for result in results["linears"]):
        for shape in dict.fromkeys(result["shape"] for result in results["linears"]):
            each = "  ".join(
                f"{result['rows']}: {result['mxfp8']['times_faster']['median']:.2f} "
                f"({result['mxfp8']['bytes_per_second'] / 1e9:.1f}; "
                f"{result['bytes_per_second'] / 1e9:.1f})"
                for result in results["linears"]
                if (result["dtype"], result["shape"]) == (dtype, shape)
            )
            lines.append(f"{dtype} {shape}   {each}")
    known = ", ".join(f"{dtype} {rows}" for dtype, rows in results["faster_up_to"].items())
    return "\n".join([*lines, f"faster up to: {known}"])


def _call(run: Linear, x: Tensor, weights: Iterator[Any]) -> Callable[[], object]:
    return lambda: run(x, [next(weights)], [None])


def _forever(weights: list[Any]) -> Iterator[Any]:
    while True:
        yield from weights


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    raise SystemExit(main())
