"""What the stages of ``benchmarks.start`` amount to, and their tables.

README's rows: python -m benchmarks.start_report benchmarks/results/start-epyc-zen3-2-threads.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.compile_phases import OTHER, PHASES
from benchmarks.report import column, columns, paragraphs

_GIB = 2**30
# In the order in which a start comes to them.
PARTS = tuple(dict.fromkeys(("import", "load", "Dynamo", *PHASES.values(), OTHER)))
LABELS = {
    "uncompiled": "packed, uncompiled",
    "whole": 'model.compile(backend="mxfp4")',
    "pieces": "mxfp4_fx.compile(model)",
    "inductor": "Inductor alone, dense",
    "llama.cpp": "llama.cpp",
}


def summarize(start: dict[str, Any], clock: str) -> dict[str, Any]:
    """What a start took: seconds of its parts and until two moments; graphs, C++ files, memory.

    Args:
        clock: of ``clock``'s seconds, "cpu" or "wall".
    """
    *stages, again = start["stages"]
    key = "cpu_seconds" if clock == "cpu" else "seconds"
    parts = dict.fromkeys(PARTS, 0.0)
    for stage in stages:
        if stage["phase"] in parts:
            parts[stage["phase"]] += stage[key]
        else:
            for part, seconds in stage.get("spent", {OTHER: stage[key]}).items():
                parts[part] += seconds
    files = sum(stage.get("timings", {}).get("compile_file", 0) for stage in stages)
    return {
        "parts": parts,
        "first token": sum(stage[key] for stage in stages[:3]),
        "all tokens": sum(stage[key] for stage in stages),
        "again": again[key] if again["phase"] == "again" else None,
        "graphs": sum(stage["graphs"] for stage in stages),
        "graphs again": again["graphs"],
        "files": files,
        "peak": max(stage["memory"]["peak"] for stage in stages),
        "with_children": max(stage["sampled_peaks"].get("with_children", 0) for stage in stages),
    }


def text(results: dict[str, Any]) -> str:
    """Everything that a reader should see."""
    return paragraphs(_head(results), _table(results), _notes(results))


def readme_rows(results: dict[str, Any]) -> list[str]:
    """Rows of README's table: a way, the layers, and seconds with cold and with warm caches."""
    seconds = {
        (each["way"], each["layers"], each["cache"]): each["summary"]["all tokens"]
        for each in results["starts"]
    }
    ways = sorted({way for way, _, _ in seconds}, key=list(LABELS).index)
    rows = []
    for way in ways:
        name = f"`{LABELS[way]}`" if "(" in LABELS[way] else LABELS[way]
        for layers in sorted({each for one, each, _ in seconds if one == way}):
            shown = (seconds.get((way, layers, cache)) for cache in ("cold", "warm"))
            cells = ("" if one is None else f"{one:.0f}" for one in shown)
            rows.append("| " + " | ".join((f"{name}, {layers} layers", *cells)) + " |")
    return rows


def _head(results: dict[str, Any]) -> str:
    facts, settings = results["machine"], results["settings"]
    kind = "wall time, gpt-oss-20b's widths" if settings["full_size"] else "CPU time, tiny widths"
    return (
        f"{facts['cpu']}, {settings['threads']} of {facts['cores']} cores; torch "
        f"{facts['torch']}, transformers {facts['transformers']}; load average "
        f"{facts['load_average_at_start']:.1f} at start\n"
        f"seconds of {kind}; a prompt of {settings['prompt_tokens']} and 1 + "
        f"{settings['new_tokens']} tokens"
    )


def _fresh_memory(facts: dict[str, Any]) -> list[str]:
    rate = facts.get("fresh_memory_rate")
    if rate is None:
        return []
    lines = [f"swizzled weights need new memory; one thread gets {rate / 1e9:.1f} GB/s of it here"]
    if before := facts.get("untouched_memory_rate"):
        lines.append(f"all of it was used once before, when one got {before / 1e9:.1f} GB/s")
    return lines


def _table(results: dict[str, Any]) -> str:
    rows = [
        {
            **start,
            **start["summary"],
            "name": f"{start['layers']}, {start['cache']}, {LABELS[start['way']]}",
        }
        for start in results["starts"]
    ]
    shown = {
        "layers": column("name"),
        **{part: column(f"parts/{part}", "{:.1f}") for part in PARTS},
        "first token": column("first token", "{:.1f}"),
        "all": column("all tokens", "{:.1f}"),
        "again": column("again", "{:.2f}"),
        "graphs": column("graphs"),
        "C++ files": column("files"),
        "peak GiB": column("peak", "{:.2f}", _GIB),
    }
    return columns(rows, shown)


def _notes(results: dict[str, Any]) -> str:
    lines = [
        "first token, all: from the process's begin until the first and the last token came; the "
        "parts add up to all",
        "swizzling: what compiling waits for; the rest of it runs beside compiling, in a thread",
        f"{OTHER}: imports of torch's compiler, evaluating guards, running what was compiled",
        "again: the same tokens once more",
        *_fresh_memory(results["machine"]),
        *(f"not measured: {LABELS[way]}: {why}" for way, why in results["unavailable"].items()),
    ]
    lines += [f"note: {note}" for note in results["notes"]]
    return "\n".join(lines)


if __name__ == "__main__":
    print("\n".join(readme_rows(json.loads(Path(sys.argv[1]).read_text("utf-8")))))
