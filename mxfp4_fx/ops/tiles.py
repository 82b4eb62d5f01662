"""Which tile a matmul runs with: a table for each target, in ``tiles/*.json``.

An entry serves up to ``rows`` routed rows in all and ``rows_per_expert`` of them for each expert;
the first that serves a problem is taken, the last serves all. ``benchmarks/gpu.py --tune`` writes
the tables. They are chosen from T and E alone, never from what the device computed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

FOLDER = Path(__file__).with_name("tiles")
# Layout -> the table of a target that reads it and has none of its own.
LAYOUTS = {"wgmma_fragments": "sm_90", "mma_fragments": "sm_80", "row_major": "sm_100"}


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a matmul is cut up.

    Attributes:
        regime: "decode", "streaming" or "prefill": what the entry is meant for.
        rows, rows_per_expert: the largest problem that it serves; 0 stands for no bound.
        block_m, block_n, block_k: rows of activations, rows of a weight, and columns of both that a
            program takes at a time.
        splits: parts of K with a program each; 1 unless the rows are summed afterwards anyway.
        warps, stages: Triton's num_warps and num_stages.
    """

    regime: str
    rows: int
    rows_per_expert: int
    block_m: int
    block_n: int
    block_k: int
    splits: int
    warps: int
    stages: int


_forced: list[Tile] = []


@contextlib.contextmanager
def forced(tile: Tile) -> Iterator[None]:
    """Within, :func:`choose` gives ``tile``, fitted to the problem, in every thread. For tuning."""
    _forced.append(tile)
    try:
        yield
    finally:
        _forced.pop()


@functools.cache
def table(target: str) -> tuple[Tile, ...]:
    """The entries of a target, such as ``"sm_90"``, in order."""
    document = json.loads((FOLDER / f"{target}.json").read_text(encoding="utf-8"))
    return tuple(Tile(**entry) for entry in document["tiles"])


def table_name(target: str, layout: str) -> str:
    """The target itself if it has a table, otherwise one that reads the same layout."""
    return target if (FOLDER / f"{target}.json").exists() else LAYOUTS[layout]


def choose(target: str, layout: str, rows: int, experts: int, k: int, splits: bool) -> Tile:
    """The tile for ``rows`` routed rows and ``experts`` experts of contraction length ``k``.

    Args:
        target: as ``target.gpu_name`` says.
        layout: a key of :data:`LAYOUTS`.
        splits: whether K may be split.
    """
    if _forced:
        return fit(_forced[-1], layout, k, splits)
    return fit(serving(table(table_name(target, layout)), rows, experts), layout, k, splits)


def serving(entries: Sequence[Tile], rows: int, experts: int) -> Tile:
    """The first of a table's entries that serves a problem."""
    return next(
        tile
        for tile in entries
        if (not tile.rows or rows <= tile.rows)
        and (not tile.rows_per_expert or rows <= tile.rows_per_expert * experts)
    )


def fit(tile: Tile, layout: str, k: int, splits: bool) -> Tile:
    """The tile with steps that divide K's fragments, and splits that divide the steps."""
    block_k = tile.block_k
    if layout != "row_major":
        k_tiles = -(-k // 64)
        unrolled = next(u for u in range(block_k // 64, 0, -1) if k_tiles % u == 0)
        block_k = 64 * unrolled
    steps = -(-k // block_k)
    most = tile.splits if splits else 1
    return dataclasses.replace(
        tile, block_k=block_k, splits=next(s for s in range(most, 0, -1) if steps % s == 0)
    )
