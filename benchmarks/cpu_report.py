"""Results of ``benchmarks.cpu`` as tables for a terminal."""

from __future__ import annotations

from typing import Any

from benchmarks.probes import UNITS
from benchmarks.report import absent, cell, column, columns, paragraphs, quartiles


def text(results: dict[str, Any]) -> str:
    """Everything that a reader should see, in the order of its weight."""
    sections = (_head, _layer, absent, _calls, _end_to_end)
    return paragraphs(*(section(results) for section in sections))


def _head(results: dict[str, Any]) -> str:
    machine, sizes, path = results["machine"], results["settings"], results["path"]
    cache = machine["caches"].get("L3") or max(machine["caches"].values(), default=0)
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{cache / 2**20:.0f} MiB last cache; torch {machine['torch']}, "
        f"transformers {machine['transformers']}, {machine['compiler']}",
        f"one MoE MLP of {sizes.get('family', 'gpt_oss')}: "
        f"hidden {sizes['hidden']}, intermediate {sizes['intermediate']}, "
        f"{sizes['experts']} experts, top-{sizes['top_k']}; "
        f"{results['rounds']} rounds, load average {machine['load_average_at_start']:.1f} at start",
        f"the backend chooses {path['chosen_by_backend']}: {path['reason']}",
    ]
    if floors := results["floors"]:
        peaks = (f"{UNITS[u]} {s['median'] / 1e12:.2f}" for u, s in floors["units"].items())
        read = quartiles(floors["read"], 1e9, "{:.1f}")
        peak = quartiles(floors["matrix_peak"], 1e12, "{:.2f}")
        lines.append(f"floors: reading {read} GB/s; multiplying {peak} TFLOP/s")
        lines.append(f"TFLOP/s of each unit: {', '.join(peaks)}")
    return "\n".join(lines)


def _layer(results: dict[str, Any]) -> str:
    """All times, the largest errors, and the ratios of the path that was measured first.

    The ratio to vLLM is there if vLLM is.
    """
    contenders, best = results["contenders"], results["path"]["contender"]
    labels = {name: each["label"].replace("transformers ", "") for name, each in contenders.items()}
    vllm = {"x vLLM": column(f"speedup_over_vllm/{best}", "{:.2f}")} if "vllm" in labels else {}
    shown = {
        "T": column("tokens"),
        "experts": column("experts_hit"),
        "floor": column("floor/ms", "{:.2f}"),
        "by": column("floor/by"),
        **{label: column(f"ms/{name}/median", "{:.2f}") for name, label in labels.items()},
        **vllm,
        "x bf16": column(f"speedup_over_best_bf16/{best}", "{:.1f}"),
        "of floor": column(f"fraction_of_floor/{best}", "{:.2f}"),
    }
    errors = {name: contenders[name]["relative_error"].values() for name in labels}
    worst = (f"{labels[name]} {max(each):.1e}" for name, each in errors.items() if each)
    return (
        f"{columns(results['layer'], shown)}\n"
        "milliseconds, medians. x bf16: the best time of transformers over that of "
        f"{labels[best]}; {'x vLLM: that of vLLM over it; ' if vllm else ''}"
        "of floor: the larger floor over it\n"
        f"largest relative errors: {', '.join(worst)}"
    )


def _calls(results: dict[str, Any]) -> str:
    rows = [{"name": name, **parts} for name, parts in results["overhead"]["calls"].items()]
    parts = ("routing", "gate_up", "down", "mlp", "mm")
    shown = {part: column(f"{part}/median", "{:.1f}") for part in parts}
    title = "microseconds a call, next to nothing to compute"
    found = results["alternating"]
    ms = {name: f"{stats['median']:.2f}" for name, stats in found["milliseconds"].items()}
    return (
        f"{columns(rows, {title: column('name'), **shown})}\n"
        f"in turn with a matmul of torch (T={found['tokens']}): {ms['both']} ms together, "
        f"{ms['mlp']} + {ms['matmul']} apart: ratio {cell(found, 'ratio/median', '{:.2f}')}"
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
    shown = {
        f"a model of {found['layers']} layers, tokens a second": column("label"),
        f"prefill of {found['prompt_tokens']}": column("prefill/median", "{:.1f}"),
        f"decode of {found['new_tokens']}": column("decode/median", "{:.1f}"),
    }
    rates = found["tokens_per_second"]
    return columns([{"label": labels[name], **rates[name]} for name in rates], shown)
