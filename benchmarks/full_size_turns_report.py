"""What the turns of ``benchmarks.full_size`` amount to, and their tables."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.report import column, columns, paragraphs, quartiles
from benchmarks.timing import summary
from benchmarks.token_parts import PARTS, REST

LABELS = {
    "ours": "mxfp4_fx.compile",
    "ours-mxfp8": "mxfp4_fx.compile, linears in MXFP8",
    "uncompiled": "packed, uncompiled",
    "llama-bf16": "llama.cpp, bf16",
    "llama-q8_0": "llama.cpp, Q8_0",
    "vllm": "vLLM",
}
OURS = "ours"


def summarize(turns: dict[str, Any]) -> dict[str, Any]:
    """Rates, ratios and parts of what the runs told.

    Returns:
        read_rate: bytes a second.
        tokens_per_second: by way and cell, such as ``"prefill 128"`` or ``"decode 128 x 8"``.
        ours_over: by way and cell, of rates that were measured in the same round.
        parts: by context, seconds of a token's parts and of the token while it was watched.
    """
    rates: dict[str, dict[str, dict[int, float]]] = {}  # by way, cell and round
    parts: dict[str, dict[str, list[float]]] = {}
    for told in turns["runs"]:
        for phase in told["phases"]:
            kind, *numbers = phase["phase"].split()
            if kind not in ("prefill", "decode", "parts"):
                continue
            seconds = statistics.median(phase["token_seconds"])
            if kind == "parts":
                found = parts.setdefault(numbers[0], {})
                token = sum(phase["parts"].values())
                for part, each in {**phase["parts"], "token": token}.items():
                    found.setdefault(part, []).append(each)
                continue
            cell = f"prefill {numbers[0]}" if kind == "prefill" else f"decode {_behind(numbers)}"
            tokens = int(numbers[0 if kind == "prefill" else 1])
            of_way = rates.setdefault(told["way"], {})
            of_way.setdefault(cell, {})[told["round"]] = tokens / seconds  # the last one counts
    return {
        "read_rate": summary([rate for told in turns["runs"] for rate in told["read_rates"]]),
        "tokens_per_second": {
            way: {cell: summary(list(turn.values())) for cell, turn in cells.items()}
            for way, cells in rates.items()
        },
        "ours_over": {
            way: {cell: summary(both) for cell in cells if (both := _ratios(rates, way, cell))}
            for way, cells in rates.items()
            if way != OURS
        },
        "parts": {
            context: {part: summary(seconds) for part, seconds in found.items()}
            for context, found in parts.items()
        },
    }


def _behind(numbers: list[str]) -> str:
    return f"{numbers[0]} x {numbers[1]}"


def _ratios(rates: dict[str, dict[str, dict[int, float]]], way: str, cell: str) -> list[float]:
    ours, theirs = rates.get(OURS, {}).get(cell, {}), rates[way][cell]
    return [ours[turn] / theirs[turn] for turn in ours if turn in theirs]


def bytes_of_part(turns: dict[str, Any], part: str, context: str) -> int:
    """What a token must read for a part: weights, and for attention keys and values."""
    sizes = turns["bytes"]
    found: int = sizes["parts"][part] + (sizes["cache"][context] if part == "attention" else 0)
    return found


def text(turns: dict[str, Any]) -> str:
    """Everything that a reader should see."""
    return paragraphs(_rates(turns), _parts(turns), _absent(turns))


def _rates(turns: dict[str, Any]) -> str:
    found, settings = turns["summary"], turns["settings"]
    rates, ratios = found["tokens_per_second"], found["ours_over"]
    cells = [f"prefill {count}" for count in settings["prefill"]]
    cells += [f"decode {c} x {b}" for b in settings["batches"] for c in settings["contexts"]]
    rows = [
        {"name": LABELS[way], **{cell: each["median"] for cell, each in rates[way].items()}}
        for way in LABELS
        if way in rates
    ]
    rows += [
        {
            "name": f"times as fast as {LABELS[way]}",
            **{cell: each["median"] for cell, each in ratios[way].items()},
        }
        for way in LABELS
        if ratios.get(way)
    ]
    shown = {
        "tokens a second": column("name"),
        **{cell: column(cell, "{:.3g}") for cell in cells},
    }
    once = [str(count) for count in settings["prefill"] if count > settings["most_each_round"]]
    return (
        f"{columns(rows, shown)}\n"
        f"decode CONTEXT x SEQUENCES; medians of {settings['turns']} rounds of processes in turn"
        + (f" (prompts of {', '.join(once)}: of one)" if once else "")
        + f"; memory was read at {quartiles(found['read_rate'], 1e9, '{:.1f}')} GB/s meanwhile"
    )


def _parts(turns: dict[str, Any]) -> str:
    found, tables = turns["summary"], []
    read = found["read_rate"]["median"]
    for context, parts in found["parts"].items():
        rows: list[dict[str, Any]] = []
        for part in (*PARTS, "token"):
            if part == "token":
                size = sum(bytes_of_part(turns, each, context) for each in PARTS)
            else:
                size = bytes_of_part(turns, part, context)
            seconds = parts[part]["median"]
            rows.append({"name": part, "ms": 1e3 * seconds, "GB": size / 1e9})
            rows[-1]["floor"] = 1e3 * size / read
            rows[-1]["rate"] = size / seconds / 1e9 if part != REST else None
        shown = {
            f"behind {context} tokens": column("name"),
            "ms": column("ms", "{:.2f}"),
            "GB": column("GB", "{:.3f}"),
            "ms to read": column("floor", "{:.2f}"),
            "GB/s": column("rate", "{:.1f}"),
        }
        plain = found["tokens_per_second"][OURS].get(f"decode {context} x 1")
        note = f"; unwatched a token took {1e3 / plain['median']:.2f} ms" if plain else ""
        tables.append(f"{columns(rows, shown)}\nwhile torch's profiler watched{note}")
    return paragraphs(*tables)


def _absent(turns: dict[str, Any]) -> str:
    lines = [f"cannot be had: {LABELS[way]}: {why}" for way, why in turns["unavailable"].items()]
    lines += [
        f"failed: round {told['round'] + 1}, {LABELS[told['way']]}, behind "
        f"{[phase['phase'] for phase in told['phases']]}: {told['failed']}"
        for told in turns["runs"]
        if told["failed"]
    ]
    return "\n".join(lines)
