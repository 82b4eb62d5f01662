"""Samples -> the results that are written as JSON, printed and drawn."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from contenders import Contender
from moe import ERROR_BOUND, Sizes
from probes import Probes
from rounds import Cell, Skipped
from samples import summary


def collect(
    *,
    args: argparse.Namespace,
    sizes: Sizes,
    machine: dict[str, Any],
    path: dict[str, Any],
    contenders: Sequence[Contender],
    cells: Sequence[Cell],
    hits: Mapping[int, int],
    probes: Probes | None,
    rounds: int,
    skipped: Sequence[Skipped],
    **rest: Any,
) -> dict[str, Any]:
    """Plain data for ``json.dumps``; times are milliseconds, rates are a second."""
    floors = _floors(probes)
    return {
        "machine": machine,
        "settings": {
            **asdict(sizes),
            "tokens": list(args.tokens),
            "layers": args.layers,
            "rounds": args.rounds,
            "seconds": args.seconds,
            "compiler": args.compiler,
            "probe_mib": args.probe_mib,
            "error_bound": ERROR_BOUND,
        },
        "path": path,
        "rounds": rounds,
        "contenders": {
            contender.name: {
                "label": contender.label,
                "kind": contender.kind,
                "layers": contender.layers,
                "expert_bytes": contender.expert_bytes,
                "relative_error": {
                    str(cell.tokens): cell.error for cell in cells if cell.contender is contender
                },
            }
            for contender in contenders
        },
        "floors": floors,
        "layer": [_row(tokens, hits[tokens], sizes, cells, floors) for tokens in args.tokens],
        "skipped": [asdict(skip) for skip in skipped],
        **rest,
    }


def _floors(probes: Probes | None) -> dict[str, Any]:
    """Bytes and floating-point operations a second; empty without probes."""
    if probes is None:
        return {}
    return {
        "read": {
            **summary(probes.read_rates),
            "buffer_bytes": probes.bytes,
            "variants": [{"streams": s, "prefetch_bytes": a} for s, a in probes.variants],
        },
        "units": {unit: summary(rates) for unit, rates in probes.unit_rates.items()},
        "matrix_peak": summary(probes.matrix_rates()),
    }


def _row(
    tokens: int, hit: int, sizes: Sizes, cells: Sequence[Cell], floors: dict[str, Any]
) -> dict[str, Any]:
    """One number of tokens."""
    ms = {
        cell.contender.name: summary([1e3 * seconds for seconds in cell.samples])
        for cell in cells
        if cell.tokens == tokens and cell.samples
    }
    kinds = {cell.contender.name: cell.contender.kind for cell in cells}
    size = {"bytes": hit * sizes.mxfp4_bytes, "flops": sizes.flops(tokens)}
    floor: dict[str, Any] | None = None
    if floors:
        memory = 1e3 * size["bytes"] / floors["read"]["median"]
        matrix = 1e3 * size["flops"] / floors["matrix_peak"]["median"]
        by = "memory" if memory > matrix else "matrix"
        floor = {"ms": max(memory, matrix), "by": by, "memory_ms": memory, "matrix_ms": matrix}
    peers = [stats["median"] for name, stats in ms.items() if kinds[name] == "transformers"]
    mine = {name: stats["median"] for name, stats in ms.items() if kinds[name] != "transformers"}
    return {
        "tokens": tokens,
        "experts_hit": hit,
        **size,
        "floor": floor,
        "ms": ms,
        "best_bf16_ms": min(peers, default=None),
        "speedup_over_best_bf16": {
            name: min(peers) / median for name, median in mine.items() if peers
        },
        "fraction_of_floor": {
            name: floor["ms"] / median for name, median in mine.items() if floor is not None
        },
    }
