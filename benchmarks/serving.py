"""A server's day: whether memory and compiled graphs stay as they are.

    python -m benchmarks.serving --output build/serving.json

One process answers requests of many batch sizes and lengths with a tiny model that
``mxfp4_fx.compile`` compiled and ``mxfp4_fx.warmup`` warmed up. Then it loads, compiles, calls and
drops one model after the other, and as many again that torch's own backend compiles. Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import command, measured_process, soak
from benchmarks.command import Log
from benchmarks.machine import machine
from benchmarks.report import column, columns, paragraphs
from mxfp4_fx.checkpoints.random_weights import write_random_checkpoint

TINY = dataclasses.replace(soak.TINY, layers=2)
SETTINGS = ("requests", "models", "samples", "threads", "inner")
PARTS = ("requests", "models", "peers")
# Of requests with prompts of several tokens: a prompt and a decoding, each with one prompt, with
# the first larger number of prompts and with any, each in two pieces.
MOST_GRAPHS = 2 * 3 * 2
COLUMNS = {
    "after": column("phase"),
    "minutes": column("seconds", "{:.1f}", 60),
    "anonymous, MiB": column("memory/anonymous", "{:.1f}", 2**20),
    "resident, MiB": column("memory/resident", "{:.1f}", 2**20),
    "graphs": column("graphs"),
    "swizzles": column("swizzles"),
}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if sys.platform != "linux":
        raise SystemExit("memory is read from /proc: this benchmark runs on Linux only")
    samples = measure(args, command.start(args))
    results = {
        "machine": machine(args.threads),
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "samples": samples,
        "judgements": judge(samples),
    }
    command.finish(args, results, text(results))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    add = parser.add_argument
    add("--requests", type=int, default=10_000, help="to one model (%(default)s)")
    add("--models", type=int, default=500, help="compiled and dropped, by each (%(default)s)")
    add("--samples", type=int, default=40, help="of memory, in each part (%(default)s)")
    add("--threads", type=int, default=1, help="(%(default)s)")
    add("--inner", default="inductor", help="what compiles graphs (%(default)s)")
    add("--limit-gib", type=float, default=4.0, help="of memory (%(default)s)")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace, log: Log) -> list[dict[str, Any]]:
    """The samples of both parts, in the order of time.

    Raises:
        ProcessFailed: the process failed, or had more memory than the limit.
    """
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch, "checkpoint")
        write_random_checkpoint(checkpoint, TINY, progress=False)
        settings = {
            **{name: getattr(args, name) for name in SETTINGS},
            "checkpoint": str(checkpoint),
            "sample_seconds": 1.0,
            "environment": {"TORCHINDUCTOR_COMPILE_THREADS": "1"},
        }
        limit, program = int(args.limit_gib * 2**30), "benchmarks.serving_child"
        return measured_process.run("server", settings, limit, log, program, warm_pages=True)


def judge(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether memory is flat in each part, by the rule of ``benchmarks.soak``, and the graphs.

    Of models that come and go also what each adds: ours (models) and torch's own (peers).
    """
    found = []
    for part in PARTS:
        of_part = [one for one in samples if one["part"] == part]
        if not of_part:
            continue
        each = {"part": part, **soak.growth(of_part)}
        if part == "requests":
            each["graphs"], each["most_graphs"] = of_part[-1]["graphs"], MOST_GRAPHS
        else:
            each["bytes_each"] = each["growth"] / max(1, each["apart"])
        found.append(each)
    return found


def text(results: dict[str, Any]) -> str:
    """Everything that a reader should see."""
    shown = []
    for part in PARTS:
        of_part = [one for one in results["samples"] if one["part"] == part]
        shown += [*of_part[:: max(1, len(of_part) // 8)], *of_part[-1:]]
    said = []
    for one in results["judgements"]:
        line = (
            f"{one['part']}: memory is {'flat' if one['flat'] else 'NOT flat'}: "
            f"{one['growth'] / 2**20:+.1f} MiB from the second to the last quarter, "
            f"{one['new']['graphs']} more graphs in {one['new']['calls']} {one['part']}"
        )
        if "bytes_each" in one:
            line += f"; {one['bytes_each'] / 2**10:+.1f} KiB each"
        if "graphs" in one:
            line += f"; {one['graphs']} graphs, at most {one['most_graphs']} expected"
        said.append(line)
    return paragraphs(columns(shown, COLUMNS), "\n".join(said))


if __name__ == "__main__":
    raise SystemExit(main())
