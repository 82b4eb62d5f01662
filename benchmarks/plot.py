"""Draw results of a benchmark: what it is called with tells which one it was.

python -m benchmarks.plot benchmarks/results/cpu.json build/cpu.png
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

INK, FAINT, GRID = "#1f2933", "#6b7680", "#e3e7eb"
FLOOR_FILL, FLOOR_BAR = "#eef1f4", "#c3cad1"
# Distinct in hue and lightness, for readers who do not tell hues apart too.
OURS = ("#0b57a4", "#2389c7", "#2a9d9d", "#5f8ea0", "#7c8fa0")
PYTORCH = "#7a5ba8"
PEERS = ("#c2410c", "#e08a3c", "#9a6b1f", "#b0475e")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")


class PlotUnavailable(SystemExit):
    """matplotlib is not installed; the message says how to."""


def require() -> None:
    """Raise :class:`PlotUnavailable` if nothing can be drawn here."""
    try:
        found = importlib.util.find_spec("matplotlib") is not None
    except ValueError:  # the module is blocked
        found = False
    if not found:
        raise PlotUnavailable(
            "a plot needs matplotlib: python -m pip install matplotlib (or leave --plot out)"
        )


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the plot to ``path``; its suffix, .png or .svg, is the format.

    Raises:
        PlotUnavailable: there is no matplotlib.
    """
    require()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    with pyplot.rc_context({"font.size": 10, "font.family": "sans-serif", "svg.hashsalt": "plot"}):
        if "models" in results:
            figure = _quality(results)
        elif "starts" in results:
            figure = _start(results)
        elif "turns" in results:
            from benchmarks import plot_turns  # it uses this file

            figure = plot_turns.figure(results)
        elif "rows" in results:
            figure = _gpu(results)
        else:
            figure = _cpu(results)
        figure.savefig(path, facecolor="white")
        pyplot.close(figure)


# ---- time over the number of tokens -------------------------------------------------------------


def _cpu(results: dict[str, Any]) -> Any:
    machine, settings = results["machine"], results["settings"]
    bands = "bands: quartiles" if results["rounds"] > 1 else "one round"
    about = [
        "Milliseconds for one GPT-OSS mixture-of-experts MLP",
        f"{settings['experts']} experts, top-{settings['top_k']}, hidden {settings['hidden']}, "
        f"intermediate {settings['intermediate']}; weights from memory",
        f"{machine['cpu']}, {machine['threads']} threads; torch {machine['torch']}; medians of "
        f"{results['rounds']} rounds, {bands}",
    ]
    return _times(results, {"": results["layer"]}, about, results["path"]["contender"], 1.0)


def _gpu(results: dict[str, Any]) -> Any:
    machine, settings = results["machine"], results["settings"]
    incomplete = "" if results["complete"] else " (incomplete run)"
    about = [
        f"Microseconds for one GPT-OSS mixture-of-experts MLP with its router{incomplete}",
        f"top-{settings['top_k']}, hidden {settings['hidden']}, intermediate "
        f"{settings['intermediate']}, bfloat16; weights from memory, in CUDA graphs",
        f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}; medians, "
        "bands: quartiles",
    ]
    panels: dict[str, Any] = {}
    for row in results["rows"]:
        panels.setdefault(f"{row['experts']} experts", []).append(row)
    return _times(results, panels, about, "ours", 1e3)


def _times(
    results: dict[str, Any],
    panels: dict[str, list[dict[str, Any]]],
    about: Sequence[str],
    main: str,
    unit: float,
) -> Any:
    """A panel for each list of rows, both axes logarithmic, with one legend for all.

    Args:
        main: the contender that stands out.
        unit: of the axis, in a millisecond.
    """
    from matplotlib import pyplot

    width = 9.6 if len(panels) < 2 else 12.4
    count = max(len(panels), 1)
    figure, axes = pyplot.subplots(
        1, count, figsize=(width, 5.8), dpi=160, sharey=True, squeeze=False
    )
    styles = _styles(results, main)
    for axis, (title, rows) in zip(axes[0], panels.items(), strict=False):
        axis.set_title(title, loc="left", color=INK, fontweight="bold", fontsize=11)
        _panel(axis, rows, styles, unit)
    handles: dict[str, Any] = {}
    for axis in axes[0]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        *(list(handles.values()), list(handles)),
        loc="lower center", ncols=3, frameon=False, labelcolor=INK,
    )  # fmt: skip
    _titles(figure, about)
    figure.subplots_adjust(left=0.075, right=0.98, top=0.8, bottom=0.25, wspace=0.06)
    return figure


