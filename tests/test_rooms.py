"""The house of docs/architecture.md: ``make lint`` holds its doors; here is what it cannot see."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mxfp4_fx
from mxfp4_fx.ops.schemas import KERNELS
from mxfp4_fx.weights.swizzle import NATIVE

PACKAGE = Path(mxfp4_fx.__file__).parent
ROOT = PACKAGE.parent
ROOMS = ("core", "ops", "weights", "checkpoints", "passes", "huggingface")

# Each breaks one contract of pyproject.toml, named in the comment.
FORBIDDEN = {
    "core/options.py": "from mxfp4_fx.ops import target",  # Doors
    "weights/swizzle.py": "from mxfp4_fx.weights import store",  # No two files
    "checkpoints/journal.py": "from mxfp4_fx.ops import reference",  # Checkpoints
    "passes/lower_moe.py": "from mxfp4_fx.ops import cpu",  # Passes
    "ops/hub.py": "from mxfp4_fx.ops import pytorch",  # Kernels
    "weights/store.py": "import transformers",  # One room
}


def test_every_contract_breaks_when_it_is_broken(tmp_path: Path) -> None:
    copy = tmp_path / "mxfp4_fx"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for file, line in FORBIDDEN.items():
        (copy / file).write_text(f"{(copy / file).read_text()}\n\ndef _f():\n    {line}\n")
    linter = Path(sys.executable).with_name("lint-imports")
    ended = subprocess.run(
        [linter, "--no-cache", "--config", ROOT / "pyproject.toml"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )
    told = re.findall(r"^(\w.*) (KEPT|BROKEN)$", ended.stdout, re.MULTILINE)
    assert [state for _, state in told] == ["BROKEN"] * len(FORBIDDEN), ended.stdout + ended.stderr


def test_every_file_lies_in_a_room_or_is_what_people_call() -> None:
    folders = {path.parent.relative_to(PACKAGE).parts[:1] for path in PACKAGE.rglob("*.py")}
    assert folders == {(), *((room,) for room in ROOMS)}


@pytest.mark.parametrize("room", ROOMS)
def test_the_init_of_a_room_only_describes_it(room: str) -> None:
    tree = ast.parse((PACKAGE / room / "__init__.py").read_text())
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


def test_ops_know_nothing_of_fx() -> None:
    """import-linter knows torch as a whole."""
    files = [*(PACKAGE / "ops").rglob("*.py")]
    assert files
    found = [f.name for f in files if re.search(r"torch(\.| import .*\b)fx\b", f.read_text())]
    assert not found


def test_modules_that_are_loaded_by_name_are_in_their_room() -> None:
    for op in (
        place for table in (KERNELS, NATIVE) for ops in table.values() for place in ops.values()
    ):
        module, name = op.split(":")
        assert module.startswith("mxfp4_fx.ops.")
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file()
        assert re.search(
            rf"^def {name}\b", (ROOT / (module.replace(".", "/") + ".py")).read_text(), re.M
        )


def test_public_names_are_where_they_are_loaded_from() -> None:
    for name in mxfp4_fx.__all__:
        assert hasattr(mxfp4_fx, name)
        if module := mxfp4_fx._MODULES.get(name):
            assert getattr(importlib.import_module(module), name).__module__ == module
