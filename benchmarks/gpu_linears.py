"""Linears on a GPU: weights in MXFP8 by this package's kernels, beside torch's in bfloat16.

    python -m benchmarks.gpu_linears --output build/gpu-linears.json
    TRITON_INTERPRET=1 python -m benchmarks.gpu_linears --device cpu --rows 1,3 --shapes 40+8x64

Every result is checked against float64. Times are those of CUDA graphs in which weights rotate, so
that they come from memory. A shape with several N, as ``4096+512+512x2880``, is linears of one
input. The gradient of the input is measured, too. The JSON is written after each number of rows;
nothing is begun after ``--seconds``. In Triton's interpreter times mean nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import command, device_ops
from benchmarks.contenders import WrongResult
from benchmarks.gpu_device import Device
from benchmarks.moe import relative_error
from benchmarks.report import paragraphs
from benchmarks.timing import Clock, summary

# gpt-oss-20b's q, k and v together, its o, and its head.
SHAPES = ("4096+512+512x2880", "2880x4096", "201088x2880")
ROWS = (1, 4, 16, 32, 64, 128, 512, 1024, 4096)
_ROTATING_CACHES = 3  # weights that rotate, in multiples of the second cache
_MOST_ERROR = 8e-3  # of bfloat16

Run = Callable[[], Sequence[Tensor]]


def main(argv: list[str] | None = None, clock: Clock = time.perf_counter) -> int:
    parser = command.parser(__doc__)
    add = parser.add_argument
    add("--device", default="cuda", help="cuda, or cpu with TRITON_INTERPRET=1")
    add("--rows", type=command.numbers, default=ROWS, help=f"({','.join(map(str, ROWS))})")
    add("--shapes", type=command.names, default=SHAPES, help=f"N x K ({','.join(SHAPES)})")
    add("--seconds", type=float, default=420.0, help="nothing is begun afterwards (%(default)s)")
    add("--cell-seconds", type=float, default=0.12, help="for one time (%(default)s)")
    args = parser.parse_args(argv)
    started, log = clock(), command.start(args, clock)
    device = Device(args.device, clock)
    device.measure_floors()
    results: dict[str, Any] = {
        "complete": False,
        "machine": device.facts(),
        "settings": {k: v for k, v in vars(args).items() if k not in ("output", "silent")},
        "floors": device.floors(),
        "linears": [],
        "skipped": [],
    }

    def in_time() -> bool:
        return clock() <= started + args.seconds

    with torch.no_grad():
        for shape in args.shapes:
            log(shape)
            rows = [*args.rows]
            for row in measure(shape, rows, args, device) if in_time() else ():
                results["linears"].append(row)
                command.write(args.output, results)
                rows.remove(row["rows"])
                if not in_time():
                    break
            results["skipped"] += [{"shape": shape, "rows": each} for each in rows]
            device.release()
    results["complete"] = not results["skipped"]
    command.finish(args, results, text(results))
    return 0


def measure(
    shape: str, counts: Sequence[int], args: argparse.Namespace, device: Device
) -> Iterator[dict[str, Any]]:
    """Time one shape with each number of rows; yield what was found for it.

    Raises:
        WrongResult: rounding does not explain how far a result is from float64's.
    """
    heights, k = shape.partition("x")[0].split("+"), int(shape.partition("x")[2])
    generator = torch.Generator().manual_seed(0)
    first = [
        (torch.randn((int(n), k), generator=generator) * k**-0.5).bfloat16().to(device.torch)
        for n in heights
    ]
    in_mxfp8 = [device_ops.in_mxfp8(weight) for weight in first]
    values = [device_ops.of_mxfp8(weight, torch.bfloat16) for weight in in_mxfp8]
    size = sum(weight.nbytes for weight in first)
    copies = 1 + _ROTATING_CACHES * device.l2_bytes() // size
    exact = [[weight.clone() for weight in first] for _ in range(copies)]
    held = [[tuple(p.clone() for p in weight) for weight in in_mxfp8] for _ in range(2 * copies)]
    for rows in [*counts]:
        x = torch.randn((rows, k), generator=generator).bfloat16().to(device.torch)
        grads = [
            torch.randn((rows, int(n)), generator=generator).bfloat16().to(device.torch)
            for n in heights
        ]
        cells: dict[str, tuple[list[Run], Tensor]] = {
            "bf16": (
                [_torch(x, weights) for weights in exact],
                torch.cat([x.double() @ weight.double().T for weight in first], 1),
            ),
            "mxfp8": (
                [_mxfp8(x, weights) for weights in held],
                torch.cat([x.double() @ value.double().T for value in values], 1),
            ),
            "bf16_backward": (
                [_torch_backward(grads, weights) for weights in exact],
                _exact_gradient(grads, first),
            ),
            "mxfp8_backward": (
                [_backward(grads, weights) for weights in held],
                _exact_gradient(grads, values),
            ),
        }
        times = {name: _time(name, *cell, args, device) for name, cell in cells.items()}
        medians = {name: time["median"] for name, time in times.items()}
        yield {
            "shape": shape,
            "rows": rows,
            "copies": copies,
            "milliseconds": times,
            "times_faster": medians["bf16"] / medians["mxfp8"],
            "backward_times_faster": medians["bf16_backward"] / medians["mxfp8_backward"],
            "bytes_per_second": sum(p.nbytes for weight in in_mxfp8 for p in weight)
            / (medians["mxfp8"] / 1e3),
        }


def _time(
    name: str, runs: list[Run], expected: Tensor, args: argparse.Namespace, device: Device
) -> dict[str, Any]:
    error = relative_error(torch.cat(list(runs[0]()), 1), expected)
    if not error <= _MOST_ERROR:
        raise WrongResult(f"{name}: off by {error:.3g}, {list(expected.shape)}")
    samples, _ = device.in_graph(lambda: [run() for run in runs][-1][0], args.cell_seconds)
    return summary([1e3 * sample / len(runs) for sample in samples])


def _torch(x: Tensor, weights: Sequence[Tensor]) -> Run:
    return lambda: [F.linear(x, weight) for weight in weights]


def _mxfp8(x: Tensor, weights: Sequence[Any]) -> Run:
    return lambda: device_ops.linears_mxfp8(x, weights, "triton")


def _torch_backward(grads: Sequence[Tensor], weights: Sequence[Tensor]) -> Run:
    def run() -> list[Tensor]:
        total = grads[0] @ weights[0]
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            total = torch.addmm(total, grad, weight)
        return [total]

    return run


def _exact_gradient(grads: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return torch.cat([*grads], 1).double() @ torch.cat([*weights]).double()


def _backward(grads: Sequence[Tensor], weights: Sequence[Any]) -> Run:
    return lambda: [device_ops.linears_mxfp8_backward(grads, weights, "triton")]


def text(results: dict[str, Any]) -> str:
    lines = [
        "weights in MXFP8: rows: times as fast as bfloat16, the gradient (GB/s of the weights)"
    ]
    for shape in dict.fromkeys(row["shape"] for row in results["linears"]):
        each = "  ".join(
            f"{row['rows']}: {row['times_faster']:.2f}, {row['backward_times_faster']:.2f} "
            f"({row['bytes_per_second'] / 1e9:.0f})"
            for row in results["linears"]
            if row["shape"] == shape
        )
        lines.append(f"{shape}   {each}")
    late = ", ".join(f"{one['shape']}: {one['rows']}" for one in results["skipped"])
    lines += [f"not begun in time: {late}"] if late else []
    return paragraphs(str(results["machine"]["device"]), "\n".join(lines))


if __name__ == "__main__":
    raise SystemExit(main())
