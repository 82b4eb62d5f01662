"""Runs some of the tests with every minor release of transformers, torch, Triton and `kernels`.

pip says which releases there are. Each runs in a process of its own, with the rest as it is
installed here. The outcomes go to docs/versions.json, and a table of them to README.md. It lies
among the tests and not the benchmarks because it runs tests and measures no time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from versions import cuda_stubs, releases, table
from versions.behaviours import BEHAVIOURS

ROOT = releases.ROOT
FOLDER = ROOT / "build" / "versions"
LIMIT = 1800  # seconds for the tests of one release


def run(package: str, version: str, behaviours: list[str]) -> dict[str, str]:
    """Install a release, run some tests and remove it; return behaviour -> outcome."""
    folder = FOLDER / f"{package}-{version}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        error = releases.install(package, version, folder)
        return {table.ERROR: error} if error else outcomes(package, version, folder, behaviours)
    finally:
        shutil.rmtree(folder)


def outcomes(package: str, version: str, folder: Path, behaviours: list[str]) -> dict[str, str]:
    path = [str(folder), str(ROOT / "tests"), str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        environment[variable] = str(FOLDER / variable)  # whose keys have the versions
    stubs = cuda_stubs.make(folder / "torch" / "lib", folder / "stubs")
    if stubs is not None:
        environment["LD_LIBRARY_PATH"] = str(stubs)
    output = folder / "outcomes.json"
    command = [sys.executable, "-m", "versions.behaviours", package, version, str(output)]
    command += behaviours
    try:
        with folder.with_name(f"{folder.name}.log").open("w") as log:
            subprocess.run(
                command, env=environment, cwd=ROOT, stdout=log, stderr=log, timeout=LIMIT
            )
        found: dict[str, str] = json.loads(output.read_text("utf-8"))
        return found
    except subprocess.TimeoutExpired:
        return {table.ERROR: f"the tests take more than {LIMIT} seconds"}
    except FileNotFoundError:
        return {table.ERROR: f"the tests cannot begin: see {folder.name}.log"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="versions", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("packages", nargs="*", help=f"of {', '.join(BEHAVIOURS)}; all by default")
    parser.add_argument("--only", action="append", metavar="VERSION", help="run this release alone")
    parser.add_argument("--behaviour", action="append", metavar="NAME", help="run this alone; the "
        "outcomes of others stay")  # fmt: skip
    args = parser.parse_args(argv)
    results: dict[str, Any] = table.read()
    for package in args.packages or BEHAVIOURS:
        found = releases.plan(releases.available(package), releases.oldest(package))
        old = results.get(package, {}).get("versions", {})
        is_part = args.only or args.behaviour
        done = {version: old[version] for version in found if is_part and version in old}
        for version in args.only or found:
            begun = time.monotonic()
            kept = old.get(version, {}) if args.behaviour else {}
            if not kept or table.ERROR in kept:
                kept, behaviours = {}, [*BEHAVIOURS[package]]
            else:
                behaviours = args.behaviour
            done[version] = kept | run(package, version, behaviours)
            told = table.summary(done[version])
            print(f"{package} {version}: {told} ({time.monotonic() - begun:.0f} s)", flush=True)
            results[package] = {"machine": machine(), "versions": done}
            table.write(results)  # at once: a run may be cut off


if __name__ == "__main__":
    main()
