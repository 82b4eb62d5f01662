"""Which tile a matmul runs with: a table for each target, in ``tiles/*.json``.

An entry serves up to ``rows`` routed rows in all and ``rows_per_expert`` of them for each expert;
the first that serves a problem is taken, the last serves all. ``python -m benchmarks.gpu --tune``
writes the tables. They are chosen from T and E alone, never from what the device computed.
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
# What all kernels are compiled with, whatever Triton's defaults become.
OPTIONS = {"enable_fp_fusion": True}
# Layout -> rows of a tile times terms of an activation, beyond which registers spill.
_MOST_TERMS = {"wgmma_fragments": 128, "mma_fragments": 64, "row_major": 256}


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


@functools.cache
def table_name(target: str, layout: str) -> str:
    """The target itself if it has a table, otherwise the most like it that reads the layout."""
    if (FOLDER / f"{target}.json").exists():
        return target
    return "gfx942" if target.startswith("gfx") else LAYOUTS[layout]


def choose(
    target: str, layout: str, rows: int, experts: int, k: int, terms: int = 1, splits: bool = False
) -> Tile:
    """The tile for ``rows`` routed rows and ``experts`` experts of contraction length ``k``.

    Args:
        target: as ``hardware.gpu_name`` says.
        layout: a key of :data:`LAYOUTS`.
        terms: bfloat16 numbers that make up an activation.
        splits: whether K may be split.
    """
    if _forced:
        return fit(_forced[-1], layout, k, terms, splits)
    tile = serving(table(table_name(target, layout)), rows, experts)
    return fit(tile, layout, k, terms, splits)


def serving(entries: Sequence[Tile], rows: int, experts: int) -> Tile:
    """The first of a table's entries that serves a problem."""
    return next(
        tile
        for tile in entries
        if (not tile.rows or rows <= tile.rows)
        and (not tile.rows_per_expert or rows <= tile.rows_per_expert * experts)
    )


@functools.cache
def fit(tile: Tile, layout: str, k: int, terms: int = 1, splits: bool = False) -> Tile:
    """The tile with steps that divide K's fragments, and splits that divide the steps.

    With several terms it has fewer rows: all terms are in registers at once.
    """
    block_m, block_k = tile.block_m, tile.block_k
    if terms > 1:
        while block_m > 16 and block_m * terms > _MOST_TERMS[layout]:
            block_m //= 2
    if layout != "row_major":
        k_tiles = -(-k // 64)
        unrolled = next(u for u in range(block_k // 64, 0, -1) if k_tiles % u == 0)
        block_k = 64 * unrolled
    steps = -(-k // block_k)
    most = tile.splits if splits else 1
    return dataclasses.replace(
        tile,
        block_m=block_m,
        block_k=block_k,
        splits=next(s for s in range(most, 0, -1) if steps % s == 0),
    )


def compiler_options(tile: Tile, target: str, terms: int) -> dict[str, int]:
    """Triton's options for a kernel with that tile."""
    options = {**OPTIONS, "num_warps": tile.warps, "num_stages": tile.stages}
    if terms > 1 and target.startswith("sm_"):
        # Left to itself, ptxas may spill a few of them for the sake of one more program at a time.
        options["maxnreg"] = 255
    return options
