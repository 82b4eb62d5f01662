"""The outcomes: as JSON, and as a table in README."""

from __future__ import annotations

import itertools
import json
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from packaging.version import Version

from versions.behaviours import BEHAVIOURS, PASSES
from versions.releases import ROOT

RESULTS, README = ROOT / "docs" / "versions.json", ROOT / "README.md"
BEGIN, END = "<!-- versions: `make versions` writes this -->\n", "<!-- versions end -->\n"
WIDTH = 110  # of README's lines
ERROR = "error"  # the key of an outcome that is about all behaviours


def read() -> dict[str, Any]:
    """Return package -> {"machine": its facts, "versions": version -> behaviour -> outcome}."""
    found: dict[str, Any] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    return found


def write(results: Mapping[str, Any]) -> None:
    """Write the JSON, and the table where README has its place."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    before, rest = README.read_text("utf-8").split(BEGIN)
    README.write_text(before + BEGIN + markdown(results) + END + rest.split(END)[1], "utf-8")


def summary(outcomes: Mapping[str, str], behaviours: Iterable[str] = ()) -> str:
    """Return what of a version passes, and which of these behaviours were not run."""
    if ERROR in outcomes:
        return f"not run: {outcomes[ERROR]}"
    failed = [behaviour for behaviour, outcome in outcomes.items() if outcome != PASSES]
    told = f"all but {', '.join(failed)}" if failed else "all"
    missing = [behaviour for behaviour in behaviours if behaviour not in outcomes]
    told = "nothing" if len(failed) == len(outcomes) else told
    return f"{told}; not run: {', '.join(missing)}" if missing else told


def markdown(results: Mapping[str, Any]) -> str:
    """Return the table: a line for neighbouring versions of which the same passes; and a legend."""
    lines = ["| package | versions | what passes |\n", "|---|---|---|\n"]
    for package in (name for name in BEHAVIOURS if name in results):
        versions = results[package]["versions"].items()
        told = {version: summary(found, BEHAVIOURS[package]) for version, found in versions}
        for what, same in itertools.groupby(sorted(told, key=Version), told.__getitem__):
            lines.append(f"| {package} | {', '.join(same)} | {what} |\n")
    legend = textwrap.fill(f"What is run: {'; '.join(map(_shown, BEHAVIOURS))}.", WIDTH)
    return "".join(lines) + f"\n{legend}\n"


def _shown(package: str) -> str:
    shown = [*BEHAVIOURS[package]]
    for other, less in BEHAVIOURS.items():
        if less.keys() < BEHAVIOURS[package].keys():
            shown = [f"all that is run of {other}", *(name for name in shown if name not in less)]
    return f"of *{package}* {', '.join(shown)}"