def _styles(results: dict[str, Any], main: str) -> dict[str, dict[str, Any]]:
    """For each contender how its line is drawn, and whether it has a band."""
    ours, peers = iter(OURS), iter(PEERS)
    styles = {}
    for number, (name, contender) in enumerate(results["contenders"].items()):
        kind = contender["kind"]
        if kind == "again":  # ours once more, which shows how steady times are: in the table
            continue
        is_ours = kind in ("ours", "native")
        colour = PYTORCH if kind == "pytorch" else next(ours if is_ours else peers, INK)
        styles[name] = {
            "label": contender["label"],
            "color": colour,
            "marker": MARKERS[number % len(MARKERS)],
            "linewidth": 2.6 if name == main else 1.5,
            "markersize": 6 if name == main else 4.5,
            "zorder": 4 if name == main else 3,
        }
    return styles


def _panel(
    axes: Any, rows: list[dict[str, Any]], styles: dict[str, dict[str, Any]], unit: float
) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    tokens = [row["tokens"] for row in rows]
    if floors := [(row["tokens"], unit * row["floor"]["ms"]) for row in rows if row["floor"]]:
        x, y = zip(*floors, strict=True)
        axes.fill_between(x, min(y) / 2, y, color=FLOOR_FILL, linewidth=0)
        label = "floor: memory or multiplying"
        axes.plot(x, y, color=FAINT, linewidth=1.4, linestyle=(0, (5, 3)), label=label)
    for name, style in styles.items():
        points = [(row["tokens"], row["ms"][name]) for row in rows if name in row["ms"]]
        if not points:
            continue
        at = [tokens for tokens, _ in points]
        low, middle, high = (
            [unit * stats[part] for _, stats in points] for part in ("q1", "median", "q3")
        )
        axes.fill_between(at, low, high, color=style["color"], alpha=0.16, linewidth=0)
        axes.plot(at, middle, markeredgecolor="white", markeredgewidth=0.7, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, [str(count) for count in tokens], rotation=45 * (len(tokens) > 8))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("tokens in a call", color=FAINT)
    plain(axes, "y")


# ---- perplexities and the errors of weights -----------------------------------------------------

COLOURS = {"bfloat16": INK, "max": PEERS[0], "search": OURS[0]}
LABELS = {
    "max": 'MXFP4\nscale_rule="max"',
    "search": 'MXFP4\nscale_rule="search"',
    "Student's t, 5 degrees": "Student's t,\n5 degrees",
    "the trained experts": "the trained\nexperts",
}
APART = 0.17  # of a row: the runs of one model
SURE = 1.96  # standard errors: 95 in 100 of a normal distribution


def _quality(results: dict[str, Any]) -> Any:
    from matplotlib import pyplot

    settings, validation = results["settings"], results["text"]["validation"]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11.2, 4.6), dpi=160, width_ratios=(1.35, 1)
    )
    _perplexities(results["models"], left)
    _weights(results["weights"], right)
    _titles(
        figure,
        [
            "What MXFP4 experts cost a small GPT-OSS",
            f"{results['training']['parameters'] / 1e6:.1f} million parameters, "
            f"{settings['layers']} layers of {settings['experts']} experts, "
            f"top-{settings['experts_per_token']}; trained for {settings['steps']} steps on "
            "Python's documentation",
            f"judged on {results['windows']} windows of {settings['context']} bytes of "
            f"{validation['documents']} other documents; bars: {SURE} standard errors of the "
            "difference to bfloat16",
        ],
    )
    figure.subplots_adjust(left=0.135, right=0.975, top=0.7, bottom=0.13, wspace=0.46)
    return figure


