"""What a run on a GPU finds out: written after each time that is measured, printed at the end."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.moe import floor
from benchmarks.report import Column, absent, column, columns, paragraphs, quartiles


@dataclass
class Row:
    """One number of experts and of tokens. Times are milliseconds of one MLP.

    Attributes:
        ms: contender -> samples, of replayed CUDA graphs unless ``captured`` says otherwise.
        uncaptured_ms: launched one by one.
        parts_ms: of ours, each part in a graph of its own.
    """

    experts: int
    tokens: int
    experts_hit: int
    work: dict[str, float]
    tiles: dict[str, Any]
    ms: dict[str, Any] = field(default_factory=dict)
    uncaptured_ms: dict[str, Any] = field(default_factory=dict)
    parts_ms: dict[str, Any] = field(default_factory=dict)
    relative_error: dict[str, float] = field(default_factory=dict)
    captured: dict[str, bool] = field(default_factory=dict)
    launches: dict[str, int | None] = field(default_factory=dict)

    def data(self, floors: dict[str, Any], kinds: dict[str, str]) -> dict[str, Any]:
        """With what follows from the times: ``kinds`` of the contenders tell who is who."""
        row = asdict(self)
        row |= row.pop("work")
        medians = {name: stats["median"] for name, stats in self.ms.items()}
        ours, again = medians.get("ours"), medians.get("ours_again")
        row["floor"] = row["times_floor"] = row["noise"] = None
        row["speedup_over_best"] = {}
        if floors:
            rates = (floors[name]["median"] for name in ("copy", "matmul"))
            row["floor"] = floor(self.work, *rates)
        if ours and floors:
            row["times_floor"] = ours / row["floor"]["ms"]
        if ours and again:
            row["noise"] = abs(again / ours - 1)
        for kind in ("mxfp4", "bf16"):
            times = [ms for name, ms in medians.items() if kinds[name] == kind]
            if ours and times:
                row["speedup_over_best"][kind] = min(times) / ours
        return row


@dataclass
class Results:
    """All that a run finds out. ``head``: what is known before it begins."""

    head: dict[str, Any]
    path: Path | None
    floors: dict[str, Any] = field(default_factory=dict)
    contenders: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[tuple[int, int], Row] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    complete: bool = False
    stopped: str | None = "interrupted"

    def skip(self, contender: str, experts: int, tokens: int, reason: str) -> None:
        where = {"contender": contender, "experts": experts, "tokens": tokens}
        self.skipped.append({**where, "reason": reason})

    def data(self) -> dict[str, Any]:
        kinds = {name: contender["kind"] for name, contender in self.contenders.items()}
        names = ("floors", "contenders", "unavailable", "skipped", "notes")
        return {
            "complete": self.complete,
            "stopped": self.stopped,
            **self.head,
            **{name: getattr(self, name) for name in names},
            "rows": [row.data(self.floors, kinds) for row in self.rows.values()],
        }

    def write(self) -> None:
        """As they are now; a run that is cut off leaves what it had, marked as incomplete."""
        command.write(self.path, self.data())


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
