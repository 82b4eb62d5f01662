"""Experts shared among processes of this machine, on gloo: what that costs, and what it saves.

    python -m benchmarks.distributed --output build/distributed.json      # some minutes

One process with all threads, then ranks that share the threads: by expert parallelism (EP) and by
tensor parallelism (TP). They generate the same tokens from a small checkpoint of random weights.
The cores are the same, and so is the memory they read from: this shows what processes cost, in
time and bytes sent, and how memory is divided. It shows no speed-up, which takes more machines:
docs/scaling.md. Linux only.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import command, end_to_end, measured_process
from benchmarks.command import Log
from benchmarks.contenders import WrongResult
from benchmarks.distributed_child import ONE, WAYS
from benchmarks.machine import machine
from benchmarks.report import column, columns, paragraphs
from mxfp4_fx.checkpoints.random_weights import CheckpointShape, write_random_checkpoint

# Wide enough that a layer's experts, 8 MB, outweigh the rest; 12 blocks of I.
SMALL = CheckpointShape(
    layers=4, hidden=512, intermediate=384, experts=16, experts_per_token=4,
    heads=8, kv_heads=2, head_dim=64, vocab=8192,
)  # fmt: skip
SETTINGS = ("ranks", "threads", "prompt_tokens", "new_tokens", "rounds", "inner", "ways")
NOTE = (
    "all ranks run on this machine's cores and share its memory: the figures show what processes "
    "cost and how memory is divided, not a speed-up; there is no speed of more ranks than cores"
)
COLUMNS = {
    "way": column("way"),
    "ranks": column("ranks"),
    "threads each": column("threads"),
    "prefill, tokens/s": column("prefill", "{:.1f}"),
    "decode, tokens/s": column("decode", "{:.1f}"),
    "sent a token, kB": column("sent_per_token", "{:.2f}", 1e3),
    "by the model": column("expected_per_token", "{:.2f}", 1e3),
    "swizzles": column("swizzles/first"),
    "again": column("swizzles/again"),
    "experts, MiB": column("experts_bytes", "{:.1f}", 2**20),
    "of files touched": column("mapped_bytes", "{:.1f}", 2**20),
    "peak above imports, MiB": column("peak_bytes", "{:.0f}", 2**20),
}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if sys.platform != "linux":
        raise SystemExit("memory is read from /proc: this benchmark runs on Linux only")
    started, log = time.perf_counter(), command.start(args)
    results: dict[str, Any] = {
        "machine": machine(args.threads),
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "notes": [NOTE],
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory, "checkpoint")
        shape = end_to_end.TINY if args.tiny else SMALL
        write_random_checkpoint(checkpoint, shape, progress=False)
        for way in args.ways:
            for ranks in [1] if way == ONE else [count for count in args.ranks if count > 1]:
                results["runs"].append(measure(args, way, ranks, checkpoint, log))
                command.write(args.output, results)  # what there is, should the next one fail
    results["seconds"] = time.perf_counter() - started
    command.finish(args, results, text(results))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    add = parser.add_argument
    add("--ranks", type=command.numbers, default=(1, 2), help="(1,2)")
    add("--ways", type=command.names, default=WAYS, help=f"some of {','.join(WAYS)} (all)")
    add("--threads", type=int, default=2, help="and cores, of all ranks together (%(default)s)")
    add("--prompt-tokens", type=int, default=64, help="(%(default)s)")
    add("--new-tokens", type=int, default=32, help="after the first one (%(default)s)")
    add("--rounds", type=int, default=5, help="of which speeds are the medians (%(default)s)")
    add("--inner", default="inductor", help="what compiles graphs (%(default)s)")
    add("--tiny", action="store_true", help="tiny widths, for tests")
    add("--limit-gib", type=float, default=8.0, help="of a rank's memory (%(default)s)")
    args = parser.parse_args(argv)
    if unknown := set(args.ways) - set(WAYS):
        parser.error(f"--ways: {', '.join(sorted(unknown))} is none of {', '.join(WAYS)}")
    return args


def measure(
    args: argparse.Namespace, way: str, ranks: int, checkpoint: Path, log: Log
) -> dict[str, Any]:
    """Let so many ranks generate together; what they found, and a summary of it.

    Raises:
        ProcessFailed: a rank failed, or had more memory than the limit.
        WrongResult: ranks generated other tokens.
    """
    cores = measured_process.choose_cores(args.threads)
    threads = max(1, args.threads // ranks)
    limit = int(args.limit_gib * 2**30)
    measured_process.forget_pages(checkpoint)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(ranks) as pool:
        shared = {
            **{
                name: getattr(args, name)
                for name in ("prompt_tokens", "new_tokens", "rounds", "inner")
            },
            "way": way,
            "ranks": ranks,
            "threads": threads,
            "cores": cores,
            "checkpoint": str(checkpoint),
            "store": str(Path(scratch, "store")),
            "environment": {"GLOO_SOCKET_IFNAME": "lo", "TORCHINDUCTOR_COMPILE_THREADS": "1"},
        }

        def run(rank: int) -> list[dict[str, Any]]:
            name, settings = f"{way}, rank {rank}", {**shared, "rank": rank}
            program = "benchmarks.distributed_child"
            return measured_process.run(name, settings, limit, log, program, warm_pages=True)

        phases = list(pool.map(run, range(ranks)))
    if any(each[-1]["tokens"] != phases[0][-1]["tokens"] for each in phases):
        raise WrongResult(f"{way}: the ranks generated other tokens than the first one")
    found = summarize(phases, args.prompt_tokens + args.new_tokens)
    if ranks > len(cores):  # they take turns, which says nothing of any other machine
        found |= {"prefill": None, "decode": None}
    return {
        "way": way,
        "ranks": ranks,
        "threads": threads,
        "phases": phases,
        **found,
    }


def summarize(phases: list[list[dict[str, Any]]], tokens: int) -> dict[str, Any]:
    """What ranks found, from their phases: the slowest speed, otherwise the most of any rank."""
    named = [{phase["phase"]: phase for phase in rank} for rank in phases]
    rounds = [rank["generate"]["tokens_per_second"] for rank in named]
    speeds = [{kind: median(each[kind] for each in rank) for kind in rank[0]} for rank in rounds]
    return {
        **{kind: min(speed[kind] for speed in speeds) for kind in ("prefill", "decode")},
        "sent_per_token": max(rank["generate"]["sent_bytes"] for rank in named)
        / (tokens * len(rounds[0])),
        "expected_per_token": named[0]["result"]["expected_bytes"] / tokens,
        "swizzles": {
            "first": max(rank["first generate"]["swizzles"] for rank in named),
            "again": max(rank["generate"]["swizzles"] for rank in named),
        },
        "experts_bytes": max(rank["load"]["experts_bytes"] for rank in named),
        "mapped_bytes": max(phase["checkpoint_mapped"] for rank in phases for phase in rank),
        "peak_bytes": max(
            phase["memory"]["peak"] - imports["memory"]["resident"]
            for imports, *rest in phases
            for phase in rest
        ),
    }


def text(results: dict[str, Any]) -> str:
    """Everything that a reader should see."""
    facts, settings = results["machine"], results["settings"]
    head = (
        f"{facts['cpu']}, {settings['threads']} of {facts['cores']} cores; torch {facts['torch']}, "
        f"transformers {facts['transformers']}; bfloat16, a prompt of {settings['prompt_tokens']} "
        f"tokens, {settings['new_tokens']} decoded, graphs by {settings['inner']}. "
        f"Of ranks, the slowest or the largest."
    )
    return paragraphs(
        head, columns(results["runs"], COLUMNS), "\n".join(f"note: {n}" for n in results["notes"])
    )


if __name__ == "__main__":
    raise SystemExit(main())
