"""Stub libraries, with which a CUDA build of torch runs on a machine that has no CUDA.

Some releases of torch are for CUDA only. Their CPU part is complete, but the loader wants the CUDA
libraries, which are some gigabytes. One small library takes the places of all: each function that
torch wants of them returns "no device".
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

_NO_DEVICE = 100  # cudaErrorNoDevice


def make(libraries: Path, folder: Path) -> Path | None:
    """Write stubs for the libraries that those in a directory need and the machine lacks.

    Args:
        libraries: the directory, such as ``torch/lib``.
        folder: where to write, for ``LD_LIBRARY_PATH``.

    Returns:
        ``folder``; None if nothing is missing.
    """
    files = sorted(libraries.glob("*.so*"))
    needed = _output("ldd", *files) if files else ""
    missing = set(re.findall(r"^\s*(\S+) => not found", needed, re.MULTILINE))
    if not missing:
        return None
    there = {Path(path) for path in re.findall(r"(/\S+) \(0x", needed)}
    defined = _symbols("--defined-only", {*files, *there})
    wanted = _symbols("--undefined-only", files)
    names = sorted(wanted.keys() - defined.keys())
    versions: dict[str, list[str]] = {}  # which the loader compares
    for name in names:
        if wanted[name]:
            versions.setdefault(wanted[name], []).append(name)
    folder.mkdir(parents=True)
    source, script, stub = folder / "stubs.c", folder / "stubs.map", folder / "stubs.so"
    source.write_text("".join(f"int {name}(void) {{ return {_NO_DEVICE}; }}\n" for name in names))
    nodes = (f"{version} {{ {'; '.join(held)}; }};\n" for version, held in versions.items())
    script.write_text("".join(nodes))
    options = ["-x", "c", "-w", "-fno-builtin", "-shared", "-fPIC"]
    options += [f"-Wl,--version-script={script}"] if versions else []
    _output(os.environ.get("CXX", "g++"), *options, source, "-o", stub)
    for name in missing:
        (folder / name).symlink_to(stub.name)
    return folder


def _symbols(which: str, files: Iterable[Path]) -> dict[str, str]:
    """Return the names of dynamic symbols -> their versions or "", without weak ones."""
    listed = _output("nm", "--dynamic", which, *files)
    found = re.findall(r"^[\da-f]* +[^w ] (\w+)(?:@@?(\S+))?$", listed, re.MULTILINE)
    return dict(found)


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
