"""The wheel and the sdist: what is in them, and that they work without the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mxfp4_fx

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mxfp4_fx"
BUILD = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", "dist")
SDIST = "import setuptools.build_meta as build; build.build_sdist('dist')"
# Compiles experts with what lies in the folder, by the name of the backend alone.
USE = """
import sys
import torch

sys.path.insert(0, sys.argv[1])
import mxfp4_fx
from mxfp4_fx import cli
from importlib.metadata import distribution, entry_points

assert mxfp4_fx.__file__.startswith(sys.argv[1]), mxfp4_fx.__file__
(command,) = entry_points(group="console_scripts", name="mxfp4_fx")
assert command.load() is cli.main
found = distribution("mxfp4_fx")
assert found.locate_file("").samefile(sys.argv[1])
assert found.version == mxfp4_fx.__version__
sys.exit(cli.main(["doctor", "--device", "cpu"]))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run Python apart from the source tree."""
    ended = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, without what is built in it, and what is made of it: dist/."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(PACKAGE, copy / "mxfp4_fx", ignore=shutil.ignore_patterns("__pycache__"))
    run(*BUILD, ".", cwd=copy)
    run("-c", SDIST, cwd=copy)
    return copy


def needed() -> set[str]:
    """All files of the package: Python, the C++ sources, the tables of tiles, py.typed."""
    files = {path for path in PACKAGE.rglob("*") if path.is_file()}
    return {str(f.relative_to(ROOT)) for f in files if "__pycache__" not in f.parts}


@pytest.mark.exhaustive
def test_both_hold_every_file_of_the_package(folder: Path) -> None:
    (wheel,) = (folder / "dist").glob("*.whl")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    assert any(name.endswith("cpu_kernels/weights.cpp") for name in needed())
    assert any(name.endswith("sm_90.json") for name in needed())
    with zipfile.ZipFile(wheel) as opened:
        assert needed() == {n for n in opened.namelist() if ".dist-info/" not in n}
        opened.extractall(folder / "unpacked")
    with tarfile.open(sdist) as packed:
        top = f"mxfp4_fx-{mxfp4_fx.__version__}"
        held = {name.removeprefix(f"{top}/") for name in packed.getnames()}
        assert needed() | {"LICENSE", "README.md", "pyproject.toml"} <= held


@pytest.mark.exhaustive
def test_a_wheel_of_the_sdist_works_where_nothing_else_of_it_is(
    folder: Path, tmp_path: Path
) -> None:
    """Its C++ sources count, too: a cached library is found by a hash of them."""
    run(*BUILD, next((folder / "dist").glob("*.tar.gz")), cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    place = tmp_path / "place"
    zipfile.ZipFile(wheel).extractall(place)
    told = run("-c", USE, place, cwd=tmp_path)
    if sys.platform == "linux":
        assert "cpu: cpu kernels" in told
    assert told.endswith("usable: cpu\n")
