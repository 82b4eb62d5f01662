"""Tables for a terminal, and what all reports say in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need; the first to the left, numbers to the right."""
    lines = (head, *rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    formats = ["<", *">" * (len(widths) - 1)]
    return "\n".join(
        "  ".join(map("{:{}{}}".format, line, formats, widths)).rstrip() for line in lines
    )


def number(value: float | None, form: str) -> str:
    """A dash for what was not measured."""
    return "-" if value is None else form.format(value)


def median(row: dict[str, Any], name: str) -> float | None:
    """Of a contender's milliseconds."""
    found: float | None = row["ms"].get(name, {}).get("median")
    return found


def quartiles(stats: dict[str, Any], unit: float, form: str) -> str:
    """The median, and the quartiles in brackets."""
    middle, low, high = (form.format(stats[part] / unit) for part in ("median", "q1", "q3"))
    return f"{middle} ({low} to {high})"


def absent(results: dict[str, Any]) -> str:
    """Who was not measured, where, and why; then the notes."""
    lines = [f"not available: {name}: {why}" for name, why in results["unavailable"].items()]
    skips: dict[tuple[str, str], list[str]] = {}
    for skip in results["skipped"]:
        name = results["contenders"].get(skip["contender"], {}).get("label", skip["contender"])
        if "experts" in skip:
            name += f", {skip['experts']} experts"
        skips.setdefault((name, skip["reason"]), []).append(str(skip["tokens"]))
    for (name, reason), tokens in skips.items():
        lines.append(f"not measured: {name}, T = {', '.join(tokens)}: {reason}")
    return "\n".join(lines + [f"note: {note}" for note in results["notes"]])


def paragraphs(parts: Sequence[str]) -> str:
    """Those that say something, with an empty line between."""
    return "\n\n".join(part for part in parts if part)
