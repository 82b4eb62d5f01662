"""Finds the tiles of a target's table: for each entry, the fastest of those that are right.

A search that climbs: from the entry's own tile and a few others of different shape, to the best
neighbour, until none is better or the entry's time is up. A candidate counts by the two matmuls of
an MLP, at up to three sizes that the entry serves, in a CUDA graph, with weights that rotate.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import command, device_ops
from benchmarks.command import Log
from benchmarks.contenders import Ours, poisoned
from benchmarks.gpu_compile import Compiler, Job
from benchmarks.gpu_device import Device
from benchmarks.moe import Problem
from mxfp4_fx.ops import tiles
from mxfp4_fx.ops.tiles import Tile

PROBLEMS = 3  # sizes of an entry that a candidate is timed at
LEAST_CANDIDATES = 2  # that are tried for an entry, whatever the time
GAIN = 0.01  # less is noise
HOPELESS = 1.25  # times the best: the other sizes are then not timed
ROUNDS = 3  # in turn, of the best and the entry, in the end
SAMPLE_SECONDS = 0.02  # for the time of a candidate
BATCH_SECONDS = 90.0  # for compiling a round of candidates

BLOCK_M = (16, 32, 64, 128, 256)
BLOCK_N = (32, 64, 128, 256)
WARPS = (4, 8)
STAGES = (2, 3, 4, 5)
SPLITS = (1, 3, 5, 9)
UNROLLED = (1, 3, 5, 9)  # tiles of 64 along K in a step; 2880 has 45
ROW_MAJOR_K = (64, 128, 256)
MOST_ACCUMULATORS = 128  # registers of a thread for sums

# Shapes to begin with besides an entry's own: N, tiles of 64 along K, warps, stages, splits.
SEEDS = (
    *((64, 5, 4, 3, 3), (64, 3, 4, 4, 5), (128, 3, 4, 3, 1), (128, 3, 4, 3, 5)),
    *((128, 1, 4, 4, 1), (256, 3, 8, 2, 1), (256, 1, 8, 4, 1), (128, 3, 8, 3, 1)),
)

Size = tuple[int, int]  # experts, tokens
Times = dict[Size, float]  # seconds of one MLP's matmuls


class Rejected(Exception):
    """A candidate that cannot be used; the message is what it is counted as."""


class Tuner:
    """Tries candidates for one entry. ``tried``: candidates -> their times, if they are right."""

    def __init__(
        self, entry: Tile, sizes: Sequence[Size], ours: Mapping[int, Ours], device: Device
    ) -> None:
        self.entry, self.sizes, self.ours, self.device = entry, sizes, ours, device
        self.tried: dict[Tile, Times | None] = {}
        self.rejected: Counter[str] = Counter()
        self._inputs: dict[Size, tuple[Tensor, Any]] = {}
        for experts, tokens in sizes:
            inputs = ours[experts].problem.inputs(tokens)
            routes = ours[experts].routing(ours[experts].logits(0, inputs))
            self._inputs[experts, tokens] = inputs.hidden, routes

    def run(self, layer: int, size: Size) -> Tensor:
        """Both matmuls of a layer."""
        ours, (hidden, routes) = self.ours[size[0]], self._inputs[size]
        return ours.down(layer, ours.gate_up(layer, hidden, routes), routes)

    def attempt(self, tile: Tile, best: Times | None) -> Times | None:
        """Check and time a candidate; None if it cannot be used, which is counted."""
        if tile in self.tried:
            return self.tried[tile]
        self.tried[tile] = None
        try:
            self.tried[tile] = self.times(tile, best)
        except Rejected as error:
            self.rejected[str(error)] += 1
        except Exception as error:  # the compiler's, or of memory that there is not enough of
            self.device.synchronize()  # raises if the device itself failed: then all is over
            self.rejected[type(error).__name__] += 1
        self.device.release()
        return self.tried[tile]

    def times(self, tile: Tile, best: Times | None = None) -> Times:
        """Raises Rejected if it is wrong, spills registers, or is much slower than the best."""
        found: Times = {}
        with tiles.forced(tile):
            for size in self.sizes:
                ours, before = self.ours[size[0]], _loaded()
                with poisoned(True):
                    out = self.run(0, size)
                self.device.synchronize()
                if not ours.problem.error(out) <= ours.problem.error_bound:
                    raise Rejected("wrong")
                if any(kernel.n_spills for key, kernel in _loaded().items() if key not in before):
                    raise Rejected("spills")
                samples, _ = self.device.in_graph(partial(self._run_all, size), SAMPLE_SECONDS)
                found[size] = statistics.median(samples) / ours.layers
                if best is not None and found[size] > HOPELESS * best[size]:
                    raise Rejected("slow")
        return found

    def _run_all(self, size: Size) -> Tensor:
        return [self.run(layer, size) for layer in range(self.ours[size[0]].layers)][-1]

    def score(self, times: Times | None) -> float:
        """The geometric mean over the sizes of a time; infinite for what cannot be used."""
        if times is None:
            return math.inf
        return math.exp(sum(math.log(seconds) for seconds in times.values()) / len(times))


def tune(
    args: argparse.Namespace,
    device: Device,
    compiler: Compiler,
    problems: Mapping[int, Problem],
    ours_of: Callable[[int], Ours],
    log: Log,
) -> str:
    """Tune each entry, write the table after each; returns what to print."""
    name = device_ops.gpu_name(device.torch)
    ours = {experts: ours_of(experts) for experts in problems}
    layout = next(iter(ours.values())).layout
    path = (args.table_folder or tiles.FOLDER) / f"{name}.json"
    entries = list(device_ops.gpu_tiles(device.torch, layout))
    measured: dict[str, Any] = {"machine": device.facts(), "seed": args.seed, "entries": []}
    deadline = device.clock() + args.tune_seconds
    lines = []
    for number, entry in enumerate(entries):
        now = device.clock()
        until = now + max(0.0, deadline - now) / (len(entries) - number)
        sizes = served(entries, entry, [(e, t) for e in args.experts for t in args.tokens], args)
        if not sizes:
            measured["entries"].append({"regime": entry.regime, "note": "no size here"})
            continue
        tuner = Tuner(entry, sizes, ours, device)
        log(f"tuning {entry.regime}, entry {number}: {sizes}")
        best = climb(tuner, compiler, layout, until, log)
        entries[number], facts = confirmed(tuner, best)
        measured["entries"].append({"regime": entry.regime, **facts})
        lines.append(_line(entry, entries[number], facts))
        log(lines[-1])
        # As ops/tiles.py reads it; what it was measured with stands beside it.
        made = [dataclasses.asdict(tile) for tile in entries]
        command.write(path, {"target": name, "tiles": made, "measured": measured})
    return "\n".join([*lines, f"written: {path.name}"])


def served(
    entries: Sequence[Tile], entry: Tile, sizes: Sequence[Size], args: argparse.Namespace
) -> list[Size]:
    """Up to three of the sizes that an entry serves, evenly chosen, in the order of their rows."""
    mine = [(e, t) for e, t in sizes if tiles.serving(entries, t * args.top_k, e) is entry]
    mine.sort(key=lambda size: (size[1] / size[0], size[1]))
    if len(mine) <= PROBLEMS:
        return mine
    return [mine[round(i * (len(mine) - 1) / (PROBLEMS - 1))] for i in range(PROBLEMS)]


def climb(
    tuner: Tuner,
    compiler: Compiler,
    layout: str,
    until: float,
    log: Log,
) -> Tile:
    """The best tile that is found from the entry on."""
    of_models = [tuner.ours[e].problem.sizes for e in sorted({e for e, _ in tuner.sizes})]
    ks = (of_models[0].hidden, of_models[0].intermediate)
    best, found = tuner.entry, tuner.attempt(tuner.entry, None)
    wanted = [tuner.entry, *seeds(tuner.entry, layout, ks)]
    while wanted:
        jobs = [Job(tile, sizes, layout) for tile in wanted for sizes in of_models]
        compiler.compile(jobs, min(BATCH_SECONDS, max(0.0, until - tuner.device.clock())))
        start = best
        for tile in wanted:
            if tuner.device.clock() > until and len(tuner.tried) > LEAST_CANDIDATES:
                return best
            times = tuner.attempt(tile, found)
            if tuner.score(times) < (1 - GAIN) * tuner.score(found):
                best, found = tile, times
                log(f"  {1e6 * tuner.score(found):.1f} us: {describe(best)}")
        if best == start and len(tuner.tried) > 1 + len(SEEDS):
            return best
        wanted = [tile for tile in neighbours(best, layout, ks) if tile not in tuner.tried]
    return best


def confirmed(tuner: Tuner, best: Tile) -> tuple[Tile, dict[str, Any]]:
    """The better of the best and the entry, timed in turn, and what there is to say of both."""
    counts = {"candidates": len(tuner.tried), "rejected": dict(tuner.rejected)}
    if tuner.tried[tuner.entry] is None:  # what there was is no good here
        return best, {"microseconds": [], **counts}
    rounds: dict[Tile, list[Times]] = {tuner.entry: [], best: []}
    for _ in range(ROUNDS):
        for tile, found in rounds.items():
            found.append(tuner.times(tile))
    middle = {
        tile: {size: sorted(times[size] for times in found)[ROUNDS // 2] for size in tuner.sizes}
        for tile, found in rounds.items()
    }
    is_better = tuner.score(middle[best]) < (1 - GAIN) * tuner.score(middle[tuner.entry])
    chosen = best if is_better else tuner.entry
    return chosen, {
        "microseconds": [
            {
                "experts": size[0],
                "tokens": size[1],
                "before": 1e6 * middle[tuner.entry][size],
                "after": 1e6 * middle[chosen][size],
            }
            for size in tuner.sizes
        ],
        **counts,
    }


def seeds(entry: Tile, layout: str, ks: Sequence[int]) -> list[Tile]:
    made = []
    for n, unrolled, warps, stages, splits in SEEDS:
        block_k = 64 * unrolled if layout != "row_major" else entry.block_k
        tile = dataclasses.replace(
            entry, block_n=n, block_k=block_k, warps=warps, stages=stages, splits=splits
        )
        made.append(tile)
    return distinct([tile for tile in made if is_sensible(tile)], layout, ks)


def neighbours(tile: Tile, layout: str, ks: Sequence[int]) -> list[Tile]:
    """Tiles that differ by a step in one number, or in N and warps together."""
    steps = ROW_MAJOR_K if layout == "row_major" else tuple(64 * u for u in UNROLLED)
    made: list[Tile] = []
    for field, values in (
        *(("block_m", BLOCK_M), ("block_n", BLOCK_N), ("block_k", steps)),
        *(("warps", WARPS), ("stages", STAGES), ("splits", SPLITS)),
    ):
        for value in beside(values, getattr(tile, field)):
            changed: dict[str, Any] = {field: value}
            made.append(dataclasses.replace(tile, **changed))
    for n, warps in itertools.product(beside(BLOCK_N, tile.block_n), beside(WARPS, tile.warps)):
        made.append(dataclasses.replace(tile, block_n=n, warps=warps))
    return distinct([each for each in made if is_sensible(each)], layout, ks)


def beside(values: Sequence[int], value: int) -> Iterator[int]:
    """The next smaller and the next larger of ascending values."""
    yield from [v for v in values if v < value][-1:]
    yield from [v for v in values if v > value][:1]


def is_sensible(tile: Tile) -> bool:
    """Every warp has rows of its own, and its sums have room in registers."""
    accumulators = tile.block_m * tile.block_n // (32 * tile.warps)
    return tile.block_n >= 16 * tile.warps and accumulators <= MOST_ACCUMULATORS


def distinct(made: Sequence[Tile], layout: str, ks: Sequence[int]) -> list[Tile]:
    """Without those that are the same once they are fitted to both matmuls."""
    found: dict[tuple[Tile, Tile], Tile] = {}
    for tile in made:
        key = tiles.fit(tile, layout, ks[0]), tiles.fit(tile, layout, ks[1], splits=True)
        found.setdefault(key, tile)
    return list(found.values())


def describe(tile: Tile) -> str:
    return (
        f"{tile.block_m} x {tile.block_n} x {tile.block_k}, {tile.warps} warps, "
        f"{tile.stages} stages, {tile.splits} splits"
    )


def _line(before: Tile, after: Tile, facts: dict[str, Any]) -> str:
    times = ", ".join(
        f"E={row['experts']} T={row['tokens']}: {row['before']:.1f} -> {row['after']:.1f}"
        for row in facts["microseconds"]
    )
    count = f"{facts['candidates']} tried, rejected: {facts['rejected']}"
    return f"{before.regime}: {describe(after)}; microseconds {times}; {count}"


def _loaded() -> dict[Any, Any]:
    """The matmul's machine code in this process; nothing in the interpreter."""
    from mxfp4_fx.ops.triton_kernels.matmul import matmul_ogs_kernel

    caches = getattr(matmul_ogs_kernel, "device_caches", None)
    return dict(caches[torch.cuda.current_device()][0]) if caches else {}
