"""Which releases there are, and how one is put in front of the installed packages."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
# A minor version -> what it needs and does not declare.
UNDECLARED = {"triton==3.6": "numpy<2.4"}  # its interpreter takes one-element arrays for numbers


def oldest(package: str) -> str:
    """Return the oldest version that pyproject.toml allows, in full: "5.8.0" for "5.8"."""
    declared = (ROOT / "pyproject.toml").read_text("utf-8")
    found = re.search(rf'"{package}>=([\d.]+)', declared)
    assert found, f"pyproject.toml names no oldest {package}"
    return ".".join([*found[1].split("."), "0", "0"][:3])


def available(package: str) -> list[str]:
    """Return the releases that pip finds for this machine, pre-releases excluded."""
    listed = re.search(r"Available versions: (.*)", _pip("index", "versions", package).stdout)
    assert listed, f"pip finds no releases of {package}"
    return listed[1].split(", ")


def plan(releases: Iterable[str], oldest: str) -> list[str]:
    """Return the oldest release that is supported, and the last one of each minor version."""
    last: dict[tuple[int, ...], Version] = {}
    for release in map(Version, releases):
        minor = release.release[:2]
        if release >= Version(oldest):
            last[minor] = max(release, last.get(minor, release))
    # "2.13.0+cpu" is a build of 2.13.0.
    found = {Version(version.public) for version in last.values()} | {Version(oldest)}
    return [str(version) for version in sorted(found)]


def install(package: str, version: str, folder: Path) -> str | None:
    """Install a release into a folder, with what it needs in another version than the one here.

    Returns:
        What pip has against it, or None.
    """
    error, tried = _add(f"{package}=={version}", folder), set[str]()
    undeclared = UNDECLARED.get(f"{package}=={version.rpartition('.')[0]}")
    if error is None and undeclared:
        error = _add(undeclared, folder)
    while error is None and (missing := unmet(folder) - tried):
        tried |= missing
        errors = {requirement: _add(requirement, folder) for requirement in sorted(missing)}
        # transformers can do without the releases of `kernels` that it takes.
        wanted = (e for name, e in errors.items() if not name.startswith("kernels"))
        error = next(filter(None, wanted), None)
    return error


def unmet(folder: Path) -> set[str]:
    """Return the requirements of what is in a folder that neither it nor this environment meets."""
    found: set[str] = set()
    for distribution in importlib.metadata.distributions(path=[str(folder)]):
        for requirement in map(Requirement, distribution.requires or ()):
            name, marker = requirement.name, requirement.marker
            extras = ("", "kernels", "hub-kernels")
            if marker is not None and not any(marker.evaluate({"extra": e}) for e in extras):
                continue
            if re.match(r"nvidia-|cuda-", name):  # gigabytes, which `cuda_stubs` does without
                continue
            there = importlib.metadata.distributions(name=name, path=[str(folder), *sys.path])
            first = next(iter(there), None)
            if first is None or not requirement.specifier.contains(first.version, True):
                found.add(f"{name}{requirement.specifier}")
    return found


def _add(requirement: str, folder: Path) -> str | None:
    options = ("--no-deps", "--no-compile", "--upgrade", "--target", folder)
    done = _pip("install", *options, requirement)
    if done.returncode == 0:
        return None
    if constraint := re.search(r"\(constraint\) (\S+)", done.stdout + done.stderr):
        return f"pip was constrained to {constraint[1]}"
    said = re.findall(r"^ERROR: (.*)", done.stderr, re.MULTILINE)
    return f"{requirement}: {said[0] if said else 'pip fails'}"


def _pip(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", *arguments]
    return subprocess.run(command, capture_output=True, text=True)
