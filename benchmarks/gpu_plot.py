"""Draw results of ``benchmarks/gpu.py``: time over the number of tokens, a panel for each E.

python benchmarks/gpu_plot.py build/gpu.json build/gpu.svg
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plot import FAINT, FLOOR_FILL, GRID, INK, MARKERS, OURS, PEERS, command, require

COLOURS = {
    "ours": OURS[0],
    "triton_kernels": PEERS[0],
    "triton_kernels_unsplit": PEERS[1],
    "grouped_mm": PEERS[2],
    "batched_mm": PEERS[3],
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the plot to ``path``; its suffix, .png or .svg, is the format.

    Raises:
        PlotUnavailable: there is no matplotlib.
    """
    require()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({row["experts"] for row in results["rows"]})
    with pyplot.rc_context({"font.size": 10, "font.family": "sans-serif", "svg.hashsalt": "gpu"}):
        figure, axes = pyplot.subplots(
            *(1, max(len(panels), 1)),
            figsize=(12.4, 5.8), dpi=160, sharey=True, squeeze=False,
        )  # fmt: skip
        for axis, experts in zip(axes[0], panels, strict=False):
            _panel(results, axis, experts)
        _titles(results, figure)
        handles = {
            handle.get_label(): handle
            for axis in axes[0]
            for handle in axis.get_legend_handles_labels()[0]
        }
        if handles:
            figure.legend(
                *(list(handles.values()), list(handles)),
                loc="lower center", ncols=min(len(handles), 6), frameon=False, labelcolor=INK,
            )  # fmt: skip
        figure.subplots_adjust(left=0.06, right=0.985, top=0.8, bottom=0.2, wspace=0.06)
        figure.savefig(path, facecolor="white")
        pyplot.close(figure)


def _panel(results: dict[str, Any], axes: Any, experts: int) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    rows = [row for row in results["rows"] if row["experts"] == experts]
    tokens = [row["tokens"] for row in rows]
    floors = [(row["tokens"], 1e3 * row["floor"]["ms"]) for row in rows if row["floor"]]
    if floors:
        x, y = ([floor[i] for floor in floors] for i in range(2))
        axes.fill_between(x, min(y) / 2, y, color=FLOOR_FILL, linewidth=0)
        axes.plot(x, y, color=FAINT, linewidth=1.4, linestyle=(0, (5, 3)), label="floor")
    names = [name for name in results["contenders"] if name != "ours_again"]
    for number, name in enumerate(names):
        points = [(row["tokens"], row["ms"][name]) for row in rows if name in row["ms"]]
        if not points:
            continue
        x = [at for at, _ in points]
        low, middle, high = (
            [1e3 * stats[part] for _, stats in points] for part in ("q1", "median", "q3")
        )
        is_ours = name == "ours"
        colour = COLOURS.get(name, INK)
        axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
        axes.plot(
            *(x, middle),
            color=colour,
            linewidth=2.6 if is_ours else 1.5,
            marker=MARKERS[number % len(MARKERS)],
            markersize=6 if is_ours else 4.5,
            markeredgecolor="white",
            markeredgewidth=0.7,
            zorder=4 if is_ours else 3,
            label=results["contenders"][name]["label"],
        )
    axes.set_title(f"{experts} experts", loc="left", color=INK, fontweight="bold", fontsize=11)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, [str(count) for count in tokens], rotation=45)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
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
    title = "Microseconds for one GPT-OSS mixture-of-experts MLP with its router"
    if not results["complete"]:
        title += " (incomplete run)"
    figure.text(0.03, 0.945, title, fontsize=14, fontweight="bold", color=INK)
    figure.text(
        *(0.03, 0.9),
        f"top-{settings['top_k']}, hidden {settings['hidden']}, intermediate "
        f"{settings['intermediate']}, bfloat16; weights from memory, in CUDA graphs; "
        f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}; "
        "medians, bands: quartiles",
        color=FAINT,
    )


def main(argv: list[str] | None = None) -> int:
    return command(argv, __doc__, "benchmarks/gpu.py", draw)


if __name__ == "__main__":
    raise SystemExit(main())
