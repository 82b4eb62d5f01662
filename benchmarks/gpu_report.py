"""What a run on a GPU finds out: written after each time that is measured, printed at the end."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.moe import floor
from benchmarks.report import absent, median, number, paragraphs, quartiles, table


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

    def note(self, text: str) -> None:
        """Once, however often it is said."""
        if text not in self.notes:
            self.notes.append(text)

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
    return paragraphs([_head(results), absent(results), _table(results)])


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
    shown = [name for name in results["contenders"] if name != "ours_again"]
    rows = []
    for row in results["rows"]:
        uncaptured = row["uncaptured_ms"].get("ours")
        rows.append(
            [
                *(str(row[key]) for key in ("experts", "tokens", "experts_hit")),
                f"{1e3 * row['floor']['ms']:.1f} {row['floor']['by']}" if row["floor"] else "-",
                *(
                    _microseconds(median(row, name)) + "*" * (not row["captured"].get(name, True))
                    for name in shown
                ),
                number(row["times_floor"], "{:.2f}"),
                number(row["noise"], "{:.1%}"),
                _microseconds(uncaptured and uncaptured["median"]),
                number(row["launches"].get("ours"), "{}"),
                *(number(row["speedup_over_best"].get(who), "{:.2f}") for who in ("mxfp4", "bf16")),
            ]
        )
    head = ["E", "T", "hit", "floor", *shown, "x floor", "noise", "uncaptured", "launches"]
    note = (
        "microseconds of one MLP, medians, launches in a CUDA graph (*: one by one). x floor: ours "
        "over the floor; noise: ours timed twice;\nuncaptured, launches: of ours; x mxfp4, x bf16: "
        "the best of the others over ours"
    )
    return f"{note}\n{table([*head, 'x mxfp4', 'x bf16'], rows)}"


def _microseconds(ms: float | None) -> str:
    return number(None if ms is None else 1e3 * ms, "{:.1f}")
