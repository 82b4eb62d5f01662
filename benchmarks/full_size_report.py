"""What the phases of benchmarks/full_size.py amount to, and their tables."""

from __future__ import annotations

from typing import Any

from report import table
from samples import summary

_GIB = 2**30


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """The peak and what it consists of, rates, and the floor; bytes, tokens a second."""
    runs, sizes = results["runs"], results["bytes"]
    baseline = runs["baseline"]
    phases = [phase for phase in runs["compiled"]["phases"] if phase["phase"] != "measure"]
    (measured,) = (p for p in runs["compiled"]["phases"] if p["phase"] == "measure")
    peak = max(phases, key=lambda phase: phase["memory"]["peak"])
    nothing = max(p["memory"]["peak"] for p in baseline["phases"]) - baseline["bytes"]["checkpoint"]
    others = peak["checkpoint_mapped"]
    more = peak["memory"]["peak"] - nothing - sizes["experts"] - others
    rates = {
        name: summary([turn[name] for turn in measured["rounds"]]) for name in ("prefill", "decode")
    }
    read = summary(measured["read_rates"])
    at_best = read["median"] / sizes["per_token"]
    found: dict[str, Any] = {
        "peak": {
            "phase": peak["phase"],
            "bytes": peak["memory"]["peak"],
            "over_checkpoint": peak["memory"]["peak"] / sizes["checkpoint"],
            "baseline": nothing,
            "experts": sizes["experts"],
            "other_tensors": others,
            "more": more,
            "more_in_layers": more / sizes["layer"],
            "with_children": max(
                most for p in phases for most in (p["memory"]["peak"], _with_children(p))
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
    parts = [_head(results), _phases(results), _peak(results), _speed(results)]
    return "\n\n".join(parts)


def _head(results: dict[str, Any]) -> str:
    facts, settings, sizes = results["machine"], results["settings"], results["bytes"]
    written = results["write"]
    lines = [
        f"{facts['cpu']}, {settings['threads']} of {facts['cores']} cores, "
        f"{_gib(facts['memory_bytes'])} GiB; torch {facts['torch']}, transformers "
        f"{facts['transformers']}; load average {facts['load_average_at_start']:.1f} at start",
        f"{settings['layers']} layers, vocabulary {settings['vocab']}: {_gib(sizes['checkpoint'])} "
        f"GiB packed, of which experts {_gib(sizes['experts'])}, a layer's {_gib(sizes['layer'])}; "
        f"with bfloat16 experts {_gib(sizes['bfloat16'])}",
    ]
    if sizes["bfloat16"] > settings["limit_gib"] * _GIB:
        limit = settings["limit_gib"]
        lines.append(f"bfloat16 does not fit into {limit:g} GiB, so it is not measured beside")
    if written:
        lines.append(f"written in {written['seconds']:.0f} s")
    return "\n".join(lines)


def _phases(results: dict[str, Any]) -> str:
    """Memory at the end and peaks of each phase of each process."""
    rows = []
    for name, found in results["runs"].items():
        for phase in found["phases"]:
            memory, sampled = phase["memory"], phase["sampled_peaks"]
            rows.append(
                [
                    f"{name}: {phase['phase']}",
                    f"{phase['seconds']:.1f}",
                    f"{phase['load_average']:.1f}",
                    str(phase["graphs"]),
                    *(_gib(memory[part]) for part in ("anonymous", "mapped")),
                    _gib(memory["peak"]),
                    *(_gib(sampled.get(part)) for part in ("anonymous", "mapped")),
                    _gib(sampled.get("with_children")),
                ]
            )
    head = ["GiB", "seconds", "load", "graphs", "anonymous", "mapped", "peak"]
    head += ["anonymous", "mapped", "and children"]
    return (
        f"{table(head, rows)}\n"
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
    ours = {name: stats["median"] for name, stats in found["tokens_per_second"].items()}
    decode = found["tokens_per_second"]["decode"]
    rows = [['backend="mxfp4"', *(f"{ours[name]:.2f}" for name in ("prefill", "decode"))]]
    if "uncompiled" in found:
        plain, ratio = found["uncompiled"], found["times_faster_than_uncompiled"]
        rows.append(["packed, uncompiled", f"{plain['prefill']:.2f}", f"{plain['decode']:.3f}"])
        rows.append(["times faster", f"{ratio['prefill']:.0f}", f"{ratio['decode']:.0f}"])
    head = ["tokens a second", f"prefill of {settings['prompt_tokens']}", "decode"]
    floor = found["floor"]
    lines = [
        table(head, rows),
        f"medians of {settings['rounds']} rounds of {settings['new_tokens']} tokens (decoding: "
        f"quartiles {decode['q1']:.2f} to {decode['q3']:.2f}); "
        f"{found['graphs']} graphs compiled before, {found['graphs_while_measuring']} meanwhile",
        f"a token reads {sizes['per_token'] / 1e9:.2f} GB of weights (experts "
        f"{sizes['per_token_experts'] / 1e9:.2f}); at "
        f"{floor['read_rate']['median'] / 1e9:.1f} GB/s that allows {floor['decode']:.1f} a "
        f"second, of which {floor['reached']:.2f} is reached",
        f"with tiny widths a token takes {1e3 / found['baseline_decode']:.1f} ms, of "
        f"{1e3 / decode['median']:.1f}",
    ]
    if results["logits"]:
        lines.append(
            "the first logits differ from the uncompiled ones by "
            f"{results['logits']['relative_difference']:.1e} of themselves; "
            f"rounding explains up to {results['logits']['bound']:.1e}"
        )
    return "\n".join(lines)


def _gib(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / _GIB:.2f}"


def _with_children(phase: dict[str, Any]) -> int:
    return phase["sampled_peaks"].get("with_children", 0)
