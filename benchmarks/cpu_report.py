"""Results of ``benchmarks.cpu`` as tables for a terminal."""

from __future__ import annotations

from typing import Any

from benchmarks.probes import UNITS
from benchmarks.report import absent, median, number, paragraphs, quartiles, table


def text(results: dict[str, Any]) -> str:
    """Everything that a reader should see, in the order of its weight."""
    sections = (_head, _layer, _everyone, absent, _overhead, _alternating, _end_to_end)
    return paragraphs([section(results) for section in sections])


def _head(results: dict[str, Any]) -> str:
    machine, sizes, path = results["machine"], results["settings"], results["path"]
    cache = machine["caches"].get("L3") or max(machine["caches"].values(), default=0)
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{cache / 2**20:.0f} MiB last cache; torch {machine['torch']}, "
        f"transformers {machine['transformers']}, {machine['compiler']}",
        f"one MoE MLP: hidden {sizes['hidden']}, intermediate {sizes['intermediate']}, "
        f"{sizes['experts']} experts, top-{sizes['top_k']}; "
        f"{results['rounds']} rounds, load average {machine['load_average_at_start']:.1f} at start",
        f"the backend chooses {path['chosen_by_backend']}: {path['reason']}",
    ]
    if floors := results["floors"]:
        peaks = (f"{UNITS[u]} {s['median'] / 1e12:.2f}" for u, s in floors["units"].items())
        read = quartiles(floors["read"], 1e9, "{:.1f}")
        lines.append(f"floors: reading {read} GB/s; TFLOP/s: {', '.join(peaks)}")
    return "\n".join(lines)


def _layer(results: dict[str, Any]) -> str:
    """The path that was measured first, which is the best, beside the peers."""
    contenders, best = results["contenders"], results["path"]["contender"]
    shown = [n for n, c in contenders.items() if c["kind"] != "native" or n == best]
    labels = [contenders[name]["label"].replace("transformers ", "") for name in shown]
    rows = []
    for row in results["layer"]:
        floor = row["floor"]
        rows.append(
            [
                str(row["tokens"]),
                str(row["experts_hit"]),
                f"{floor['ms']:.2f} {floor['by']}" if floor else "-",
                *(number(median(row, name), "{:.2f}") for name in shown),
                number(row["speedup_over_best_bf16"].get(best), "{:.1f}"),
                number(row["fraction_of_floor"].get(best), "{:.2f}"),
            ]
        )
    note = (
        "milliseconds, medians. x bf16: the best time of transformers over that of "
        f"{contenders[best]['label']}; of floor: the larger floor over it"
    )
    return f"{table(['T', 'experts', 'floor', *labels, 'x bf16', 'of floor'], rows)}\n{note}"


def _everyone(results: dict[str, Any]) -> str:
    """Errors of all, and what the paths besides the best one reach."""
    rows = []
    for name, contender in results["contenders"].items():
        errors = contender["relative_error"].values()
        cells = [contender["label"], number(max(errors, default=None), "{:.1e}")]
        for row in results["layer"]:
            share = row["fraction_of_floor"].get(name)
            cells.append(number(median(row, name), "{:.2f}") + (f" ({share:.2f})" if share else ""))
        rows.append(cells)
    tokens = [f"T={row['tokens']}" for row in results["layer"]]
    return table(["milliseconds (of floor)", "error", *tokens], rows)


def _overhead(results: dict[str, Any]) -> str:
    order = ("routing", "gate_up", "down", "mlp", "mm")
    rows = []
    for name, parts in results["overhead"]["calls"].items():
        label = results["contenders"].get(name, {}).get("label", name)
        cells = [f"{parts[part]['median']:.1f}" if part in parts else "" for part in order]
        rows.append([label, *cells])
    return table(["microseconds a call, next to nothing to compute", *order], rows)


def _alternating(results: dict[str, Any]) -> str:
    found = results["alternating"]
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
