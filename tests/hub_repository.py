"""Kernel repositories on disk, as the kernels library loads them through ``LOCAL_KERNELS``."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mxfp4_fx.ops import hub_loader

PACKAGE = Path(__file__).with_name("hub_package.py")


def write(folder: Path, source: str | None = None) -> Path:
    """A repository whose package is ``source``, that of ``hub_package.py`` unless given."""
    variant = folder / "build" / "torch-universal"
    variant.mkdir(parents=True)
    (variant / "__init__.py").write_text(source or PACKAGE.read_text("utf-8"), "utf-8")
    metadata = {
        "name": "gpt-oss-triton-kernels",
        "id": "_gpt_oss_triton_kernels_" + "".join(c for c in str(folder) if c.isalnum()),
        "version": hub_loader.VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata), "utf-8")
    return folder


@contextmanager
def served(folder: Path) -> Iterator[None]:
    """kernels="hub" are those of the repository in ``folder``, on a CPU too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_KERNELS", f"{hub_loader.REPOSITORY}={folder}")
        patch.setattr(hub_loader, "DEVICES", ("cpu", *hub_loader.DEVICES))
        patch.setattr(hub_loader, "packages", hub_loader.packages.anew())
        yield


@functools.cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    directory = tempfile.TemporaryDirectory()
    write(Path(directory.name) / "repository")
    return directory


def standard() -> Path:
    """One repository with ``hub_package.py`` for all tests of a process."""
    return Path(_directory().name) / "repository"
