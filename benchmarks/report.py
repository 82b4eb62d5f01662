"""The results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNITS = {"f32": "float32 FMA", "avx512_bf16": "vdpbf16ps", "amx_bf16": "AMX bf16"}


def text(results: dict[str, Any]) -> str:
    """Everything that a reader should see, in the order of its weight."""
    parts = [_head(results), _layer(results), _quality(results)]
    for section in (_absent, _overhead, _alternating, _end_to_end):
        parts.append(section(results))
    return "\n\n".join(part for part in parts if part)


def _head(results: dict[str, Any]) -> str:
    machine, sizes = results["machine"], results["settings"]
    cache = machine["caches"].get("L3") or max(machine["caches"].values(), default=0)
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{cache / 2**20:.0f} MiB last cache; torch {machine['torch']}, "
        f"transformers {machine['transformers']}, {machine['compiler']}",
        f"one MoE MLP: hidden {sizes['hidden']}, intermediate {sizes['intermediate']}, "
        f"{sizes['experts']} experts, top-{sizes['top_k']}; "
        f"{results['rounds']} rounds, load average {machine['load_average_at_start']:.1f} at start",
    ]
    path = results["path"]
    lines.append(f"the backend chooses {path['chosen_by_backend']}: {path['reason']}")
    floors = results["floors"]
    if "read" in floors:
        peak = ", ".join(
            f"{UNITS[unit]} {stats['median'] / 1e12:.2f}" for unit, stats in floors["units"].items()
        )
        lines.append(
            f"floors: reading {floors['read']['median'] / 1e9:.1f} GB/s "
            f"(quartiles {floors['read']['q1'] / 1e9:.1f} to {floors['read']['q3'] / 1e9:.1f}); "
            f"TFLOP/s: {peak}"
        )
    return "\n".join(lines)


def _layer(results: dict[str, Any]) -> str:
    """The path that was measured first, which is the best, beside the peers."""
    contenders, best = results["contenders"], results["path"]["contender"]
    names = [
        name
        for name, contender in contenders.items()
        if _measured(results, name) and (contender["kind"] != "native" or name == best)
    ]
    labels = [contenders[name]["label"].replace("transformers ", "") for name in names]
    rows = []
    for row in results["layer"]:
        floor = row["floor"]
        rows.append(
            [
                str(row["tokens"]),
                str(row["experts_hit"]),
                f"{floor['ms']:.2f} {floor['by']}" if floor else "-",
                *(_number(row["ms"].get(name, {}).get("median"), "{:.2f}") for name in names),
                _number(row["speedup_over_best_bf16"].get(best), "{:.1f}"),
                _number(row["fraction_of_floor"].get(best), "{:.2f}"),
            ]
        )
    note = (
        "milliseconds, medians. x bf16: the best time of transformers over that of "
        f"{contenders[best]['label']}; of floor: the larger floor over it"
    )
    head = ["T", "experts", "floor", *labels, "x bf16", "of floor"]
    return f"{table(head, rows)}\n{note}"


def _quality(results: dict[str, Any]) -> str:
    """Errors of all, and what the paths besides the best one reach."""
    rows = []
    for name, contender in results["contenders"].items():
        errors = contender["relative_error"].values()
        cells = [contender["label"], f"{max(errors):.1e}" if errors else "-"]
        for row in results["layer"]:
            ms = _number(row["ms"].get(name, {}).get("median"), "{:.2f}")
            share = _number(row["fraction_of_floor"].get(name), " ({:.2f})")
            cells.append(ms + (share if share != "-" else ""))
        rows.append(cells)
    head = ["milliseconds (of floor)", "error", *(f"T={row['tokens']}" for row in results["layer"])]
    return table(head, rows)


def _absent(results: dict[str, Any]) -> str:
    lines = [f"not available: {name}: {why}" for name, why in results["unavailable"].items()]
    skips: dict[tuple[str, str], list[int]] = {}
    for skip in results["skipped"]:
        skips.setdefault((skip["contender"], skip["reason"]), []).append(skip["tokens"])
    for (name, reason), tokens in skips.items():
        label = results["contenders"][name]["label"]
        lines.append(f"not measured: {label} at T = {', '.join(map(str, tokens))}: {reason}")
    lines += [f"note: {note}" for note in results["notes"]]
    return "\n".join(lines)


def _overhead(results: dict[str, Any]) -> str:
    if not results["overhead"]:
        return ""
    calls = results["overhead"]["calls"]
    rows = []
    for name, parts in calls.items():
        known = results["contenders"].get(name)
        order = ("routing", "gate_up", "down", "mlp", "mm")
        cells = [f"{parts[part]['median']:.1f}" if part in parts else "" for part in order]
        rows.append([known["label"] if known else name, *cells])
    title = "microseconds a call, next to nothing to compute"
    return table([title, "routing", "gate_up", "down", "MLP", "mm"], rows)


def _alternating(results: dict[str, Any]) -> str:
    found = results["alternating"]
    if not found:
        return ""
    ms = {name: stats["median"] for name, stats in found["milliseconds"].items()}
    return (
        f"in turn with a matmul of torch (T={found['tokens']}): {ms['both']:.2f} ms together, "
        f"{ms['mlp']:.2f} + {ms['matmul']:.2f} apart: ratio {found['ratio']['median']:.2f}"
    )


def _end_to_end(results: dict[str, Any]) -> str:
    found = results["end_to_end"]
    if not found:
        return ""
    labels = {
        "uncompiled": "bfloat16, uncompiled",
        "inductor": f"bfloat16, {found['compiler']}",
        "mxfp4": 'backend="mxfp4"',
    }
    rows = [
        [labels[name], *(f"{parts[part]['median']:.1f}" for part in ("prefill", "decode"))]
        for name, parts in found["tokens_per_second"].items()
    ]
    head = [f"a model of {found['layers']} layers, tokens a second"]
    head += [f"prefill of {found['prompt_tokens']}", f"decode of {found['new_tokens']}"]
    return table(head, rows)


def _measured(results: dict[str, Any], name: str) -> bool:
    return any(name in row["ms"] for row in results["layer"])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need; the first to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (head, *rows)
    )
