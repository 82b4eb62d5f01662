"""Tables for a terminal, and what all reports say in the same way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Where a cell's value stands in a row, as keys with slashes between; its format; its unit.
Column = tuple[str, str, float]


def column(path: str, form: str = "{}", unit: float = 1) -> Column:
    return path, form, unit


def columns(rows: Iterable[Mapping[str, Any]], shown: Mapping[str, Column]) -> str:
    """A table with a line for each row; what was not measured is a dash."""
    return table(list(shown), [[cell(row, *each) for each in shown.values()] for row in rows])


def cell(row: Any, path: str, form: str = "{}", unit: float = 1) -> str:
    for key in path.split("/"):
        row = (row or {}).get(key)
    if row is None:
        return "-"
    return form.format(row if unit == 1 else row / unit)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need; the first to the left, numbers to the right."""
    lines = (head, *rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    formats = ["<", *">" * (len(widths) - 1)]
    return "\n".join(
        "  ".join(map("{:{}{}}".format, line, formats, widths)).rstrip() for line in lines
    )


def quartiles(stats: dict[str, Any], unit: float, form: str) -> str:
    """The median, and the quartiles in brackets."""
    middle, low, high = (cell(stats, part, form, unit) for part in ("median", "q1", "q3"))
    return f"{middle} ({low} to {high})"


def absent(results: dict[str, Any]) -> str:
    """Who was not measured, where, and why; then the notes."""
    lines = [f"not available: {name}: {why}" for name, why in results["unavailable"].items()]
    for skip in results["skipped"]:
        name = results["contenders"].get(skip["contender"], {}).get("label", skip["contender"])
        experts = f", {skip['experts']} experts" if "experts" in skip else ""
        lines.append(f"not measured: {name}{experts}, T = {skip['tokens']}: {skip['reason']}")
    return "\n".join(lines + [f"note: {note}" for note in results["notes"]])


def paragraphs(*parts: str) -> str:
    """Those that say something, with an empty line between."""
    return "\n\n".join(part for part in parts if part)
