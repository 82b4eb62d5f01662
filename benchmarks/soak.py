"""Ranks that generate for a long time: whether their memory stays as it is.

    python -m benchmarks.soak --minutes 20 --output build/soak.json

Two processes on gloo share the experts of a tiny model. They generate with batches, prompts and
numbers of new tokens that differ from call to call. Each tells its memory, and how many graphs it
has compiled and weights it has swizzled. Linux only.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import command, measured_process
from benchmarks.command import Log
from benchmarks.machine import machine
from benchmarks.report import column, columns, paragraphs
from mxfp4_fx.checkpoints.random_weights import CheckpointShape, write_random_checkpoint

TINY = CheckpointShape(
    layers=2, hidden=64, intermediate=96, experts=8, experts_per_token=2,
    heads=4, kv_heads=2, head_dim=16,
)  # fmt: skip
SETTINGS = ("minutes", "every", "least_calls", "ranks", "threads", "inner")
MOST_GROWTH = 0.01  # of a rank's memory: allocators keep some of what they get
COLUMNS = {
    "rank": column("rank"),
    "minutes": column("seconds", "{:.1f}", 60),
    "calls": column("calls"),
    "tokens": column("tokens"),
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
        "judgements": [judge(rank) for rank in samples],
    }
    command.finish(args, results, text(results))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=20.0, help="(%(default)s)")
    add("--every", type=float, default=15.0, help="seconds between samples (%(default)s)")
    add("--least-calls", type=int, default=8, help="of generate (%(default)s)")
    add("--ranks", type=int, default=2, help="(%(default)s)")
    add("--threads", type=int, default=1, help="of each rank (%(default)s)")
    add("--inner", default="inductor", help="what compiles graphs (%(default)s)")
    add("--limit-gib", type=float, default=4.0, help="of a rank's memory (%(default)s)")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace, log: Log) -> list[list[dict[str, Any]]]:
    """The samples of each rank, in the order of time.

    Raises:
        ProcessFailed: a rank failed, or had more memory than the limit.
    """
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(args.ranks) as pool:
        checkpoint = Path(scratch, "checkpoint")
        write_random_checkpoint(checkpoint, TINY, progress=False)

        def run(rank: int) -> list[dict[str, Any]]:
            settings = {
                **{name: getattr(args, name) for name in SETTINGS},
                "seconds": args.minutes * 60,
                "rank": rank,
                "checkpoint": str(checkpoint),
                "store": str(Path(scratch, "store")),
                "sample_seconds": 1.0,
                "environment": {"GLOO_SOCKET_IFNAME": "lo", "TORCHINDUCTOR_COMPILE_THREADS": "1"},
            }
            limit, program = int(args.limit_gib * 2**30), "benchmarks.soak_child"
            name = f"rank {rank}"
            found = measured_process.run(name, settings, limit, log, program, warm_pages=True)
            return [{"rank": rank, **sample} for sample in found]

        return list(pool.map(run, range(args.ranks)))


def judge(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether a rank's memory is flat, from its samples, and what it has compiled late."""
    return {"rank": samples[0]["rank"], **growth(samples)}


def growth(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Whether a process's memory is flat, from its samples, and what it has compiled late.

    Compares the medians of its second and its last quarter, which are some calls ``apart``; the
    first one is for compiling.
    """
    size = max(1, len(samples) // 4)
    early, late = samples[size : 2 * size] or samples[-1:], samples[-size:]
    own = [median(one["memory"]["anonymous"] for one in part) for part in (early, late)]
    grown = own[1] - own[0]
    return {
        "growth": grown,
        "apart": median(one["calls"] for one in late) - median(one["calls"] for one in early),
        "flat": grown <= MOST_GROWTH * own[0],
        "new": {
            name: samples[-1][name] - early[-1][name] for name in ("graphs", "swizzles", "calls")
        },
    }


def text(results: dict[str, Any]) -> str:
    """Everything that a reader should see."""
    samples, judgements = results["samples"], results["judgements"]
    shown = [one for rank in samples for one in rank[:: max(1, len(rank) // 8)]]
    shown += [rank[-1] for rank in samples if rank[-1] not in shown]
    shown.sort(key=lambda one: (one["rank"], one["seconds"]))
    said = [
        f"rank {one['rank']}: memory is {'flat' if one['flat'] else 'NOT flat'}: "
        f"{one['growth'] / 2**20:+.1f} MiB from the second to the last quarter, "
        f"{one['new']['graphs']} more graphs and {one['new']['swizzles']} more swizzles in "
        f"{one['new']['calls']} calls"
        for one in judgements
    ]
    return paragraphs(columns(shown, COLUMNS), "\n".join(said))


if __name__ == "__main__":
    raise SystemExit(main())
