"""The package imports and compiles without its optional packages, and importing it loads none.

Each test starts fresh interpreters, away from the source tree: what is installed is what is tested.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from combinations import exhaustive

OPTIONAL = ("transformers", "triton", "kernels")

# Hides packages in an interpreter as if they were not installed, from `import` and `find_spec`.
HIDE = """
from importlib.machinery import PathFinder

def hide(packages):
    find = PathFinder.find_spec
    def find_spec(name, *args, **kwargs):
        return None if name.partition(".")[0] in packages else find(name, *args, **kwargs)
    PathFinder.find_spec = staticmethod(find_spec)
"""

COMPILE = """
import torch

model = torch.nn.Linear(64, 8)
x = torch.randn(3, 64)
compiled = torch.compile(model, backend="mxfp4", options={"inner": "eager"})
assert torch.equal(compiled(x), model(x))
"""


def run(code: str, cwd: Path) -> str:
    """What `code` prints in a fresh interpreter; fails the test with its errors if it fails."""
    ended = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize(
    "hidden", [OPTIONAL, *(exhaustive([name]) for name in OPTIONAL)], ids="+".join
)
def test_compiles_without_optional_packages(hidden: list[str], tmp_path: Path) -> None:
    run(f"{HIDE}\nhide({hidden!r})\nimport mxfp4_fx\n{COMPILE}", tmp_path)


def test_backend_is_found_without_an_import(tmp_path: Path) -> None:
    run(COMPILE, tmp_path)


def test_import_loads_nothing_heavy(tmp_path: Path) -> None:
    """Compared with what `import torch` alone loads."""
    code = """
import json, sys
import torch
before = set(sys.modules)
import mxfp4_fx
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    loaded = json.loads(run(code, tmp_path))
    heavy = (*OPTIONAL, "safetensors", "torch._inductor")
    assert not [m for m in loaded if m.startswith(tuple(f"{h}." for h in heavy)) or m in heavy]


def test_hide_hides_what_is_installed(tmp_path: Path) -> None:
    code = f"""{HIDE}
import importlib.util
hide(["pytest"])
assert importlib.util.find_spec("pytest") is None
try:
    import pytest
except ModuleNotFoundError:
    print("hidden")
"""
    assert run(code, tmp_path) == "hidden\n"
