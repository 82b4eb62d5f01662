"""What the phases of ``benchmarks.full_size`` amount to, and their tables."""

from __future__ import annotations

from typing import Any

from benchmarks.report import column, columns, paragraphs, quartiles
from benchmarks.timing import summary

_GIB = 2**30


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """The peak and what it consists of, rates, and the floor; bytes, tokens a second."""
    runs, sizes = results["runs"], results["bytes"]
    baseline = runs["baseline"]
    *phases, measured = runs["compiled"]["phases"]
    top = max(phases, key=lambda phase: phase["memory"]["peak"])
    peak = top["memory"]["peak"]
    nothing = max(p["memory"]["peak"] for p in baseline["phases"]) - baseline["bytes"]["checkpoint"]
    more = peak - nothing - sizes["experts"] - top["checkpoint_mapped"]
    rates = {
        name: summary([turn[name] for turn in measured["rounds"]]) for name in ("prefill", "decode")
    }
    read = summary(measured["read_rates"])
    at_best = read["median"] / sizes["per_token"]
    found: dict[str, Any] = {
        "peak": {
            "phase": top["phase"],
            "bytes": peak,
            "over_checkpoint": peak / sizes["checkpoint"],
            "baseline": nothing,
            "experts": sizes["experts"],
            "other_tensors": top["checkpoint_mapped"],
            "more": more,
            "more_in_layers": more / sizes["layer"],
            "with_children": max(
                peak, *(phase["sampled_peaks"].get("with_children", 0) for phase in phases)
            ),
        },
        # Widths are tiny there: what a token costs besides reading and multiplying weights.
        "baseline_decode": baseline["phases"][-1]["tokens_per_second"]["decode"],
        "graphs": sum(phase["graphs"] for phase in phases),
        "graphs_while_measuring": measured["graphs"],
        "tokens_per_second": rates,
        "floor": {
            "read_rate": read,
            "decode": at_best,
            "reached": rates["decode"]["median"] / at_best,
        },
    }
    if "uncompiled" in runs:
        uncompiled = runs["uncompiled"]["phases"][-1]["tokens_per_second"]
        found["uncompiled"] = uncompiled
        found["times_faster_than_uncompiled"] = {
            name: rates[name]["median"] / uncompiled[name] for name in rates
        }
    return found


def text(results: dict[str, Any]) -> str:
    """Everything that a reader should see."""
    return paragraphs(*(part(results) for part in (_head, _phases, _peak, _speed)))


def _head(results: dict[str, Any]) -> str:
    facts, settings, sizes = results["machine"], results["settings"], results["bytes"]
    limit = settings["limit_gib"]
    lines = [
        f"{facts['cpu']}, {settings['threads']} of {facts['cores']} cores, "
        f"{_gib(facts['memory_bytes'])} GiB; torch {facts['torch']}, transformers "
        f"{facts['transformers']}; load average {facts['load_average_at_start']:.1f} at start",
        f"{settings['layers']} layers, vocabulary {settings['vocab']}: {_gib(sizes['checkpoint'])} "
        f"GiB packed, of which experts {_gib(sizes['experts'])}, a layer's {_gib(sizes['layer'])}; "
        f"with bfloat16 experts {_gib(sizes['bfloat16'])}",
    ]
    if sizes["bfloat16"] > limit * _GIB:
        lines.append(f"bfloat16 does not fit into {limit:g} GiB, so it is not measured beside")
    if results["write"]:
        lines.append(f"written in {results['write']['seconds']:.0f} s")
    return "\n".join(lines)


def _phases(results: dict[str, Any]) -> str:
    """Memory at the end and peaks of each phase of each process."""
    rows = [
        {"name": f"{name}: {phase['phase']}", **phase}
        for name, found in results["runs"].items()
        for phase in found["phases"]
    ]
    shown = {
        "GiB": column("name"),
        "seconds": column("seconds", "{:.1f}"),
        "load": column("load_average", "{:.1f}"),
        "graphs": column("graphs"),
        "anonymous": column("memory/anonymous", "{:.2f}", _GIB),
        "mapped": column("memory/mapped", "{:.2f}", _GIB),
        "peak": column("memory/peak", "{:.2f}", _GIB),
        "of anonymous": column("sampled_peaks/anonymous", "{:.2f}", _GIB),
        "of mapped": column("sampled_peaks/mapped", "{:.2f}", _GIB),
        "with children": column("sampled_peaks/with_children", "{:.2f}", _GIB),
    }
    return (
        f"{columns(rows, shown)}\n"
        "at the end: anonymous (the process's own), mapped (files' pages, which the system can "
        "drop);\npeak: of both together, then of each alone, then with child processes (compilers)"
    )


def _peak(results: dict[str, Any]) -> str:
    peak, sizes = results["summary"]["peak"], results["bytes"]
    claim = "at most" if peak["more"] <= sizes["layer"] else "MORE THAN"
    return (
        f"peak in {peak['phase']!r}: {_gib(peak['bytes'])} GiB, {peak['over_checkpoint']:.3f} of "
        f"the packed checkpoint\n"
        f"  {_gib(peak['baseline'])} Python, torch and compiling (the baseline's peak)\n"
        f"+ {_gib(peak['experts'])} experts, swizzled\n"
        f"+ {_gib(peak['other_tensors'])} other tensors, mapped and read\n"
        f"+ {_gib(peak['more'])} more: {claim} one layer's experts ({_gib(sizes['layer'])})\n"
        f"with child processes at most {_gib(peak['with_children'])} GiB; the limit of "
        f"{results['settings']['limit_gib']:g} is watched from outside, not a cgroup's"
    )


def _speed(results: dict[str, Any]) -> str:
    found, settings, sizes = results["summary"], results["settings"], results["bytes"]
    ours, floor = found["tokens_per_second"], found["floor"]
    rows = [{"name": "compiled", **{part: ours[part]["median"] for part in ours}}]
    if "uncompiled" in found:
        rows.append({"name": "packed, uncompiled", **found["uncompiled"]})
        rows.append({"name": "times faster", **found["times_faster_than_uncompiled"]})
    shown = {
        "tokens a second": column("name"),
        f"prefill of {settings['prompt_tokens']}": column("prefill", "{:.3g}"),
        "decode": column("decode", "{:.3g}"),
    }
    lines = [
        columns(rows, shown),
        f"medians of {settings['rounds']} rounds of {settings['new_tokens']} tokens (decoding: "
        f"{quartiles(ours['decode'], 1, '{:.2f}')}); {found['graphs']} graphs compiled before, "
        f"{found['graphs_while_measuring']} meanwhile",
        f"a token reads {sizes['per_token'] / 1e9:.2f} GB of weights (experts "
        f"{sizes['per_token_experts'] / 1e9:.2f}); at "
        f"{floor['read_rate']['median'] / 1e9:.1f} GB/s that allows {floor['decode']:.1f} a "
        f"second, of which {floor['reached']:.2f} is reached",
        f"with tiny widths a token takes {1e3 / found['baseline_decode']:.1f} ms, of "
        f"{1e3 / ours['decode']['median']:.1f}",
    ]
    if logits := results["logits"]:
        lines.append(
            "the first logits differ from the uncompiled ones by "
            f"{logits['relative_difference']:.1e} of themselves; rounding explains up to "
            f"{logits['bound']:.1e}"
        )
    return "\n".join(lines)


def _gib(nbytes: int) -> str:
    return f"{nbytes / _GIB:.2f}"
