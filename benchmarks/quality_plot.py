"""Draw results of ``examples/quality.py``: perplexities, and the errors of the weights.

python benchmarks/quality_plot.py benchmarks/results/quality.json build/quality.svg
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plot import FAINT, GRID, INK, OURS, PEERS, command, require

COLOURS = {"bfloat16": INK, "max": PEERS[0], "search": OURS[0]}
LABELS = {
    "bfloat16": "bfloat16",
    "max": 'MXFP4\nscale_rule="max"',
    "search": 'MXFP4\nscale_rule="search"',
    "Student's t, 5 degrees": "Student's t,\n5 degrees",
    "the trained experts": "the trained\nexperts",
}
APART = 0.17  # of a row: the runs of one model
SURE = 1.96  # standard errors: 95 in 100 of a normal distribution


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the plot to ``path``; its suffix, .png or .svg, is the format.

    Raises:
        PlotUnavailable: there is no matplotlib.
    """
    require()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    font = {"font.size": 10, "font.family": "sans-serif", "svg.hashsalt": "quality"}
    with pyplot.rc_context(font):
        figure, (left, right) = pyplot.subplots(
            *(1, 2), figsize=(11.2, 4.6), dpi=160, width_ratios=(1.35, 1)
        )
        _perplexities(results, left)
        _weights(results, right)
        _titles(results, figure)
        figure.subplots_adjust(left=0.135, right=0.975, top=0.7, bottom=0.13, wspace=0.46)
        figure.savefig(path, facecolor="white")
        pyplot.close(figure)


def _perplexities(results: dict[str, Any], axes: Any) -> None:
    rows = {row["weights"]: None for row in results["models"]}
    places = {weights: len(rows) - 1 - number for number, weights in enumerate(rows)}
    base = results["models"][0]["perplexity"]
    axes.axvline(base, color=FAINT, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
    for row in results["models"]:
        weights, compiled = row["weights"], row["compiled"]
        quantized = weights != "bfloat16"
        y = places[weights] + (APART * (-1 if compiled else 1) if quantized else 0)
        colour = COLOURS.get(weights, INK)
        apart = row["to_bfloat16"]
        axes.errorbar(
            *(row["perplexity"], y),
            xerr=SURE * apart["standard_error"] if quantized else None,
            fmt="o",
            markersize=8,
            color=colour,
            markerfacecolor=colour if compiled or not quantized else "white",
            markeredgewidth=1.6,
            elinewidth=1.6,
            capsize=3,
            zorder=3,
        )
        runs = "compiled" if compiled else "uncompiled"
        text = f"{row['perplexity']:.3f}  {runs}"
        if quantized:
            text = f"{100 * apart['perplexity'] / base:+.2f} %  {runs}"
        axes.annotate(
            *(text, (row["perplexity"] + SURE * apart["standard_error"], y)),
            xytext=(9, 0),
            textcoords="offset points",
            verticalalignment="center",
            color=colour,
            fontsize=9,
        )
    axes.set_yticks(list(places.values()), [LABELS.get(name, name) for name in places])
    axes.set_ylim(-0.55, len(places) - 0.45)
    bars = [SURE * row["to_bfloat16"]["standard_error"] for row in results["models"]]
    ends = [(row["perplexity"], bar) for row, bar in zip(results["models"], bars, strict=True)]
    low, high = min(at - bar for at, bar in ends), max(at + bar for at, bar in ends)
    reach = max(high - low, 1e-3 * base)
    axes.set_xlim(low - 0.08 * reach, high + 0.42 * reach)  # room for the labels
    axes.set_title("perplexity of a byte", loc="left", color=INK, fontweight="bold", fontsize=11)
    _plain(axes)


def _weights(results: dict[str, Any], axes: Any) -> None:
    names = list(results["weights"])
    for number, name in enumerate(names):
        y = len(names) - 1 - number
        decibels = {rule: error["snr_db"] for rule, error in results["weights"][name].items()}
        axes.plot([*decibels.values()], [y] * len(decibels), color=GRID, linewidth=4, zorder=1)
        order = sorted(decibels, key=decibels.__getitem__)
        for rule, value in decibels.items():
            axes.plot(value, y, "o", markersize=8, color=COLOURS.get(rule, INK), zorder=3)
            first = rule == order[0]
            axes.annotate(
                *(f"{value:.1f}", (value, y)),
                xytext=(-9 if first else 9, 0),
                textcoords="offset points",
                horizontalalignment="right" if first else "left",
                verticalalignment="center",
                color=COLOURS.get(rule, INK),
                fontsize=9,
            )
    axes.set_yticks(range(len(names) - 1, -1, -1), [LABELS.get(name, name) for name in names])
    axes.set_ylim(-0.55, len(names) - 0.45)
    axes.margins(x=0.35)
    title = "weights: signal to rounding noise, dB"
    axes.set_title(title, loc="left", color=INK, fontweight="bold", fontsize=11)
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, length=0)
    axes.tick_params(axis="y", labelcolor=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def _titles(results: dict[str, Any], figure: Any) -> None:
    settings, validation = results["settings"], results["text"]["validation"]
    figure.text(
        *(0.02, 0.93, "What MXFP4 experts cost a small GPT-OSS"),
        fontsize=14,
        fontweight="bold",
        color=INK,
    )
    figure.text(
        *(0.02, 0.87),
        f"{results['training']['parameters'] / 1e6:.1f} million parameters, {settings['layers']} "
        f"layers of {settings['experts']} experts, top-{settings['experts_per_token']}; trained "
        f"for {settings['steps']} steps on Python's documentation",
        color=FAINT,
    )
    figure.text(
        *(0.02, 0.815),
        f"judged on {results['windows']} windows of {settings['context']} bytes of "
        f"{validation['documents']} other documents; bars: {SURE} standard errors of the "
        "difference to bfloat16",
        color=FAINT,
    )


def main(argv: list[str] | None = None) -> int:
    return command(argv, __doc__, "examples/quality.py", draw)


if __name__ == "__main__":
    raise SystemExit(main())
