"""Results of ``benchmarks.gpu``: what follows from the times, and a table for a terminal."""

from __future__ import annotations

from typing import Any

from benchmarks.moe import floor
from benchmarks.report import Column, absent, column, columns, paragraphs, quartiles


def with_ratios(results: dict[str, Any]) -> dict[str, Any]:
    """The results with floors and ratios in each row, as far as there are times to take them of."""
    kinds = {name: contender["kind"] for name, contender in results["contenders"].items()}
    return {
        **results,
        "rows": [{**row, **ratios(row, results["floors"], kinds)} for row in results["rows"]],
    }


def ratios(row: dict[str, Any], floors: dict[str, Any], kinds: dict[str, str]) -> dict[str, Any]:
    """Of one number of experts and of tokens; ``kinds`` of the contenders tell who is who."""
    medians = {name: stats["median"] for name, stats in row["ms"].items()}
    ours, again = medians.get("ours"), medians.get("ours_again")
    found: dict[str, Any] = {"floor": None, "times_floor": None, "noise": None}
    if floors:
        rates = (floors[name]["median"] for name in ("copy", "matmul"))
        found["floor"] = floor(row, *rates)
    if ours and floors:
        found["times_floor"] = ours / found["floor"]["ms"]
    if ours and again:
        found["noise"] = abs(again / ours - 1)
    found["speedup_over_best"] = {}
    for kind in ("mxfp4", "bf16"):
        times = [ms for name, ms in medians.items() if kinds[name] == kind]
        if ours and times:
            found["speedup_over_best"][kind] = min(times) / ours
    return found


def text(results: dict[str, Any]) -> str:
    """What a reader should see; the table comes last."""
    return paragraphs(_head(results), absent(results), _table(results))


def _head(results: dict[str, Any]) -> str:
    machine, settings, floors = results["machine"], results["settings"], results["floors"]
    lines = [
        f"{machine['device']}; torch {machine['torch']}, triton {machine['triton']}, "
        f"transformers {machine['transformers']}",
        f"one MoE MLP with its router: hidden {settings['hidden']}, intermediate "
        f"{settings['intermediate']}, top-{settings['top_k']}, bfloat16; {settings['layout']}",
    ]
    if floors:
        copy = quartiles(floors["copy"], 1e9, "{:.0f}")
        matmul = quartiles(floors["matmul"], 1e12, "{:.1f}")
        lines.append(
            f"floors: a copy {copy} GB/s read and written, a bfloat16 matmul {matmul} TFLOP/s"
        )
    if not results["complete"]:
        lines.append(f"incomplete: {results['stopped']}")
    return "\n".join(lines)


def _table(results: dict[str, Any]) -> str:
    def microseconds(path: str) -> Column:
        return column(f"{path}/median", "{:.1f}", 1e-3)

    shown = {
        "E": column("experts"),
        "T": column("tokens"),
        "hit": column("experts_hit"),
        "floor": column("floor/ms", "{:.1f}", 1e-3),
        "by": column("floor/by"),
        **{n: microseconds(f"ms/{n}") for n in results["contenders"] if n != "ours_again"},
        "x floor": column("times_floor", "{:.2f}"),
        "noise": column("noise", "{:.1%}"),
        "uncaptured": microseconds("uncaptured_ms/ours"),
        "launches": column("launches/ours"),
        "x mxfp4": column("speedup_over_best/mxfp4", "{:.2f}"),
        "x bf16": column("speedup_over_best/bf16", "{:.2f}"),
    }
    return (
        "microseconds of one MLP, medians, launches in a CUDA graph. x floor: ours over the floor; "
        "noise: ours timed twice;\nuncaptured, launches: of ours; x mxfp4, x bf16: the best of the "
        f"others over ours\n{columns(results['rows'], shown)}"
    )