def _perplexities(models: list[dict[str, Any]], axes: Any) -> None:
    names = list(dict.fromkeys(row["weights"] for row in models))
    base = models[0]["perplexity"]
    axes.axvline(base, color=FAINT, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
    ends = []
    for row in models:
        is_reference = row["weights"] == "bfloat16"
        runs = "compiled" if row["compiled"] else "uncompiled"
        y = names.index(row["weights"]) + (0 if is_reference else APART * (2 * row["compiled"] - 1))
        colour = COLOURS.get(row["weights"], INK)
        apart = row["to_bfloat16"]
        bar = SURE * apart["standard_error"]
        axes.errorbar(
            *(row["perplexity"], y),
            xerr=None if is_reference else bar,
            fmt="o", markersize=8, markeredgewidth=1.6, elinewidth=1.6, capsize=3, color=colour,
            markerfacecolor=colour if row["compiled"] or is_reference else "white",
        )  # fmt: skip
        moved = f"{100 * apart['perplexity'] / base:+.2f} %"
        text = f"{row['perplexity']:.3f}" if is_reference else moved
        annotate(axes, f"{text}  {runs}", (row["perplexity"] + bar, y), colour, "left")
        ends += [row["perplexity"] - bar, row["perplexity"] + bar]
    reach = max(max(ends) - min(ends), 1e-3 * base)
    axes.set_xlim(min(ends) - 0.08 * reach, max(ends) + 0.42 * reach)  # room for the labels
    _rows(axes, names, "perplexity of a byte")


def _weights(weights: dict[str, dict[str, dict[str, float]]], axes: Any) -> None:
    for y, rules in enumerate(weights.values()):
        decibels = sorted((error["snr_db"], rule) for rule, error in rules.items())
        axes.plot([value for value, _ in decibels], [y] * len(decibels), color=GRID, linewidth=4)
        for value, rule in decibels:
            colour = COLOURS.get(rule, INK)
            axes.plot(value, y, "o", markersize=8, color=colour, zorder=3)
            side = "right" if value == decibels[0][0] else "left"
            annotate(axes, f"{value:.1f}", (value, y), colour, side)
    axes.margins(x=0.35)
    _rows(axes, list(weights), "weights: signal to rounding noise, dB")


def annotate(
    axes: Any, text: str, at: tuple[float, float], colour: str, side: str, size: float = 9
) -> None:
    """Text beside a point, at its left or its right side."""
    axes.annotate(
        *(text, at),
        xytext=(9 if side == "left" else -9, 0), textcoords="offset points",
        horizontalalignment=side, verticalalignment="center", color=colour, fontsize=size,
    )  # fmt: skip


def _rows(axes: Any, names: Sequence[str], title: str) -> None:
    """A row for each name, the first on top."""
    axes.set_yticks(range(len(names)), [LABELS.get(name, name) for name in names])
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_title(title, loc="left", color=INK, fontweight="bold", fontsize=11)
    plain(axes, "x")
    axes.tick_params(axis="y", labelcolor=INK)


# ---- where the time of a start goes -------------------------------------------------------------

# Shades of a hue for what belongs together: before compiling, torch's compiler, this package.
PART_COLOURS = {
    "import": "#c3cad1", "load": "#98a3ad", "Dynamo": PEERS[0], "passes": OURS[0],
    "swizzling": OURS[1], "C++ compiler": PYTORCH, "guards": PEERS[3], "AOTAutograd": PEERS[1],
    "Inductor": PEERS[2], "other": INK,
}  # fmt: skip


def _start(results: dict[str, Any]) -> Any:
    from matplotlib import pyplot

    from benchmarks.start_report import LABELS

    settings, machine, starts = results["settings"], results["machine"], results["starts"]
    rows = list(dict.fromkeys((start["way"], start["layers"]) for start in starts))
    caches = list(dict.fromkeys(start["cache"] for start in starts))
    figure, panels = pyplot.subplots(
        1, len(caches), figsize=(11.2, 2.6 + 0.3 * len(rows)), dpi=160, sharey=True, squeeze=False
    )
    for axes, cache in zip(panels[0], caches, strict=True):
        ends = dict.fromkeys(rows, 0.0)
        for part, colour in PART_COLOURS.items():
            seconds = {
                (start["way"], start["layers"]): start["summary"]["parts"][part]
                for start in starts
                if start["cache"] == cache
            }
            at, left = [rows.index(row) for row in seconds], [ends[row] for row in seconds]
            axes.barh(at, list(seconds.values()), 0.72, left, color=colour, label=part)
            for row, more in seconds.items():
                ends[row] += more
        for y, end in enumerate(ends.values()):
            annotate(axes, f"{end:.0f}", (end, y), FAINT, "left")
        axes.set_title(f"{cache} caches", loc="left", color=INK, fontweight="bold", fontsize=11)
        axes.margins(x=0.12)
        axes.set_xlabel("seconds until the last token", color=FAINT)
        plain(axes, "x")
    axes = panels[0][0]
    axes.set_yticks(range(len(rows)), [f"{LABELS[way]}, {layers} layers" for way, layers in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, frameon=False, labelcolor=INK)
    kind = "wall time, gpt-oss-20b's widths" if settings["full_size"] else "CPU time, tiny widths"
    height = figure.get_figheight()
    about = (
        "From a new process to tokens of a GPT-OSS",
        f"{kind}; a prompt of {settings['prompt_tokens']} and 1 + {settings['new_tokens']} tokens; "
        f"{machine['cpu']}, {machine['threads']} threads; torch {machine['torch']}",
    )
    figure.text(0.02, 1 - 0.35 / height, about[0], fontsize=14, fontweight="bold", color=INK)
    figure.text(0.02, 1 - 0.65 / height, about[1], color=FAINT)
    figure.subplots_adjust(
        left=0.31, right=0.98, top=1 - 1.05 / height, bottom=1.05 / height, wspace=0.06
    )
    return figure


# ---- what all have ------------------------------------------------------------------------------


def plain(axes: Any, grid: str) -> None:
    """A faint grid across one axis, "x" or "y", and no frame."""
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def _titles(figure: Any, about: Sequence[str]) -> None:
    """A title and the lines below it."""
    figure.text(0.03, 0.945, about[0], fontsize=14, fontweight="bold", color=INK)
    for number, line in enumerate(about[1:]):
        figure.text(0.03, 0.9 - 0.04 * number, line, color=FAINT)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON, from a benchmark's --output")
    parser.add_argument("plot", type=Path, help="PNG or SVG to write")
    args = parser.parse_args(argv)
    draw(json.loads(args.results.read_text(encoding="utf-8")), args.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
