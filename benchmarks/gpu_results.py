"""What a run on a GPU finds out: written after each time that is measured, printed at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_floor import floor
from report import table
from samples import summary


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
        medians = {name: stats["median"] for name, stats in self.ms.items()}
        ours = medians.get("ours")
        least = floor(self.work, floors)
        best = {
            kind: min((m for name, m in medians.items() if kinds[name] == kind), default=None)
            for kind in ("mxfp4", "bf16")
        }
        again = medians.get("ours_again")
        return {
            "experts": self.experts,
            "tokens": self.tokens,
            "experts_hit": self.experts_hit,
            **self.work,
            "floor": least,
            "tiles": self.tiles,
            "ms": self.ms,
            "uncaptured_ms": self.uncaptured_ms,
            "parts_ms": self.parts_ms,
            "relative_error": self.relative_error,
            "captured": self.captured,
            "launches": self.launches,
            "times_floor": ours / least["ms"] if ours and least else None,
            "noise": abs(again / ours - 1) if ours and again else None,
            "speedup_over_best": {
                kind: ms / ours for kind, ms in best.items() if ms is not None and ours
            },
        }


class Results:
    """All that a run finds out. ``head``: what is known before it begins."""

    def __init__(self, head: dict[str, Any], path: Path | None) -> None:
        self.head, self.path = head, path
        self.floors: dict[str, Any] = {}
        self.contenders: dict[str, dict[str, Any]] = {}
        self.rows: dict[tuple[int, int], Row] = {}
        self.unavailable: dict[str, str] = {}
        self.skipped: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.complete = False
        self.stopped: str | None = "interrupted"

    def skip(self, contender: str, experts: int, tokens: int, reason: str) -> None:
        self.skipped.append(
            {"contender": contender, "experts": experts, "tokens": tokens, "reason": reason}
        )

    def data(self) -> dict[str, Any]:
        kinds = {name: contender["kind"] for name, contender in self.contenders.items()}
        return {
            "complete": self.complete,
            "stopped": self.stopped,
            **self.head,
            "floors": self.floors,
            "contenders": self.contenders,
            "rows": [row.data(self.floors, kinds) for row in self.rows.values()],
            "unavailable": self.unavailable,
            "skipped": self.skipped,
            "notes": self.notes,
        }

    def write(self) -> None:
        """As they are now; a run that is cut off leaves what it had, marked as incomplete."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        room = self.path.with_name(self.path.name + ".part")
        room.write_text(json.dumps(self.data(), indent=1) + "\n", encoding="utf-8")
        os.replace(room, self.path)


def milliseconds(samples: Sequence[float]) -> dict[str, Any]:
    return summary([1e3 * seconds for seconds in samples])


def text(results: dict[str, Any]) -> str:
    """What a reader should see; the table comes last."""
    parts = [_head(results), _absent(results), _table(results)]
    return "\n\n".join(part for part in parts if part)


def _head(results: dict[str, Any]) -> str:
    machine, settings, floors = results["machine"], results["settings"], results["floors"]
    lines = [
        f"{machine['device']}; torch {machine['torch']}, triton {machine['triton']}, "
        f"transformers {machine['transformers']}",
        f"one MoE MLP with its router: hidden {settings['hidden']}, intermediate "
        f"{settings['intermediate']}, top-{settings['top_k']}, bfloat16; {settings['layout']}",
    ]
    if floors:
        copy, matmul = floors["copy"], floors["matmul"]
        lines.append(
            f"floors: a copy {copy['median'] / 1e9:.0f} GB/s read and written (quartiles "
            f"{copy['q1'] / 1e9:.0f} to {copy['q3'] / 1e9:.0f}), a bfloat16 matmul "
            f"{matmul['median'] / 1e12:.1f} TFLOP/s ({matmul['q1'] / 1e12:.1f} to "
            f"{matmul['q3'] / 1e12:.1f})"
        )
    if not results["complete"]:
        lines.append(f"incomplete: {results['stopped']}")
    return "\n".join(lines)


def _absent(results: dict[str, Any]) -> str:
    lines = [f"not available: {name}: {why}" for name, why in results["unavailable"].items()]
    skips: dict[tuple[str, int, str], list[int]] = {}
    for skip in results["skipped"]:
        key = skip["contender"], skip["experts"], skip["reason"]
        skips.setdefault(key, []).append(skip["tokens"])
    for (name, experts, reason), tokens in skips.items():
        counts = ", ".join(map(str, tokens))
        lines.append(f"not measured: {name}, {experts} experts, T = {counts}: {reason}")
    return "\n".join(lines + [f"note: {note}" for note in results["notes"]])


def _table(results: dict[str, Any]) -> str:
    names = [name for name in results["contenders"] if name != "ours_again"]
    head = ["E", "T", "hit", "floor", *names, "x floor", "noise", "uncaptured", "launches"]
    head += ["x mxfp4", "x bf16"]
    rows = []
    for row in results["rows"]:
        ms, faster = row["ms"], row["speedup_over_best"]
        uncaptured = row["uncaptured_ms"].get("ours")
        rows.append(
            [
                str(row["experts"]),
                str(row["tokens"]),
                str(row["experts_hit"]),
                f"{1e3 * row['floor']['ms']:.1f} {row['floor']['by']}" if row["floor"] else "-",
                *(
                    _number(1e3 * ms[name]["median"] if name in ms else None, "{:.1f}")
                    + ("" if row["captured"].get(name, True) else "*")
                    for name in names
                ),
                _number(row["times_floor"], "{:.2f}"),
                _number(row["noise"], "{:.1%}"),
                _number(1e3 * uncaptured["median"] if uncaptured else None, "{:.1f}"),
                _number(row["launches"].get("ours"), "{}"),
                _number(faster.get("mxfp4"), "{:.2f}"),
                _number(faster.get("bf16"), "{:.2f}"),
            ]
        )
    note = (
        "microseconds of one MLP, medians, launches in a CUDA graph (*: one by one). x floor: ours "
        "over the floor; noise: ours timed twice;\nuncaptured, launches: of ours; x mxfp4, x bf16: "
        "the best of the others over ours"
    )
    return f"{note}\n{table(head, rows)}"


def _number(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)
