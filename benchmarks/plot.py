"""Draw results of ``benchmarks/cpu.py``: time over the number of tokens, both logarithmic.

python benchmarks/plot.py benchmarks/results/cpu.json build/cpu.png
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

INK, FAINT, GRID = "#1f2933", "#6b7680", "#e3e7eb"
FLOOR_FILL = "#eef1f4"
# Distinct in hue and lightness, for readers who do not tell hues apart too.
OURS = ("#0b57a4", "#2389c7", "#2a9d9d", "#5f8ea0", "#7c8fa0")
PYTORCH = "#7a5ba8"
PEERS = ("#c2410c", "#e08a3c", "#9a6b1f", "#b0475e")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LABEL_STEP = 0.052  # of the axis: the height of a line of text


class PlotUnavailable(Exception):
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

    with pyplot.rc_context({"font.size": 10, "font.family": "sans-serif", "svg.hashsalt": "cpu"}):
        figure, axes = pyplot.subplots(figsize=(9.6, 5.6), dpi=160)
        _draw(results, figure, axes)
        figure.savefig(path, facecolor="white")
        pyplot.close(figure)


def _draw(results: dict[str, Any], figure: Any, axes: Any) -> None:
    rows = results["layer"]
    tokens = [row["tokens"] for row in rows]
    ends: list[tuple[float, str, str, str]] = []  # last value, label, colour, weight

    floors = [row["floor"]["ms"] for row in rows if row["floor"]]
    if floors:
        bottom = min(floors) / 2
        axes.fill_between(tokens, bottom, floors, color=FLOOR_FILL, linewidth=0)
        axes.plot(tokens, floors, color=FAINT, linewidth=1.4, linestyle=(0, (5, 3)))
        ends.append((floors[-1], "floor: memory or multiplying", FAINT, "normal"))
    for number, (name, contender, colour, main) in enumerate(_styled(results)):
        points = [(row["tokens"], row["ms"][name]) for row in rows if name in row["ms"]]
        if not points:
            continue
        x = [at for at, _ in points]
        median = [stats["median"] for _, stats in points]
        if main or contender["kind"] == "transformers":  # more bands than these hide each other
            low, high = ([stats[quartile] for _, stats in points] for quartile in ("q1", "q3"))
            axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
        axes.plot(
            *(x, median),
            color=colour,
            linewidth=2.6 if main else 1.5,
            marker=MARKERS[number % len(MARKERS)],
            markersize=6 if main else 4.5,
            markeredgecolor="white",
            markeredgewidth=0.7,
            zorder=4 if main else 3,
        )
        if x[-1] == tokens[-1]:
            ends.append((median[-1], contender["label"], colour, "bold" if main else "normal"))
        else:  # a line that ends early has its label there
            axes.annotate(
                *(contender["label"], (x[-1], median[-1])),
                xytext=(2, 9),
                textcoords="offset points",
                horizontalalignment="right",
                color=colour,
                fontsize=9,
            )
    if floors:
        axes.set_ylim(bottom=bottom, top=1.4 * axes.get_ylim()[1])
    _axes(axes, tokens)
    _titles(results, figure)
    figure.subplots_adjust(left=0.075, right=0.72, top=0.835, bottom=0.105)
    _end_labels(axes, ends)


def _styled(results: dict[str, Any]) -> list[tuple[str, dict[str, Any], str, bool]]:
    """(name, contender, colour, whether it is the one that the backend chooses), in that order."""
    styled, ours, peers = [], iter(OURS), iter(PEERS)
    for name, contender in results["contenders"].items():
        colour = {"native": ours, "transformers": peers}.get(contender["kind"])
        main = name == results["path"]["contender"]
        styled.append((name, contender, PYTORCH if colour is None else next(colour, INK), main))
    return styled


def _axes(axes: Any, tokens: Sequence[int]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, [str(count) for count in tokens])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    if len(tokens) > 1:
        axes.set_xlim(tokens[0] / 1.15, tokens[-1] * 1.08)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("tokens in a call", color=FAINT)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def _titles(results: dict[str, Any], figure: Any) -> None:
    machine, settings = results["machine"], results["settings"]
    figure.text(
        *(0.03, 0.945, "Milliseconds for one GPT-OSS mixture-of-experts MLP"),
        fontsize=14,
        fontweight="bold",
        color=INK,
    )
    sizes = (
        f"{settings['experts']} experts, top-{settings['top_k']}, hidden {settings['hidden']}, "
        f"intermediate {settings['intermediate']}; weights from memory"
    )
    cpu = f"{machine['cpu']}, {machine['threads']} threads; torch {machine['torch']}"
    bands = "bands: quartiles" if results["rounds"] > 1 else "one round"
    figure.text(0.03, 0.905, sizes, color=FAINT)
    figure.text(0.03, 0.87, f"{cpu}; medians of {results['rounds']} rounds, {bands}", color=FAINT)


def _end_labels(axes: Any, ends: list[tuple[float, str, str, str]]) -> None:
    """Each line's label right of its end, moved apart where they would overlap."""
    if not ends:
        return
    low, high = (math.log(limit) for limit in axes.get_ylim())
    ends = sorted(ends, key=lambda end: end[0])
    heights = [(math.log(end[0]) - low) / (high - low) for end in ends]
    wanted = list(heights)
    for _ in range(200):  # neighbours push each other until all have room
        for i in range(len(heights) - 1):
            missing = LABEL_STEP - (heights[i + 1] - heights[i])
            if missing > 1e-6:
                heights[i] -= missing / 2
                heights[i + 1] += missing / 2
    for height, at, (_, label, colour, weight) in zip(heights, wanted, ends, strict=True):
        axes.plot(
            *((1.005, 1.03), (at, height)),
            transform=axes.transAxes,
            color=colour,
            linewidth=0.7,
            alpha=0.6,
            clip_on=False,
        )
        axes.text(
            *(1.037, height, label),
            transform=axes.transAxes,
            color=colour,
            fontweight=weight,
            fontsize=9,
            verticalalignment="center",
        )


def main(argv: list[str] | None = None) -> int:
    return command(argv, __doc__, "benchmarks/cpu.py", draw)


def command(
    argv: list[str] | None, about: str, source: str, draw: Callable[[dict[str, Any], Path], None]
) -> int:
    """The command line of a plot of what ``source`` measured."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("results", type=Path, help=f"JSON, from {source} --output")
    parser.add_argument("plot", type=Path, help="PNG or SVG to write")
    args = parser.parse_args(argv)
    try:
        draw(json.loads(args.results.read_text(encoding="utf-8")), args.plot)
    except PlotUnavailable as error:
        raise SystemExit(str(error)) from None
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
