"""The picture of ``benchmarks.full_size``: a token's parts against reading, and who is how fast."""

from __future__ import annotations

from typing import Any

from benchmarks import plot
from benchmarks.full_size_turns_report import LABELS, bytes_of_part
from benchmarks.token_parts import PARTS

COLOURS = {
    "ours": plot.OURS[0],
    "uncompiled": plot.PYTORCH,
    "llama-bf16": plot.PEERS[0],
    "llama-q8_0": plot.PEERS[1],
    "vllm": plot.PEERS[2],
}
APART = 0.8  # of the room of a group: the bars in it


def figure(results: dict[str, Any]) -> Any:
    from matplotlib import pyplot

    turns, machine, settings = results["turns"], results["machine"], results["settings"]
    contexts = list(turns["summary"]["parts"])
    rows = max(len(contexts), 1)
    made = pyplot.figure(figsize=(11.2, 2.6 + 2.2 * rows), dpi=160)
    grid = made.add_gridspec(rows, 2, width_ratios=(1, 1))
    for row, context in enumerate(contexts):
        _parts(turns, context, made.add_subplot(grid[row, 0]))
    _rates(turns, made.add_subplot(grid[:, 1]))
    read = turns["summary"]["read_rate"]["median"]
    about = (
        "gpt-oss at full size on a CPU"
        if settings["layers"] == 24
        else f"A GPT-OSS of {settings['layers']} layers on a CPU",
        f"{settings['layers']} layers, vocabulary {settings['vocab']}; {machine['cpu']}, "
        f"{machine['threads']} threads; torch {machine['torch']}; memory is read at "
        f"{read / 1e9:.1f} GB/s",
    )
    height = made.get_figheight()
    made.text(0.02, 1 - 0.4 / height, about[0], fontsize=14, fontweight="bold", color=plot.INK)
    made.text(0.02, 1 - 0.7 / height, about[1], color=plot.FAINT)
    made.subplots_adjust(
        left=0.1, right=0.97, top=1 - 1.25 / height, bottom=0.75 / height, wspace=0.5, hspace=0.55
    )
    return made


def _parts(turns: dict[str, Any], context: str, axes: Any) -> None:
    """A bar for each part of a token, and behind it the time to read its bytes."""
    read, found = turns["summary"]["read_rate"]["median"], turns["summary"]["parts"][context]
    times = [1e3 * found[part]["median"] for part in PARTS]
    floors = [1e3 * bytes_of_part(turns, part, context) / read for part in PARTS]
    at = range(len(PARTS))
    axes.barh(at, floors, APART, color=plot.FLOOR_BAR, label="reading its bytes")
    axes.barh(at, times, 0.45 * APART, color=plot.OURS[0], label="measured")
    for y, (time, floor) in enumerate(zip(times, floors, strict=True)):
        text = f"{time:.1f} of {floor:.1f}"
        plot.annotate(axes, text, (max(time, floor), y), plot.FAINT, "left")
    axes.set_yticks(at, PARTS)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    title = f"ms of a token behind {context}"
    axes.set_title(title, loc="left", color=plot.INK, fontweight="bold", fontsize=11)
    _legend(axes)
    plot.plain(axes, "x")
    axes.tick_params(axis="y", labelcolor=plot.INK)


def _rates(turns: dict[str, Any], axes: Any) -> None:
    """Tokens a second by cell, a bar for each way."""
    rates = turns["summary"]["tokens_per_second"]
    ways = [way for way in LABELS if way in rates]
    settings = turns["settings"]
    cells = [f"prefill {count}" for count in settings["prefill"]]
    cells += [f"decode {c} x {b}" for b in settings["batches"] for c in settings["contexts"]]
    high = APART / max(len(ways), 1)
    for number, way in enumerate(ways):
        places = [place for place, cell in enumerate(cells) if cell in rates[way]]
        values = [rates[way][cells[place]]["median"] for place in places]
        at = [place + (number - (len(ways) - 1) / 2) * high for place in places]
        axes.barh(at, values, 0.9 * high, color=COLOURS[way], label=LABELS[way])
        for y, value in zip(at, values, strict=True):
            plot.annotate(axes, f"{value:.3g}", (value, y), COLOURS[way], "left", 7.5)
    axes.set_yticks(range(len(cells)), cells)
    axes.set_ylim(len(cells) - 0.45, -0.55)
    axes.margins(x=0.12)
    title = "tokens a second: prompts; tokens behind a context x sequences"
    axes.set_title(title, loc="right", color=plot.INK, fontweight="bold", fontsize=11)
    _legend(axes)
    plot.plain(axes, "x")
    axes.tick_params(axis="y", labelcolor=plot.INK)


def _legend(axes: Any) -> None:
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.4, -0.05), ncols=3, frameon=False,
        labelcolor=plot.INK, fontsize=9,
    )  # fmt: skip
