"""What the command lines share: arguments, the log on stderr, and the files at the end."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import plot
from benchmarks.timing import Clock

Log = Callable[[str], None]


def parser(about: str | None) -> argparse.ArgumentParser:
    """A parser with the arguments of all; ``about`` is the program's docstring."""
    made = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    made.add_argument("--output", type=Path, help="JSON with all results")
    made.add_argument("--silent", action="store_true", help="no progress on stderr")
    return made


def numbers(value: str) -> tuple[int, ...]:
    """Numbers with commas between, in ascending order."""
    return tuple(sorted({int(part) for part in value.split(",")}))


def names(value: str) -> tuple[str, ...]:
    """Names with commas between."""
    return tuple(part for part in value.split(",") if part)


def start(args: argparse.Namespace, clock: Clock = time.perf_counter) -> Log:
    """The log. A plot that cannot be drawn stops the program now, not after minutes."""
    if getattr(args, "plot", None):
        plot.require()
    # Dynamo tells users that transformers caches a version check; it is nothing to act upon.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    started = clock()

    def log(message: str) -> None:
        if not args.silent:
            print(f"-- {clock() - started:4.0f} s  {message}", file=sys.stderr, flush=True)

    return log


def write(path: Path | None, results: dict[str, Any]) -> None:
    """Write JSON in one step: who is interrupted meanwhile leaves what was there before."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    room = path.with_name(path.name + ".part")
    room.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(room, path)


def finish(args: argparse.Namespace, results: dict[str, Any], text: str) -> None:
    """Print, write and draw what was found out."""
    print(text)
    write(args.output, results)
    if getattr(args, "plot", None):
        plot.draw(results, args.plot)
