"""The choice of a matmul's tile, from a table for each target in ``tiles/*.json``.

An entry serves up to ``rows`` routed rows in all, and up to ``rows_per_expert`` times E. The choice
is the first entry that serves a problem; the last entry serves all. It depends on shapes alone,
never on values that the device computed. ``python -m benchmarks.gpu --tune`` writes the tables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from mxfp4_fx.core import hardware
from mxfp4_fx.core.layouts import CHECKPOINT_ORDER

FOLDER = Path(__file__).with_name("tiles")
# Layout -> the table for targets that read it and have no table of their own.
LAYOUTS = {"wgmma_fragments": "sm_90", "mma_fragments": "sm_80", CHECKPOINT_ORDER: "sm_100"}
# Compiler options of all kernels, set so that they do not depend on Triton's defaults.
OPTIONS = {"enable_fp_fusion": True}
# Layout -> the most rows of a tile times terms of an activation; with more, registers spill.
_MOST_TERMS = {"wgmma_fragments": 128, "mma_fragments": 64, CHECKPOINT_ORDER: 256}


@dataclasses.dataclass(frozen=True)
class Tile:
    """The tile of a matmul, and the problems that a table's entry serves with it.

    Attributes:
        regime: "decode", "streaming" or "prefill": the use that the entry is meant for.
        rows, rows_per_expert: the largest problem that the entry serves; 0 stands for no bound.
        block_m, block_n, block_k: the rows of activations, rows of a weight, and columns of both
            that a program computes at a time.
        splits: the number of parts of K, each with its own program; 1 unless a later launch sums
            the rows anyway.
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
    """Make :func:`choose` return ``tile``, fitted to the problem, in all threads; for tuning."""
    _forced.append(tile)
    try:
        yield
    finally:
        _forced.pop()


@functools.cache
def table(target: str) -> tuple[Tile, ...]:
    """Return the entries of a target's table in order; a target is a name such as ``"sm_90"``."""
    document = json.loads((FOLDER / f"{target}.json").read_text(encoding="utf-8"))
    return tuple(Tile(**entry) for entry in document["tiles"])


@functools.cache
def table_name(target: str, layout: str, prefix: str = "") -> str:
    """Return the name of a target's table, or of the table of another one that it uses.

    Args:
        target, layout: as in :func:`choose`.
        prefix: what names of such tables begin with: ``"mxfp8_"``, or nothing for experts'.
    """
    if (FOLDER / f"{prefix}{target}.json").exists():
        return prefix + target
    return prefix + ("gfx942" if target.startswith("gfx") else LAYOUTS[layout])


def choose(
    target: str, layout: str, rows: int, experts: int, k: int, terms: int = 1, splits: bool = False
) -> Tile:
    """Choose the tile for ``rows`` routed rows and ``experts`` experts.

    Args:
        target: what ``hardware.gpu_name`` returns.
        layout: a key of :data:`LAYOUTS`.
        rows: R.
        experts: E.
        k: K.
        terms: the number of terms of an activation (``hardware.gpu_terms``).
        splits: whether K may be split.
    """
    if _forced:
        return fit(_forced[-1], layout, k, terms, splits)
    tile = serving(table(table_name(target, layout)), rows, experts)
    return fit(tile, layout, k, terms, splits)


def serving(entries: Sequence[Tile], rows: int, experts: int) -> Tile:
    """Return the first of a table's entries that serves a problem."""
    return next(
        tile
        for tile in entries
        if (not tile.rows or rows <= tile.rows)
        and (not tile.rows_per_expert or rows <= tile.rows_per_expert * experts)
    )


@functools.cache
def fit(tile: Tile, layout: str, k: int, terms: int = 1, splits: bool = False) -> Tile:
    """Fit a tile to K: its steps divide K's fragments, and its splits divide the steps.

    With several terms the tile gets fewer rows, because all terms are in registers at once.
    """
    block_m, block_k = _height(tile, layout, terms), tile.block_k
    if layout != CHECKPOINT_ORDER:
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


def choose_mxfp8(target: str, rows: int, terms: int = 1) -> Tile:
    """Choose the tile for ``rows`` rows of a linear in MXFP8, whose tables are ``mxfp8_*.json``.

    ``block_k`` is a power of 2 and need not divide K; ``splits`` is the most parts of K.

    Args:
        target, terms: as in :func:`choose`.
        rows: R.
    """
    described = hardware.gpu_layout(target)
    layout = CHECKPOINT_ORDER if described is None else described.name
    tile = serving(table(table_name(target, layout, "mxfp8_")), rows, 1)
    return dataclasses.replace(tile, block_m=_height(tile, layout, terms))


def _height(tile: Tile, layout: str, terms: int) -> int:
    """Return how many rows a tile has, of activations that are sums of terms."""
    block_m = tile.block_m
    if terms > 1:
        while block_m > 16 and block_m * terms > _MOST_TERMS[layout]:
            block_m //= 2
    return block_m


def compiler_options(tile: Tile, target: str, terms: int) -> dict[str, int]:
    """Return Triton's options for a kernel with that tile."""
    options = {**OPTIONS, "num_warps": tile.warps, "num_stages": tile.stages}
    if target.startswith("sm_"):
        # By default ptxas may spill some registers so that one more program fits a multiprocessor.
        # With few rows of mma_fragments none fits, because shared memory is full.
        layout = hardware.gpu_layout(target)
        if terms > 1 or (layout is not None and layout.name == "mma_fragments"):
            options["maxnreg"] = 255
    return options
